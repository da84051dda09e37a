"""The fork pool's law book: whatever boots its workers, these hold.

    from thaw.testing import PoolTests

    class TestMyBackend(PoolTests):
        @pytest.fixture
        def pool_factory(self, tmp_path):
            return lambda **changes: ForkPool(…, **changes)

        def end_worker(self, pool, name): ...        # kill it without a word; what a crash is there

`pool_factory(**changes)` makes a pool of one fixed model and must take `workers=` and what `ForkPool` takes. Pools that
it returns stand for processes that run one model, so their engines must be equal in every bit at equal batch shape.
`hangs`: whether a worker can be stopped so that it answers nothing (then `hang_worker` does it).
"""

from __future__ import annotations

from thaw.testing.laws.pool_fault_law import PoolFaultLaw
from thaw.testing.laws.pool_point_law import PoolPointLaw
from thaw.testing.laws.pool_queue_law import PoolQueueLaw
from thaw.testing.laws.pool_round_law import PoolRoundLaw


class PoolTests(PoolRoundLaw, PoolPointLaw, PoolFaultLaw, PoolQueueLaw):
    """The whole book."""
