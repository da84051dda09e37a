"""Ray clusters on this machine: several raylets, as `ray.cluster_utils` starts them, and pools on them.

The test's own process never joins Ray, as no pool's does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_cluster import LocalCluster, cluster_of, with_gpus

from thaw.cluster import JoinedCluster, RayCluster


@pytest.fixture(scope="session")
def one_node() -> Iterator[LocalCluster]:
    """A cluster of one node, for all tests that change nothing in it."""
    with cluster_of(1) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def joined(one_node: LocalCluster) -> Iterator[JoinedCluster]:
    """That cluster, joined once for many pools."""
    with RayCluster(address=one_node.address).join() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def damaged() -> Iterator[LocalCluster]:
    with with_gpus(3, 1) as cluster:
        yield cluster


@pytest.fixture
def three_nodes(damaged: LocalCluster) -> LocalCluster:
    """A cluster to be damaged: each test leaves three nodes, though not those that it found. Each declares a GPU."""
    damaged.ray.wait_for_nodes()
    return damaged


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was measured in one test is not known in another."""
    monkeypatch.setenv("THAW_CACHE_DIR", str(tmp_path / "cache"))
