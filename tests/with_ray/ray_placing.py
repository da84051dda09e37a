"""The rule that thaw had for a worker that is booted again, as a control: where it was, if it can."""

from __future__ import annotations

from collections import Counter

from thaw.cluster.node import ClusterNode
from thaw.cluster.placement import Placement, chosen


def as_before(
    nodes: list[ClusterNode], pool: str, before: ClusterNode | None, tried: Counter[ClusterNode]
) -> Placement | None:
    if before in nodes and before is not None and not tried[before]:
        return Placement(before, "the control")
    return chosen(nodes, pool, before, tried)
