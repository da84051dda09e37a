"""Who runs when: bounded queues, fair between points, workers that come and go meanwhile."""

from __future__ import annotations

import pytest

from thaw.core.errors import Busy, InvalidRequest
from thaw.testing.laws.pool_kit import PoolFactory, PoolKit


class PoolQueueLaw(PoolKit):
    def test_a_full_queue_holds_its_caller_back(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=1, max_batch=1, queue_limit=4) as pool:
            trunk = self.trunk(pool)
            first = pool.submit(trunk, 4, self.sampled(self.many_tokens))
            with pytest.raises(Busy, match="limit is 4"):
                pool.submit(trunk, 4, self.sampled(), block=False)
            second = pool.submit(trunk, 2, self.sampled())
            assert len(first.result()) == 4 and len(second.result()) == 2

    def test_points_take_turns_and_none_starves(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=2, max_batch=2) as pool:
            points = [self.trunk(pool, f"Document {i}. " * 20, seed=i) for i in range(4)]
            rounds = [pool.submit(point, 8, self.sampled()) for point in points]
            ended: list[int] = []
            for i, round_ in enumerate(rounds):
                round_.add_done_callback(lambda _, i=i: ended.append(i))  # type: ignore[misc]
            order = sorted((r.timings.queue_s, i) for i, round_ in enumerate(rounds) for r in round_.result())
            assert {i for _, i in order[: len(order) // 2]} == {0, 1, 2, 3}, "every point had begun by half of the work"
            assert sorted(ended) == [0, 1, 2, 3]

    def test_more_points_than_a_worker_keeps_are_brought_again(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=2, max_batch=4, residents=1) as pool:
            points = [list(self.trunk(pool, f"Document {i}. " * 20).tokens) for i in range(6)]
            for _ in range(2):
                rounds = [pool.submit(point, 2, self.sampled(), seed=1, spread=2) for point in points]
                assert all(result.ok for round_ in rounds for result in round_.result())

    def test_a_large_round_is_not_overtaken_for_ever(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=1, max_batch=4) as pool:
            small, large = self.trunk(pool, "One. " * 20), self.trunk(pool, "Two. " * 20)
            waiting = [pool.submit(small, 3, self.sampled(self.many_tokens))]
            big = pool.submit(large, 4, self.sampled())
            while not big.done() and len(waiting) < 60:
                waiting.append(pool.submit(small, 1, self.sampled(self.many_tokens)))
                waiting[-1].result()
            assert big.done() and len(waiting) < 60
            assert all(result.ok for result in big.result())

    def test_workers_come_and_go_while_rounds_run(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=1, max_batch=2) as pool:
            trunk = self.trunk(pool)
            old = pool.workers[0]
            plain = [r.token_ids for r in pool.fork(trunk, 8, self.sampled())]
            round_ = pool.submit(trunk, 8, self.sampled(self.many_tokens))
            new = pool.add_worker()
            assert new in pool.workers
            pool.drain(old)
            assert pool.workers == (new,)
            results = round_.result()
            assert [r.token_ids[: self.num_tokens] for r in results] == plain
            assert all(result.attempts == 1 for result in results), "draining interrupts nothing"

    def test_options_that_cannot_work_are_refused_before_anything_starts(self, pool_factory: PoolFactory) -> None:
        for wrong in ({"workers": 0}, {"policy": "loose"}, {"snapshot": "sometimes"}, {"max_batch": 0}):
            with pytest.raises(InvalidRequest):
                pool_factory(**wrong)
