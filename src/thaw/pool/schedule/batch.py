"""One chunk in one worker: its point loaded there, forked, generated as one batch, the results made.

Runs on a thread of the pool. Whatever goes wrong is raised; what becomes of the jobs is the scheduler's to say.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import msgspec

from thaw.core.sampling import derive
from thaw.engines.base import Completion, GenerateRequest, SessionRef
from thaw.engines.text import left_open, text_after
from thaw.pool.history import History
from thaw.pool.schedule.captures import Captures
from thaw.pool.schedule.job import Job, JobChunk
from thaw.pool.schedule.point_loader import LoadedPoint, PointLoader
from thaw.pool.schedule.rates import Rates
from thaw.pool.schedule.resolver import PointResolver
from thaw.pool.session import PoolSession
from thaw.pool.values import BranchResult, Timings
from thaw.pool.workers.worker import Incarnation

Prompt = tuple[tuple[int, ...], str]
"""Token ids that a branch appends, and their text."""
NOTHING: Prompt = ((), "")


class Batch:
    """`beside(life, fn)` runs a capture from `life` on another thread while the batch goes on."""

    def __init__(
        self,
        loader: PointLoader,
        captures: Captures,
        resolver: PointResolver,
        rates: Rates,
        beside: Callable[[Incarnation, Callable[[], object]], object],
    ) -> None:
        self._loader, self._captures, self._resolver = loader, captures, resolver
        self._rates, self._beside = rates, beside

    def run(self, chunk: JobChunk, life: Incarnation) -> list[BranchResult]:
        """Results of the chunk's jobs, in order, but of those that were stopped meanwhile."""
        began = time.perf_counter()
        chunk.stage, chunk.progress = "prepare", began
        if chunk.snapshot == "before":
            self._captures.capture(chunk.point)
        loaded = self._loader.load(chunk.point, life, chunk.policy)
        # Another point may push this one out of the worker from here on. Its session stays open until this batch ends,
        # for it belongs to whoever holds `loaded`.
        chunk.progress = prepared = time.perf_counter()
        children = self._fork(chunk, life, loaded)
        chunk.progress = forked = time.perf_counter()
        try:
            if loaded.point.stored is None and chunk.snapshot != "never":
                # It is only here: into the arena with it, beside the batch.
                self._beside(life, functools.partial(self._captures.capture, loaded.point, loaded.session))
            chunk.stage = "generate"
            prompts = [
                _encoded(job, chunk.point.tokens, life) if job.prompt or job.token_ids is not None else NOTHING
                for job in chunk.jobs
            ]
            completions = self._generate(chunk, life, children, prompts)
        except BaseException:
            for ref in children:
                life.forget(ref)
            raise
        self._measure(completions)
        timings = Timings(
            queue_s=began - chunk.queued, prepare_s=prepared - began, capture_s=loaded.capture_s,
            hydrate_s=loaded.hydrate_s, fork_s=forked - prepared,
        )  # fmt: skip
        ended = zip(chunk.jobs, prompts, completions, strict=True)
        return [self._result(chunk, life, loaded, timings, *each) for each in ended]

    def forget(self, chunk: JobChunk, life: Incarnation) -> None:
        self._loader.forget(chunk.point, life)

    @staticmethod
    def _fork(chunk: JobChunk, life: Incarnation, loaded: LoadedPoint) -> list[SessionRef]:
        """A child for each job. Its seed is the same in whichever worker and chunk the job runs."""
        point, jobs = chunk.point, chunk.jobs
        replay = chunk.replay and loaded.is_parent
        derived = (point.seed if chunk.replay else derive(point.seed, point.at, job.index) for job in jobs)
        seeds = [seed if job.seed is None else job.seed for job, seed in zip(jobs, derived, strict=True)]
        found = life.engine.fork(
            loaded.session.ref, len(jobs), at=point.at, replay=replay, seeds=None if replay else seeds
        ).result()
        for job, ref, seed in zip(jobs, found, seeds, strict=True):
            job.child, job.child_seed, job.partial = (life, ref), seed, []
        return found

    @staticmethod
    def _generate(
        chunk: JobChunk, life: Incarnation, children: list[SessionRef], prompts: Sequence[Prompt]
    ) -> list[Completion]:
        requests = [
            GenerateRequest(session=ref, resume=True)
            if job.resume
            else GenerateRequest(session=ref, prompt=ids, prompt_text=text, sampling=job.sampling)
            for job, ref, (ids, text) in zip(chunk.jobs, children, prompts, strict=True)
        ]
        handle = life.engine.generate(requests)
        # Whoever stops a job says so first and looks for its child then; here the child was there first, and whether it
        # was stopped is asked then. So at least one of the two closes it, and closing twice is fine.
        for job, ref in zip(chunk.jobs, children, strict=True):
            if job.stop:
                life.forget(ref)
        for delta in handle:
            chunk.progress = time.perf_counter()
            job = chunk.jobs[delta.index]
            job.partial.append(delta)
            job.round.emit(job.index, job.attempts, delta)
        return handle.result()

    def _measure(self, completions: list[Completion]) -> None:
        longest = max(completions, key=lambda done: len(done.token_ids))
        if len(longest.token_ids) > 4 and longest.finish_reason != "abort":
            self._rates.stepped(len(completions), (longest.total_s - longest.ttft_s) / (len(longest.token_ids) - 1))

    def _result(
        self, chunk: JobChunk, life: Incarnation, loaded: LoadedPoint, timings: Timings, job: Job, prompt: Prompt,
        done: Completion,
    ) -> BranchResult:  # fmt: skip
        history = History(
            before=chunk.point.tokens, before_turns=loaded.turns, prompt=prompt[0], prompt_text=prompt[1],
            token_ids=done.token_ids, logprobs=done.logprobs, entropies=done.entropies, text=done.text,
            finish_reason=done.finish_reason, sampling=job.sampling, seed=job.child_seed, turn_seed=done.seed,
            policy=life.engine.policy_version, resumed=job.resume,
        )  # fmt: skip
        session = None
        if chunk.keep and not job.stop:
            num_kv = min(len(history.before), done.usage.num_cached_tokens)  # what ran again may have other bits
            session = PoolSession(
                life, done.session, kept=loaded.session.kept.cut(num_kv), parent=chunk.point.parent, proof=done.proof,
                history=history, num_inherited=len(history.before),
            )  # fmt: skip
            if chunk.store:
                self._store(life, session)
        else:
            life.forget(done.session)
        return BranchResult(
            index=job.index, text=done.text, token_ids=done.token_ids, logprobs=done.logprobs,
            top_logprobs=done.top_logprobs, entropies=done.entropies, finish_reason=done.finish_reason,
            stop_reason=done.stop_reason, seed=done.seed, usage=done.usage, proof=done.proof,
            restore=loaded.session.restore, decision=loaded.decision,
            timings=msgspec.structs.replace(
                timings, ttft_s=done.ttft_s, decode_s=done.total_s - done.ttft_s,
                total_s=time.perf_counter() - job.submitted,
            ),
            worker=life.name, attempts=job.attempts, session=session, history=history,
        )  # fmt: skip

    def _store(self, life: Incarnation, session: PoolSession) -> None:
        """Into the arena, beside everything else."""
        self._beside(life, lambda: self._captures.capture(self._resolver.find(session)))


def _encoded(job: Job, before: tuple[int, ...], life: Incarnation) -> Prompt:
    codec = life.engine.codec
    if job.token_ids is not None:
        return job.token_ids, text_after(codec, before, job.token_ids, skip_special_tokens=False)
    return tuple(codec.encode(job.prompt, first=False)), left_open(codec, before) + job.prompt
