"""Which node boots a worker: the one with the fewest workers of its pool for what it has, wherever it ran before.

So a worker that was booted elsewhere while its node was away comes back at its next boot, and workers do not gather on
the nodes that were never lost. Workers that run are not moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from thaw.cluster.node import ClusterNode

MAX_TRIES = 2
"""Of one node for one boot: what starts its daemon may fail once because Ray is busy."""
NONE_FREE = float("inf")


@dataclass(frozen=True)
class Placement:
    """`reason`: why there, in a sentence."""

    node: ClusterNode
    reason: str


def allowed(nodes: Iterable[ClusterNode], labels: Mapping[str, str]) -> list[ClusterNode]:
    """Nodes with these labels: those that Ray has, and where it has none, those whose daemons run."""
    good = [node for node in nodes if not node.lost and labels.items() <= node.labels.items()]
    return [node for node in good if node.listed] or [node for node in good if node.daemon is not None]


def chosen(
    nodes: Iterable[ClusterNode], pool: str, before: ClusterNode | None, tried: Mapping[ClusterNode, int]
) -> Placement | None:
    """Where one more worker of the pool goes; None where each node was tried often enough.

    Of nodes that are equal so far the one with the fewest workers of all pools, then `before` (it has packs that the
    worker used), then the client's own. `tried`: how often each has failed to take this worker."""
    good = [node for node in nodes if tried.get(node, 0) < MAX_TRIES]
    if not good:
        return None
    room = capacities(good)

    def load(node: ClusterNode) -> tuple[int, float, float]:
        return tried.get(node, 0), share(node.workers[pool], room[node]), share(node.num_workers, room[node])

    found = min(good, key=lambda node: (*load(node), node is not before, not node.is_home))
    return Placement(found, _why(found, pool, before, good))


def capacities(nodes: Iterable[ClusterNode]) -> dict[ClusterNode, float]:
    """Of each node its GPUs; its CPUs where no node has GPUs; 1 where no node has either."""
    nodes = list(nodes)
    for found in ({node: node.gpus for node in nodes}, {node: node.cpus for node in nodes}):
        if any(found.values()):
            return found
    return dict.fromkeys(nodes, 1.0)


def share(workers: int, capacity: float) -> float:
    """Workers for each unit of the capacity, with one more. A node without any takes what no other can."""
    return (workers + 1) / capacity if capacity else NONE_FREE


def _why(found: ClusterNode, pool: str, before: ClusterNode | None, good: list[ClusterNode]) -> str:
    there = found.workers[pool]
    has = f"{found.gpus:g} GPUs" if any(node.gpus for node in good) else f"{found.cpus:g} CPUs"
    fewest = f"{there} of this pool's workers on {has}, the fewest of {len(good)} nodes"
    if before is None:
        return f"{found.address}: {fewest}"
    if found is before:
        return f"{found.address}, where it was: {fewest}"
    if before.lost:
        left = "is gone"
    elif before not in good:
        left = "is not in Ray, or could not take it"
    else:
        left = f"has {before.workers[pool]}"
    return f"{found.address}: {fewest}. {before.address}, where it was, {left}"
