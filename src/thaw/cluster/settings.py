"""What a caller may say about the cluster that a pool runs on. No Ray here, and nothing is started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from thaw.core.errors import InvalidRequest

if TYPE_CHECKING:
    from thaw.cluster.nodes import ClusterNodes
    from thaw.pool.backends.base import WorkerBackend, WorkerSpec


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster for a pool: `ForkPool(…, backend=RayCluster(…))`; `backend="ray"` is one with these defaults.

    `address`: of the cluster; by default the one that `RAY_ADDRESS` names or that runs on this machine, and else one is
    started here for as long as the pool lives. `labels`: workers go only to nodes that have these Ray labels.
    `interface`: the network interface of every node on which KV and tokens travel, by name; by default the address
    that Ray itself uses for the node. `lease_s`: how long a node keeps engines and packs of a pool of which it hears
    nothing. `node_nbytes`: packs that a node other than the client's keeps, the least recently used go first.
    `folder`: where nodes make theirs, by default /dev/shm.
    """

    address: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    interface: str | None = None
    lease_s: float = 30.0
    node_nbytes: int = 4 << 30
    folder: str | None = None

    def __post_init__(self) -> None:
        if not self.lease_s >= 1.0:
            raise InvalidRequest(f"lease_s={self.lease_s!r}: must be at least 1 second")
        if self.node_nbytes < 1:
            raise InvalidRequest(f"node_nbytes={self.node_nbytes!r}: must be at least 1 byte")
        if self.address is not None and self.address.startswith("ray://"):
            raise InvalidRequest(
                f"address={self.address!r}: a pool must run on a node of the cluster, and a Ray Client does not. Start "
                "the program there (a Ray job does), or run `ray start --address=…` on this machine"
            )

    def join(self) -> JoinedCluster:
        """Join now, for several pools that share the nodes' daemons: `with RayCluster().join() as cluster:`, and
        `backend=cluster` for each. Raises `NotFound` without Ray, `EngineDied` where the cluster cannot be joined."""
        from thaw.cluster.nodes import ClusterNodes

        return JoinedCluster(ClusterNodes(self, None))

    def __call__(self, spec: WorkerSpec) -> WorkerBackend:
        """The backend of a pool. Raises as `join`."""
        from thaw.cluster.backend import ClusterBackend
        from thaw.cluster.nodes import ClusterNodes

        return ClusterBackend(spec, ClusterNodes(self, spec.dirs.path / "ray.log"), own=True)


class JoinedCluster:
    """A cluster that was joined. Close its pools before it."""

    def __init__(self, nodes: ClusterNodes) -> None:
        self.nodes = nodes

    def __call__(self, spec: WorkerSpec) -> WorkerBackend:
        """The backend of one more pool."""
        from thaw.cluster.backend import ClusterBackend

        return ClusterBackend(spec, self.nodes, own=False)

    def close(self) -> None:
        """End what runs on the nodes, and leave Ray. Idempotent."""
        self.nodes.end()

    def __enter__(self) -> JoinedCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def on_ray(spec: WorkerSpec) -> WorkerBackend:
    """What `backend="ray"` stands for."""
    return RayCluster()(spec)
