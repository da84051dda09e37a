"""The scheduler's units: a job is one branch until it has its result, a chunk the jobs that run as one batch."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass, field

from thaw.core.errors import EngineDied, ThawError
from thaw.core.sampling import Sampling
from thaw.engines.base import Delta, SessionRef
from thaw.pool.round import Round, stopped
from thaw.pool.schedule.fork_point import ForkPoint
from thaw.pool.values import BranchResult, LoadPolicy
from thaw.pool.workers.worker import Incarnation, Worker


class KvLost(EngineDied):
    """The point's KV died with its worker and may not be computed again: trying again cannot help."""


@dataclass(eq=False)
class Job:
    """`seed` None: derived from the point's. `stop`: why it is to end ("cancel", "timeout"), "" while it may run.

    `child`, `child_seed`, `partial`: of the last attempt that forked; where its session lives, the session's seed, and
    what it has generated."""

    round: Round
    index: int
    prompt: str
    token_ids: tuple[int, ...] | None
    sampling: Sampling
    seed: int | None
    resume: bool
    timeout_s: float | None
    attempts: int = 0
    stop: str = ""
    child: tuple[Incarnation, SessionRef] | None = None
    child_seed: int = 0
    partial: list[Delta] = field(default_factory=list)
    submitted: float = field(default_factory=time.perf_counter)

    @property
    def deadline(self) -> float:
        """By `time.perf_counter`."""
        return float("inf") if self.timeout_s is None else self.submitted + self.timeout_s

    @property
    def ended(self) -> bool:
        return self.round.has(self.index)

    def fail(self, error: ThawError) -> bool:
        """Settle it with `error` and what it had generated; False when it has a result already."""
        return self.round.settle(
            BranchResult(
                index=self.index,
                text="".join(delta.text for delta in self.partial),
                token_ids=tuple(token for delta in self.partial for token in delta.token_ids),
                logprobs=tuple(value for delta in self.partial for value in delta.logprobs),
                finish_reason="abort" if self.partial else None,
                attempts=self.attempts,
                worker=self.child[0].name if self.child else "",
                error=error,
            )
        )

    def end_stopped(self) -> bool:
        return self.fail(stopped(self.stop, self.timeout_s))


@dataclass(eq=False)
class JobChunk:
    """Jobs of one point that run as one batch. `lane`: what fairness is between.

    `only`: the one worker that it may run in. `avoid`: workers that failed it.
    """

    point: ForkPoint
    jobs: list[Job]
    policy: LoadPolicy
    lane: Hashable
    snapshot: str
    keep: bool
    store: bool
    replay: bool
    only: str | None = None
    avoid: set[str] = field(default_factory=set)
    taken: set[str] | None = None
    """Of a round that is spread: the workers that its chunks went to, shared by them; each goes to another one."""
    queued: float = field(default_factory=time.perf_counter)
    worker: Worker | None = None
    life: Incarnation | None = None
    passed: int = 0
    progress: float = 0.0
    stage: str = "prepare"

    def split(self, size: int) -> list[JobChunk]:
        """The same jobs in chunks of `size`."""
        return [self.part(self.jobs[i : i + size]) for i in range(0, len(self.jobs), size)]

    def part(self, jobs: list[Job]) -> JobChunk:
        return JobChunk(
            self.point, jobs, self.policy, self.lane, self.snapshot, self.keep, self.store, self.replay, self.only,
            set(self.avoid), self.taken,
        )  # fmt: skip
