"""The pool's law book on a fake engine that has a full group, a window and a point state; and what a pool says of a
point that was not kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from thaw import Sampling
from thaw.core.errors import NotKept
from thaw.pool import ForkPool
from thaw.testing import PoolTests
from thaw.testing.laws.pool_kit import PoolFactory

GREEDY = Sampling(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was measured in one test is not known in another."""
    monkeypatch.setenv("THAW_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.slow("the pool's whole book, in this process")
class TestHybridInProcess(PoolTests):
    @pytest.fixture
    def pool_factory(self) -> PoolFactory:
        return lambda **changes: ForkPool("fake", backend="inline", **{"step_s": 0.004, "groups": "hybrid", **changes})

    def end_worker(self, pool: ForkPool, name: str) -> None:
        life = pool._fleet.named(name).life
        assert life is not None
        life.engine.close()


def test_a_pool_goes_on_from_a_kept_point_and_refuses_another_by_name() -> None:
    with ForkPool("fake", backend="inline", workers=2, groups="hybrid", interior=False) as pool:
        trunk = pool.session()
        trunk.append("A document that is read once. " * 10)
        snapshot = pool.snapshot(trunk)
        results = pool.fork(snapshot, 4, GREEDY, spread=2)
        assert len({result.token_ids for result in results}) == 1 and len({result.worker for result in results}) == 2
        with pytest.raises(NotKept, match="100"):
            pool.fork(snapshot, 1, GREEDY, at=100)
