"""What a round gives: every branch's own result, in order, the engine's own forks and nothing else."""

from __future__ import annotations

import thaw
from thaw.core.errors import InvalidRequest
from thaw.pool import Branch
from thaw.testing.laws.pool_kit import TEXT, PoolFactory, PoolKit, bits

PROMPTS = ["Why?", "How?", "Who?", "When?"]


class PoolRoundLaw(PoolKit):
    def test_results_come_in_order_each_with_all_that_belongs_to_it(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=1) as pool:
            trunk = self.trunk(pool)
            results = pool.fork(trunk, PROMPTS, self.sampled())
            assert [result.index for result in results] == [0, 1, 2, 3]
            for result in results:
                assert result.ok and result.attempts == 1 and result.worker in pool.workers
                assert len(result.token_ids) == len(result.logprobs) == self.num_tokens
                assert result.finish_reason == "length" and result.text
                assert result.usage is not None and result.usage.num_completion_tokens == self.num_tokens
                assert result.proof is not None and result.proof.hit
                assert result.num_cached_tokens >= trunk.num_tokens - 1
                assert result.decision is not None and result.decision.action == "fork"
                assert result.timings.total_s >= result.timings.decode_s > 0
                assert result.session is not None and result.trajectory == result.session.trajectory()

    def test_branches_are_the_forks_that_the_engine_itself_makes(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=1) as pool:
            trunk = self.trunk(pool)
            ours = pool.fork(trunk, PROMPTS, self.sampled())
            with trunk.fork(4) as kids:
                theirs = kids.generate(PROMPTS, self.sampled())
            assert [(r.text, r.token_ids, r.logprobs, r.seed) for r in ours] == [
                (c.text, c.token_ids, c.logprobs, c.seed) for c in theirs
            ]

    def test_a_second_worker_gives_the_same_bits_at_the_same_batch_shape(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=2) as pool:
            trunk = self.trunk(pool)
            snapshot = pool.snapshot(trunk)
            first = pool.fork(trunk, PROMPTS, self.sampled())
            pool.drain(first[0].worker)
            second = pool.fork(snapshot, PROMPTS, self.sampled())
            assert {r.worker for r in first}.isdisjoint(r.worker for r in second)
            assert bits(first) == bits(second)
            for result in second:
                assert result.decision is not None and result.decision.action == "hydrate"
                assert result.decision.nbytes > 0 and result.decision.num_prefilled_tokens == 0
                assert result.restore is not None and result.restore.hit and result.restore.num_recomputed_tokens == 0

    def test_a_spread_round_runs_in_several_workers_with_the_same_seeds(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=2) as pool:
            trunk = self.trunk(pool)
            together = pool.fork(trunk, 4, self.sampled())
            apart = pool.fork(trunk, 4, self.sampled(), spread=2)
            assert len({result.worker for result in apart}) == 2
            assert [result.seed for result in apart] == [result.seed for result in together]

    def test_deltas_and_completions_say_what_results_say(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=1) as pool:
            round_ = pool.submit(self.trunk(pool), PROMPTS, self.sampled())
            seen: dict[int, tuple[int, ...]] = {}
            for delta in round_:
                seen[delta.index] = (*seen.get(delta.index, ()), *delta.token_ids)
            ended = {result.index: result for result in round_.as_completed()}
            results = round_.result()
            assert [ended[i] for i in range(4)] == results
            assert [seen[i] for i in range(4)] == [result.token_ids for result in results]

    def test_each_branch_has_its_own_prompt_sampling_and_seed(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=1) as pool:
            trunk = self.trunk(pool)
            long, short = self.sampled(9), self.sampled(3)
            results = pool.fork(
                trunk, [Branch(prompt="Why?", sampling=short), Branch(token_ids=(65, 66), seed=5), Branch()], long
            )
            assert [len(result.token_ids) for result in results] == [3, 9, 9]
            assert results[1].seed == 5
            same = pool.fork(trunk, 2, long, seeds=[5, 5])
            assert same[0].token_ids == same[1].token_ids
            replayed = pool.fork(trunk, 2, long, replay=True)
            assert replayed[0].token_ids == replayed[1].token_ids == pool.fork(trunk, 1, long, seeds=[7])[0].token_ids

    def test_the_point_is_untouched_and_may_go_on_or_be_closed(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=1) as pool:
            trunk = self.trunk(pool)
            before = trunk.view()
            round_ = pool.submit(trunk, 2, self.sampled(self.many_tokens))
            trunk.close()
            results = round_.result()
            sessions = [result.session.tokens for result in results if result.session is not None]
            assert len(sessions) == 2 and all(tokens[: len(before.tokens)] == before.tokens for tokens in sessions)

    def test_a_result_is_committed_and_what_is_stored_is_not_written_again(
        self, pool_factory: PoolFactory, tmp_path: object
    ) -> None:
        repo = thaw.init(f"{tmp_path}/runs")
        with repo, pool_factory(workers=1, repo=repo) as pool:
            trunk = self.trunk(pool)
            first = trunk.commit("read it", branch="main")
            winner = pool.fork("main", ["Why?", "How?"], self.sampled())[1]
            assert winner.session is not None
            done = winner.session.commit("answered", branch="answer")
            assert repo.resolve("answer").commit == done.commit and done.num_tokens > first.num_tokens
            assert done.nbytes_written < first.nbytes_written
            assert repo.log("answer")[0].parents == (first.commit,)

    def test_without_a_repository_a_commit_says_so(self, pool_factory: PoolFactory) -> None:
        with pool_factory(workers=1) as pool:
            result = pool.fork(self.trunk(pool, TEXT[:60]), 1, self.sampled())[0]
            assert result.session is not None
            try:
                result.session.commit("x", branch="main")
            except InvalidRequest as error:
                assert "repo=" in str(error)
            else:
                raise AssertionError("a commit into nothing")
