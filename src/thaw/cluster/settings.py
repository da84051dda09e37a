"""What a caller may say about the cluster that a pool runs on. No Ray here, and nothing is started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from thaw.cluster.tls import TlsFiles
from thaw.core.errors import InvalidRequest


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

    def __post_init__(self) -> None:
        if not self.lease_s >= 1.0:
            raise InvalidRequest(f"lease_s={self.lease_s!r}: must be at least 1 second")
        if self.node_nbytes < 1:
            raise InvalidRequest(f"node_nbytes={self.node_nbytes!r}: must be at least 1 byte")
        if not isinstance(self.tls, (bool, TlsFiles)):
            raise InvalidRequest(f"tls={self.tls!r}: must be True, False or TlsFiles(…)")
        if self.address is not None and self.address.startswith("ray://"):
            raise InvalidRequest(
                f"address={self.address!r}: a pool must run on a node of the cluster, and a Ray Client does not. Start "
                "the program there (a Ray job does), or run `ray start --address=…` on this machine"
            )
