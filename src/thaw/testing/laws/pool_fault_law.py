"""What goes wrong costs time, or its own branch; never another branch, and never a result."""

from __future__ import annotations

import time

import pytest

from thaw.core.errors import Cancelled, EngineDied, ThawError, TimedOut
from thaw.pool import Branch, ForkPool, Round
from thaw.testing.laws.pool_kit import PoolFactory, PoolKit, bits


def until_running(round_: Round) -> None:
    """Wait for the round's first token."""
    for delta in round_:
        if delta.token_ids:
            return


def busy_worker(pool: ForkPool) -> str:
    return next(worker.name for worker in pool.stats().workers if worker.running)


class PoolFaultLaw(PoolKit):
    def test_a_worker_that_dies_loses_no_branch(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=2) as pool:
            trunk = self.trunk(pool)
            sampling = self.sampled(self.many_tokens)
            undisturbed = pool.fork(trunk, 4, sampling, snapshot="before")
            round_ = pool.submit(trunk, 4, sampling)
            until_running(round_)
            self.end_worker(pool, busy_worker(pool))
            results = round_.result()
            assert bits(results) == bits(undisturbed)
            assert {result.attempts for result in results} == {2}
            assert pool.stats().num_retries == 4 and sum(w.num_failures for w in pool.stats().workers) == 1

    def test_the_only_worker_is_booted_again(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=1) as pool:
            trunk = self.trunk(pool)
            snapshot = pool.snapshot(trunk)
            sampling = self.sampled(self.many_tokens)
            undisturbed = pool.fork(trunk, 2, sampling)
            round_ = pool.submit(snapshot, 2, sampling)
            until_running(round_)
            self.end_worker(pool, busy_worker(pool))
            assert bits(round_.result()) == bits(undisturbed)
            assert pool.stats().workers[0].incarnation == 2
            assert bits(pool.fork(trunk, 2, sampling)) == bits(undisturbed), "a captured session outlives its worker"

    def test_an_empty_session_opens_elsewhere_where_a_worker_has_just_ended(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=2) as pool:
            session = self.trunk(pool)
            for _ in range(3):
                self.end_worker(pool, session.worker)
                session = self.trunk(pool)
                assert session.num_tokens > 0
            assert sum(worker.num_failures for worker in pool.stats().workers) == 3

    def test_results_that_are_stored_outlive_their_worker(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=1) as pool:
            done = pool.fork(self.trunk(pool), 2, self.sampled(), store=True)
            undisturbed = pool.fork(done[1], 2, self.sampled(), snapshot="before")
            self.end_worker(pool, done[1].worker)
            assert bits(pool.fork(done[1], 2, self.sampled())) == bits(undisturbed)

    def test_what_was_never_captured_is_lost_by_name_and_computed_again_where_that_is_allowed(
        self, pool_factory: PoolFactory
    ) -> None:
        with pool_factory(workers=1) as pool:
            done = pool.fork(self.trunk(pool), 1, self.sampled(), snapshot="never")[0]
            self.end_worker(pool, done.worker)
            with pytest.raises(EngineDied):
                pool.fork(done, 1, self.sampled(), snapshot="never")
            again = pool.fork(done, 1, self.sampled(), policy="fast")[0]
            assert again.decision is not None and again.decision.action == "prefill"
            assert again.decision.num_prefilled_tokens == len(done.trajectory.prompt_ids) + self.num_tokens

    def test_a_worker_that_hangs_is_ended_and_its_branches_begin_again(self, pool_factory: PoolFactory) -> None:
        if not self.hangs:
            pytest.skip("a hang of this backend cannot be ended from outside")
        with pool_factory(workers=2, stall_s=2.0, heartbeat_s=2.0) as pool:
            trunk = self.trunk(pool)
            sampling = self.sampled(self.many_tokens)
            undisturbed = pool.fork(trunk, 3, sampling, snapshot="before")
            round_ = pool.submit(trunk, 3, sampling)
            until_running(round_)
            self.hang_worker(pool, busy_worker(pool))
            assert bits(round_.result(120)) == bits(undisturbed)

    def test_trying_again_has_an_end_and_says_so(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=1, retries=1) as pool:
            trunk = self.trunk(pool)
            snapshot = pool.snapshot(trunk)
            round_ = pool.submit(snapshot, 1, self.sampled(100 * self.many_tokens))
            for attempt in (1, 2):
                for delta in round_:
                    if delta.attempt == attempt:
                        break
                self.end_worker(pool, busy_worker(pool))
            with pytest.raises(EngineDied, match="2 attempts"):
                round_.result()
            assert pool.fork(snapshot, 1, self.sampled())[0].ok, "the pool goes on"

    def test_a_poisoned_branch_fails_alone(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=1) as pool:
            trunk = self.trunk(pool)
            clean = pool.fork(trunk, 3, self.sampled())
            mixed = pool.fork(trunk, [Branch(), Branch(token_ids=(10**8,)), Branch()], self.sampled(), errors="return")
            assert isinstance(mixed[1].error, ThawError) and not mixed[1].ok
            assert [mixed[i].token_ids for i in (0, 2)] == [clean[i].token_ids for i in (0, 2)]
            with pytest.raises(ThawError, match="vocabulary"):
                pool.fork(trunk, [Branch(), Branch(token_ids=(10**8,))], self.sampled())

    def test_cancel_and_timeout_end_their_own_branch(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=1) as pool:
            trunk = self.trunk(pool)
            sampling = self.sampled(5 * self.many_tokens)
            endless = self.sampled(100 * self.many_tokens)
            branches = [Branch(), Branch(sampling=endless), Branch(sampling=endless, timeout_s=0.5)]
            round_ = pool.submit(trunk, branches, sampling)
            until_running(round_)
            round_.cancel(1)
            results = round_.result(errors="return")
            assert results[0].ok and len(results[0].token_ids) == 5 * self.many_tokens
            assert isinstance(results[1].error, Cancelled) and 0 < len(results[1].token_ids) < 100 * self.many_tokens
            assert isinstance(results[2].error, TimedOut) and len(results[2].token_ids) < 100 * self.many_tokens
            assert results[1].session is None and results[2].session is None

    def test_a_round_that_waits_is_cancelled_at_once(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=1, max_batch=1) as pool:
            trunk = self.trunk(pool)
            first = pool.submit(trunk, 1, self.sampled(100 * self.many_tokens))
            second = pool.submit(trunk, 3, self.sampled())
            second.cancel()
            assert all(isinstance(r.error, Cancelled) for r in second.result(20, errors="return"))
            assert not first.done()
            first.cancel()
            assert isinstance(first.result(20, errors="return")[0].error, Cancelled)

    def test_a_closed_pool_leaves_no_round_waiting(self, pool_factory: PoolFactory) -> None:
        pool = pool_factory(workers=1, max_batch=2)
        trunk = self.trunk(pool)
        rounds = [pool.submit(trunk, 4, self.sampled(100 * self.many_tokens)) for _ in range(2)]
        home = pool._home
        time.sleep(0.2)
        pool.close()
        for round_ in rounds:
            assert all(isinstance(result.error, EngineDied) for result in round_.result(20, errors="return"))
        assert not home.path.exists() and not home.spill.exists()
        with pytest.raises(EngineDied, match="closed"):
            pool.fork(trunk, 1)
