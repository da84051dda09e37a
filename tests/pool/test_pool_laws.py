"""The pool's law book on the fake engine: in processes of their own, and in this process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from thaw.pool import ForkPool
from thaw.testing import PoolTests
from thaw.testing.laws.pool_kit import PoolFactory


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was measured in one test is not known in another."""
    monkeypatch.setenv("THAW_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.slow("each test starts a pool of processes")
class TestLocalProcesses(PoolTests):
    hangs = True

    @pytest.fixture
    def pool_factory(self) -> PoolFactory:
        return lambda **changes: ForkPool("fake", **{"step_s": 0.004, **changes})

    def end_worker(self, pool: ForkPool, name: str) -> None:
        os.kill(self.pid(pool, name), signal.SIGKILL)

    def hang_worker(self, pool: ForkPool, name: str) -> None:
        os.kill(self.pid(pool, name), signal.SIGSTOP)

    @staticmethod
    def pid(pool: ForkPool, name: str) -> int:
        found = next(worker.pid for worker in pool.stats().workers if worker.name == name)
        assert found is not None
        return found


class TestInProcess(PoolTests):
    @pytest.fixture
    def pool_factory(self) -> PoolFactory:
        return lambda **changes: ForkPool("fake", backend="inline", **{"step_s": 0.004, **changes})

    def end_worker(self, pool: ForkPool, name: str) -> None:
        life = pool._fleet.named(name).life
        assert life is not None
        life.engine.close()
