"""One chunk in one worker: the trunk brought there, forked, generated as one batch, the results made.

Runs on a thread of the pool. Whatever goes wrong is raised; what becomes of the jobs is the scheduler's to say.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from thaw.core.sampling import derive
from thaw.engines.base import Completion, GenerateRequest, SessionRef
from thaw.engines.text import left_open, text_after
from thaw.pool.history import History
from thaw.pool.schedule.job import Job, JobChunk
from thaw.pool.schedule.placement import Placed, Placement
from thaw.pool.schedule.rates import Rates
from thaw.pool.schedule.resolver import PointResolver
from thaw.pool.session import PoolSession
from thaw.pool.values import BranchResult, Timings
from thaw.pool.workers.worker import Incarnation


class Batch:
    """`beside(fn)` runs something on another thread while the batch goes on."""

    def __init__(
        self,
        placement: Placement,
        resolver: PointResolver,
        rates: Rates,
        beside: Callable[[Callable[[], object]], object],
    ) -> None:
        self._placement, self._resolver, self._rates, self._beside = placement, resolver, rates, beside

    def run(self, chunk: JobChunk, life: Incarnation) -> list[BranchResult]:
        """Results of the chunk's jobs, in order, but of those that were stopped meanwhile."""
        began = time.perf_counter()
        chunk.stage, chunk.progress = "prepare", began
        if chunk.snapshot == "before":
            self._placement.capture(chunk.trunk)
        there = self._placement.prepare(chunk.trunk, life, chunk.policy)
        prepared = time.perf_counter()
        # What was brought here nobody holds any more: another point may push it out before it is forked. It is tried
        # again.
        chunk.stage, chunk.progress = "fork", prepared
        children = self._fork(chunk, life, there)
        forked = time.perf_counter()
        try:
            if chunk.snapshot != "never":
                self._protect(chunk, life)
            chunk.stage, chunk.progress = "generate", forked
            completions, prompts = self._generate(chunk, life, children)
        except BaseException:
            for ref in children:
                life.forget(ref)
            raise
        self._measure(completions)
        timings = Timings(
            queue_s=began - chunk.queued, prepare_s=prepared - began, capture_s=there.capture_s,
            hydrate_s=there.hydrate_s, fork_s=forked - prepared,
        )  # fmt: skip
        return [
            self._result(chunk, life, there, job, done, prompt, timings)
            for job, done, prompt in zip(chunk.jobs, completions, prompts, strict=True)
        ]

    def forget(self, chunk: JobChunk, life: Incarnation) -> None:
        self._placement.forget(chunk.trunk, life)

    def _fork(self, chunk: JobChunk, life: Incarnation, there: Placed) -> list[SessionRef]:
        trunk, jobs = chunk.trunk, chunk.jobs
        seeds = [self.seed_of(chunk, job) for job in jobs]
        replay = chunk.replay and not trunk.plain and all(job.seed is None for job in jobs)
        found = life.engine.fork(
            there.ref, len(jobs), at=trunk.at, replay=replay, seeds=None if replay else seeds
        ).result()
        for job, ref in zip(jobs, found, strict=True):
            job.begin(life, ref)
        return found

    @staticmethod
    def seed_of(chunk: JobChunk, job: Job) -> int:
        """The same in whichever worker and chunk the job runs."""
        if job.seed is not None:
            return job.seed
        return chunk.trunk.seed if chunk.replay else derive(chunk.trunk.seed, chunk.trunk.at, job.index)

    def _protect(self, chunk: JobChunk, life: Incarnation) -> None:
        """Put a trunk that is only here into the arena, beside the batch."""
        trunk = chunk.trunk
        if trunk.stored is None:
            if trunk.held is not None and trunk.alive:
                self._beside(lambda: self._placement.capture(trunk))
            else:
                self._beside(lambda: self._placement.capture_resident(trunk, life))

    def _generate(
        self, chunk: JobChunk, life: Incarnation, children: list[SessionRef]
    ) -> tuple[list[Completion], list[tuple[tuple[int, ...], str]]]:
        prompts = [self._encode(job, chunk.trunk.tokens, life) for job in chunk.jobs]
        requests = [
            GenerateRequest(session=ref, resume=True)
            if job.resume
            else GenerateRequest(session=ref, prompt=ids, prompt_text=text, sampling=job.sampling)
            for job, ref, (ids, text) in zip(chunk.jobs, children, prompts, strict=True)
        ]
        handle = life.engine.generate(requests)
        for job in chunk.jobs:
            if job.stop:  # stopped between the queue and here
                life.forget(job.child[1] if job.child else children[0])
        for delta in handle:
            chunk.progress = time.perf_counter()
            job = chunk.jobs[delta.index]
            job.round.emit([job.take(delta)])
        return handle.result(), prompts

    @staticmethod
    def _encode(job: Job, before: tuple[int, ...], life: Incarnation) -> tuple[tuple[int, ...], str]:
        codec = life.engine.codec
        if job.token_ids is not None:
            return job.token_ids, text_after(codec, before, job.token_ids, skip_special_tokens=False)
        if not job.prompt:
            return (), ""
        return tuple(codec.encode(job.prompt, first=False)), left_open(codec, before) + job.prompt

    def _measure(self, completions: list[Completion]) -> None:
        longest = max(completions, key=lambda done: len(done.token_ids))
        if len(longest.token_ids) > 4 and longest.finish_reason != "abort":
            self._rates.stepped(len(completions), (longest.total_s - longest.ttft_s) / (len(longest.token_ids) - 1))

    def _result(
        self, chunk: JobChunk, life: Incarnation, there: Placed, job: Job, done: Completion,
        prompt: tuple[tuple[int, ...], str], timings: Timings,
    ) -> BranchResult:  # fmt: skip
        seed = self.seed_of(chunk, job)
        history = History(
            before=chunk.trunk.tokens, before_turns=there.turns, prompt=prompt[0], prompt_text=prompt[1],
            token_ids=done.token_ids, logprobs=done.logprobs, entropies=done.entropies, text=done.text,
            finish_reason=done.finish_reason, sampling=job.sampling, seed=seed, policy=life.engine.policy_version,
            resumed=job.resume,
        )  # fmt: skip
        session = None
        if chunk.keep and not job.stop:
            session = self._session(life, there, done, history)
            if chunk.store:
                self._store(session)
        else:
            life.forget(done.session)
        return BranchResult(
            index=job.index, text=done.text, token_ids=done.token_ids, logprobs=done.logprobs,
            top_logprobs=done.top_logprobs, entropies=done.entropies, finish_reason=done.finish_reason,
            stop_reason=done.stop_reason, seed=done.seed, usage=done.usage, proof=done.proof, restore=there.restore,
            decision=there.decision,
            timings=Timings(
                queue_s=timings.queue_s, prepare_s=timings.prepare_s, capture_s=timings.capture_s,
                hydrate_s=timings.hydrate_s, fork_s=timings.fork_s, ttft_s=done.ttft_s,
                decode_s=done.total_s - done.ttft_s, total_s=time.perf_counter() - job.submitted,
            ),
            worker=life.name, attempts=job.attempts, session=session, history=history,
        )  # fmt: skip

    def _store(self, session: PoolSession) -> None:
        """Into the arena, beside everything else."""
        self._beside(lambda: self._placement.capture(self._resolver.find(session)))

    @staticmethod
    def _session(life: Incarnation, there: Placed, done: Completion, history: History) -> PoolSession:
        num_kv = min(len(history.before), done.usage.num_cached_tokens)  # what ran again may have other bits
        return PoolSession(
            life, done.session, kept=there.resident.kept.cut(num_kv), parent=there.parent, proof=done.proof,
            history=history, num_inherited=len(history.before),
        )  # fmt: skip
