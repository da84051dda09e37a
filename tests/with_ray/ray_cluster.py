"""A Ray cluster on this machine, whose nodes can be taken away one by one."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from thaw.cluster import RayCluster
from thaw.cluster.messages import LookAtNode, NodeCounts
from thaw.cluster.node import ClusterNode
from thaw.data.fresh_process import with_this_thaw
from thaw.pool import ForkPool

OBJECT_STORE_BYTES = 80 << 20
NODE = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES}


class LocalCluster:
    """`address`: to give to a `RayCluster`."""

    def __init__(self, port: int = 0) -> None:
        from ray.cluster_utils import Cluster  # the engines' environments load this file and may have no Ray

        logging.getLogger("ray").setLevel(logging.ERROR)
        head = {**NODE, "include_dashboard": False, **({"gcs_server_port": port} if port else {})}
        self.ray = Cluster(initialize_head=True, head_node_args=head)
        self.address = str(self.ray.address)

    def add(self, **more: Any) -> object:
        return self.ray.add_node(**NODE, **more)

    def pool(self, engine: str = "fake", **changes: Any) -> ForkPool:
        """`cluster`: further settings of its own `RayCluster`."""
        backend = RayCluster(address=self.address, **changes.pop("cluster", {}))
        own = {"step_s": 0.004} if engine == "fake" else {}
        return ForkPool(engine, **{"backend": backend, **own, **changes})


@contextlib.contextmanager
def cluster_of(nodes: int, port: int = 0) -> Iterator[LocalCluster]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in with_this_thaw(os.environ).items():
            patch.setenv(name, value)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # it ends actors for what others on the machine need
        patch.setenv("RAY_health_check_period_ms", "1000")  # a node that ended is noticed in 3 s and not in 15
        patch.setenv("RAY_health_check_failure_threshold", "3")
        cluster = LocalCluster(port)
        try:
            for _ in range(nodes - 1):
                cluster.add()
            yield cluster
        finally:
            cluster.ray.shutdown()


@contextlib.contextmanager
def with_gpus(nodes: int, gpus: int) -> Iterator[LocalCluster]:
    """A cluster whose nodes declare so many each. They are not there; Ray counts and names them all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NODE, "num_gpus", gpus)
        with cluster_of(nodes) as found:
            yield found


def until(true: Callable[[], bool], limit_s: float = 150.0) -> None:
    ends = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < ends, "it did not come true"
        time.sleep(0.05)


def nodes_of(pool: ForkPool) -> list[ClusterNode]:
    """Those with a daemon."""
    return [node for node in pool._backend.nodes.all() if node.daemon is not None]  # type: ignore[attr-defined]


def counts(pool: ForkPool) -> dict[str, NodeCounts]:
    """What each node's daemon has counted, by the node's key."""
    import msgspec

    asked = pool._backend.nodes  # type: ignore[attr-defined]
    return {node.key: msgspec.convert(asked.ask(node, LookAtNode()), NodeCounts) for node in nodes_of(pool)}


def pid_of(pool: ForkPool, worker: str) -> int:
    found = next(one.pid for one in pool.stats().workers if one.name == worker)
    assert found is not None
    return found


def lives(pool: ForkPool, worker: str, other_than: int) -> bool:
    """Whether that worker runs, in another process than that one."""
    return any(one.name == worker and one.pid not in (None, other_than) for one in pool.stats().workers)


def in_group(cluster: LocalCluster, name: str, workers: int = 1, **how: object) -> ForkPool:
    """A pool in that placement group."""
    return cluster.pool(workers=workers, cluster={"placement_group": name, **how})


def devices(pool: ForkPool) -> dict[str, tuple[str, str | None]]:
    """For each worker the key of its node, and which GPUs its process may see."""
    found = {}
    for one in pool.stats().workers:
        life = pool._fleet.named(one.name).life
        if life is not None and one.pid is not None:
            lines = Path(f"/proc/{one.pid}/environ").read_bytes().decode().split("\0")
            told = dict(line.split("=", 1) for line in lines if "=" in line)
            found[one.name] = (life.host.node.key, told.get("CUDA_VISIBLE_DEVICES"))  # type: ignore[attr-defined]
    return found


def end_node(node: ClusterNode, pids: list[int]) -> None:
    """All that a machine takes along when it loses its power: the daemon, the engines and what they started."""
    assert node.daemon is not None
    for pid in (node.daemon.pid, *pids):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # each leads a session of its own


def keepers(cluster: LocalCluster, kind: str = "NodeKeeper") -> list[int]:
    """Of that cluster: Ray names its actors' processes, and a raylet, their parent, was given the cluster's address."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and (folder / "cmdline").read_bytes().startswith(f"ray::{kind}".encode()):
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                if cluster.address.encode() in Path(f"/proc/{parent}/cmdline").read_bytes():
                    found.append(int(folder.name))
    return found
