"""What a caller may say about the cluster that a pool runs on. No Ray here, and nothing is started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from thaw.cluster.tls import TlsFiles
from thaw.core.errors import InvalidRequest


class HasGroupId(Protocol):
    """Ray's `PlacementGroup`, as far as it is needed."""

    @property
    def id(self) -> Any: ...


@dataclass(frozen=True)
class ClusterSettings:
    """What `thaw.cluster.RayCluster` takes, and says what each is."""

    address: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    interface: str | None = None
    lease_s: float = 30.0
    node_nbytes: int = 4 << 30
    folder: str | None = None
    tls: bool | TlsFiles = False
    transport: Literal["tcp", "nixl"] = "tcp"
    placement_group: str | HasGroupId | None = None
    gpus_per_worker: float | None = None

    def __post_init__(self) -> None:
        if not self.lease_s >= 1.0:
            raise InvalidRequest(f"lease_s={self.lease_s!r}: must be at least 1 second")
        if self.node_nbytes < 1:
            raise InvalidRequest(f"node_nbytes={self.node_nbytes!r}: must be at least 1 byte")
        if not isinstance(self.tls, (bool, TlsFiles)):
            raise InvalidRequest(f"tls={self.tls!r}: must be True, False or TlsFiles(…)")
        if self.transport not in ("tcp", "nixl"):
            raise InvalidRequest(f"transport={self.transport!r}: must be 'tcp' or 'nixl'")
        if self.transport == "nixl" and self.tls:
            raise InvalidRequest("transport='nixl' does not encrypt KV, and tls asks for that. Leave one of them out")
        self._check_group()
        if self.address is not None and self.address.startswith("ray://"):
            raise InvalidRequest(
                f"address={self.address!r}: a pool must run on a node of the cluster, and a Ray Client does not. Start "
                "the program there (a Ray job does), or run `ray start --address=…` on this machine"
            )

    def _check_group(self) -> None:
        group, gpus = self.placement_group, self.gpus_per_worker
        if group is not None and not (isinstance(group, str) and group) and not hasattr(group, "id"):
            raise InvalidRequest(
                f"placement_group={group!r}: must be a group of Ray's, its name or its id (PlacementGroup.id.hex())"
            )
        if group is None and gpus is not None:
            raise InvalidRequest(f"gpus_per_worker={gpus!r} is for bundles of a placement group; give placement_group")
        if group is not None and self.labels:
            raise InvalidRequest("labels and placement_group both say on which nodes workers run; give one of them")
        if gpus is not None and not (0 < gpus < 1 or (gpus >= 1 and gpus == int(gpus))):
            raise InvalidRequest(f"gpus_per_worker={gpus!r}: must be a whole number, or a part of one GPU (0.5)")

    def group_named(self) -> str | None:
        """The placement group's name, or its id."""
        group = self.placement_group
        return group if group is None or isinstance(group, str) else str(group.id.hex())
