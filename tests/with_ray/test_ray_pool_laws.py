"""The pool's law book, unchanged, on a Ray cluster of one node."""

from __future__ import annotations

import os
import signal

import pytest
from ray_cluster import pid_of

from thaw.cluster import JoinedCluster
from thaw.pool import ForkPool
from thaw.testing import PoolTests
from thaw.testing.laws.pool_kit import PoolFactory


@pytest.mark.slow("each test starts a pool on a Ray cluster")
class TestOneNode(PoolTests):
    hangs = True

    @pytest.fixture
    def pool_factory(self, joined: JoinedCluster) -> PoolFactory:
        return lambda **changes: ForkPool("fake", **{"backend": joined, "step_s": 0.004, **changes})

    def end_worker(self, pool: ForkPool, name: str) -> None:
        os.kill(pid_of(pool, name), signal.SIGKILL)

    def hang_worker(self, pool: ForkPool, name: str) -> None:
        os.kill(pid_of(pool, name), signal.SIGSTOP)
