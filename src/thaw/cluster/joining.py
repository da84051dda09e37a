"""A Ray cluster as a pool's backend: joined for one pool, or once for several."""

from __future__ import annotations

from thaw.cluster.backend import ClusterBackend
from thaw.cluster.nodes import ClusterNodes
from thaw.cluster.settings import ClusterSettings
from thaw.cluster.shares import check_devices
from thaw.pool.backends.base import WorkerBackend, WorkerSpec


class RayCluster(ClusterSettings):
    """A Ray cluster for a pool: `ForkPool(…, backend=RayCluster(…))`; `backend="ray"` is one with these defaults.

    `address`: of the cluster; by default the one that `RAY_ADDRESS` names or that runs on this machine, and else one is
    started here for as long as the pool lives. `labels`: workers go only to nodes that have these Ray labels.
    `interface`: the network interface of every node on which KV and tokens travel, by name; by default the address
    that Ray itself uses for the node. `lease_s`: how long a node keeps engines and packs of a pool of which it hears
    nothing. `node_nbytes`: packs that a node other than the client's keeps, the least recently used go first.
    `folder`: where nodes make theirs, by default /dev/shm. `tls`: True encrypts control, tokens and KV, with a
    certificate that the pool makes for itself; `TlsFiles` does so with certificates of your own. `transport`:
    "nixl" sends KV by NIXL between nodes that have it. `placement_group`: a group of Ray's that is ready, or its name
    or id: one worker runs in each bundle, on the bundle's GPUs and no others.
    `gpus_per_worker`: then one runs on each so many GPUs of a bundle (or one in each bundle, on a part of a GPU: 0.5,
    where something else takes the rest).
    """

    def join(self) -> JoinedCluster:
        """Join now, for several pools that share the nodes' daemons: `with RayCluster().join() as cluster:`, and
        `backend=cluster` for each. Raises `NotFound` without Ray, `EngineDied` where the cluster cannot be joined."""
        return JoinedCluster(ClusterNodes(self, None))

    def __call__(self, spec: WorkerSpec) -> WorkerBackend:
        """The backend of a pool. Raises as `join`."""
        if self.placement_group is not None:
            check_devices(spec)
        return ClusterBackend(spec, ClusterNodes(self, spec.dirs.path / "ray.log"), own=True)


class JoinedCluster:
    """A cluster that was joined. Close its pools before it."""

    def __init__(self, nodes: ClusterNodes) -> None:
        self.nodes = nodes

    def __call__(self, spec: WorkerSpec) -> WorkerBackend:
        """The backend of one more pool."""
        if self.nodes.shares is not None:
            check_devices(spec)
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
