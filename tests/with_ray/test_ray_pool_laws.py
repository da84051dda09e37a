"""The pool's law book, unchanged, on Ray: a cluster of one node, and one of two whose engines are all on the other."""

from __future__ import annotations

import os
import signal

import pytest
from ray_cluster import LocalCluster, pid_of

from thaw.pool import ForkPool
from thaw.testing import PoolTests
from thaw.testing.laws.pool_kit import PoolFactory


@pytest.mark.slow("each test starts a pool on a Ray cluster")
class TestOneNode(PoolTests):
    hangs = True

    @pytest.fixture
    def pool_factory(self, one_node: LocalCluster) -> PoolFactory:
        return one_node.pool

    def end_worker(self, pool: ForkPool, name: str) -> None:
        os.kill(pid_of(pool, name), signal.SIGKILL)

    def hang_worker(self, pool: ForkPool, name: str) -> None:
        os.kill(pid_of(pool, name), signal.SIGSTOP)
