"""The scheduler: which chunk runs next, where, and what becomes of it when it fails.

Fairness is between points: a queue for each, served round-robin a chunk at a time. A chunk goes to the free worker in
which its point costs least. What fails with its worker is begun again, a bounded number of times; what fails by itself
is taken apart until it fails alone.

    failure                                     its chunk                              its worker
    the engine died, hung, lost the line        again, from its queue's front          restarted
    out of memory                               again, in halves                       restarted, where it is ours
    died with the same chunk before             again, each branch by itself           restarted
    a request the engine refuses                each branch by itself; one: failed     stays
    KV kept of plain tokens is of old weights   again, and prefilled                   stays
    the point itself refused or damaged         failed                                 stays
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Hashable
from concurrent.futures import Executor
from dataclasses import dataclass

from thaw.core.errors import Busy, EngineDied, StorageFailed, ThawError
from thaw.pool.rpc.protocol import is_out_of_memory
from thaw.pool.schedule.batch import Batch
from thaw.pool.schedule.captures import Captures
from thaw.pool.schedule.job import Job, JobChunk, KvLost
from thaw.pool.schedule.planner import Planner
from thaw.pool.schedule.point_loader import OLD_KV
from thaw.pool.workers.fleet import Fleet, responds
from thaw.pool.workers.worker import Incarnation, Worker

PATIENCE = 8
"""Chunks of other points that may overtake one that waits for room."""


@dataclass
class Verdict:
    """What becomes of a chunk that failed: the chunks that run again, and the jobs that have failed for good."""

    again: list[JobChunk]
    failed: list[tuple[Job, ThawError]]
    num_retries: int = 0


class Scheduler:
    """`changed` is shared with the fleet. One thread hands out chunks; each chunk runs on one of `threads`."""

    def __init__(
        self, fleet: Fleet, batch: Batch, planner: Planner, captures: Captures, *, changed: threading.Condition,
        threads: Executor, max_batch: int, queue_limit: int, retries: int,
    ) -> None:  # fmt: skip
        self._fleet, self._batch, self._planner, self._captures = fleet, batch, planner, captures
        self._changed, self._threads = changed, threads
        self._max_batch, self._limit, self._retries = max_batch, queue_limit, retries
        self._lanes: OrderedDict[Hashable, deque[JobChunk]] = OrderedDict()
        self.running: set[JobChunk] = set()
        """Taken from its lane, until it has ended or lies in a lane again: a chunk that is not answered is always in
        one of the two, so whoever looks for work (`pause`, `stop`, `close`, a drain) finds all of it under the lock."""
        self.num_rounds = self.num_branches = self.num_retries = 0
        self._paused = False
        self._closing = False
        self._thread = threading.Thread(target=self._hand_out, name="thaw-pool", daemon=True)
        self._thread.start()

    # -- in

    def submit(self, chunks: list[JobChunk], *, block: bool = True, timeout: float | None = None) -> None:
        """Queue a round's chunks. Waits while the queue is full (back-pressure). Raises `Busy` when it may not."""
        count = sum(len(chunk.jobs) for chunk in chunks)
        with self._changed:

            def room() -> bool:
                return self._closing or self.waiting + count <= self._limit or not self._lanes

            if not room() and not (block and self._changed.wait_for(room, timeout)):
                raise Busy(f"{self.waiting} branches wait, the pool's limit is {self._limit}; try again later")
            if self._closing:
                raise EngineDied("the pool is closed; make another one")
            for chunk in chunks:
                self._lanes.setdefault(chunk.lane, deque()).append(chunk)
            self.num_rounds += 1
            self.num_branches += count
            self._changed.notify_all()

    def stop(self, jobs: list[Job], why: str) -> None:
        """End jobs: those that wait at once, those that run at the next step boundary. Ended ones stay as they are."""
        closing: list[Job] = []
        with self._changed:  # what is in no lane runs, or has ended: nothing moves between the two without this lock
            waiting = {id(job) for lane in self._lanes.values() for chunk in lane for job in chunk.jobs}
            for job in jobs:
                if not job.ended and not job.stop:
                    job.stop = why
                    if id(job) not in waiting:
                        closing.append(job)
            gone = [job for job in jobs if id(job) in waiting and job.stop]
            for lane in self._lanes.values():
                for chunk in lane:
                    chunk.jobs = [job for job in chunk.jobs if not job.stop]
            self._changed.notify_all()
        for job in gone:
            job.end_stopped()
        # A child may be born only now: its batch sets it and looks at `stop` after that, so one of the two closes it.
        for job in closing:
            if job.child is not None:
                job.child[0].forget(job.child[1])

    @property
    def waiting(self) -> int:
        return sum(len(chunk.jobs) for lane in self._lanes.values() for chunk in lane)

    def jobs_under_way(self) -> list[Job]:
        with self._changed:
            queued = [job for lane in self._lanes.values() for chunk in lane for job in chunk.jobs]
            return queued + [job for chunk in self.running for job in chunk.jobs]

    def chunks_under_way(self) -> list[JobChunk]:
        with self._changed:
            return [chunk for lane in self._lanes.values() for chunk in lane] + list(self.running)

    # -- pause and end

    def pause(self) -> None:
        """Hand out nothing more, and wait until nothing runs."""
        with self._changed:
            self._paused = True
            self._changed.wait_for(lambda: not self.running)

    def go_on(self) -> None:
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def close(self) -> None:
        """End everything: what waits fails now, what runs when its engine ends."""
        with self._changed:  # a chunk that is judged just then finds the pool closed when it comes back (`_requeue`)
            self._closing = True
            waiting = [chunk for lane in self._lanes.values() for chunk in lane]
            self._lanes.clear()
            self._changed.notify_all()
        for chunk in waiting:
            self._fail(chunk, EngineDied("the pool was closed while this waited"))
        self._thread.join()

    # -- handing out

    def _hand_out(self) -> None:
        while self._hand_out_one():
            pass

    def _hand_out_one(self) -> bool:
        """Nothing of a chunk stays here between two: results are to go when their holders let go of them."""
        lost: list[JobChunk] = []
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._next() is not None or self._orphans())
            if self._closing:
                return False
            lost = self._orphans()
            for chunk in lost:
                self._lanes[chunk.lane].remove(chunk)
            found = self._next()
            if found is not None:
                self._take(*found)
        for chunk in lost:
            self._fail(chunk, self._hopeless())
        return True

    def _next(self) -> tuple[JobChunk, Worker, Incarnation] | None:
        """The first lane whose first chunk has a free worker, and the cheapest of those. Under the lock."""
        for lane in list(self._lanes):
            queue = self._lanes[lane]
            while queue and not queue[0].jobs:  # all were stopped
                queue.popleft()
            if not queue:
                del self._lanes[lane]
                continue
            where = None if self._paused else self._place(queue[0])
            if where is not None:
                return (queue[0], *where)
            if queue[0].passed >= PATIENCE:
                return None  # a large chunk waits for an idle worker: no small ones before it any more
        return None

    def _place(self, chunk: JobChunk) -> tuple[Worker, Incarnation] | None:
        free = [
            (worker, life)
            for worker, life in self._fleet.ready()
            if (worker.running == 0 or worker.running + len(chunk.jobs) <= self._max_batch)
            and chunk.only in (None, worker.name)
        ]
        if not free:
            return None
        taken = chunk.taken or set()
        good = [pair for pair in free if pair[0].name not in chunk.avoid and pair[0].name not in taken]
        good = good or [pair for pair in free if pair[0].name not in chunk.avoid] or free
        # What this sees may have changed when the batch begins. It costs a load more then, for the loader looks again.
        point = self._captures.now(chunk.point)
        return min(good, key=lambda pair: (self._planner.cost(point, pair[1]), pair[0].running))

    def _take(self, chunk: JobChunk, worker: Worker, life: Incarnation) -> None:
        """Start a chunk; its lane goes to the end of the round. Under the lock."""
        for lane, before in self._lanes.items():
            if lane == chunk.lane:
                break
            before[0].passed += 1
        queue = self._lanes.pop(chunk.lane)
        queue.popleft()
        if queue:
            self._lanes[chunk.lane] = queue
        if chunk.taken is not None:
            chunk.taken.add(worker.name)
        chunk.worker, chunk.life, chunk.progress = worker, life, time.perf_counter()
        worker.running += len(chunk.jobs)
        self.running.add(chunk)
        self._changed.notify_all()
        # The life may end from here on. It is named with the chunk, so that the one after it is not blamed.
        self._threads.submit(self._run, chunk, worker, life, len(chunk.jobs))

    def _stuck(self) -> bool:
        return bool(self._lanes) and not self.running and self._fleet.hopeless()

    def _orphans(self) -> list[JobChunk]:
        """Chunks that nobody will ever run: no worker is left, or not the only one they may run in. Under the lock."""
        if self._stuck():
            return [chunk for lane in self._lanes.values() for chunk in lane]
        gone = {worker.name for worker in self._fleet.workers if worker.state == "gone"}
        return [chunk for lane in self._lanes.values() for chunk in lane if chunk.only in gone]

    def _hopeless(self) -> EngineDied:
        last = next((w.last_error for w in self._fleet.workers if w.last_error), "all were drained")
        return EngineDied(f"the pool has no worker left: {last}. Look into its log, or add a worker")

    # -- running

    def _run(self, chunk: JobChunk, worker: Worker, life: Incarnation, size: int) -> None:
        for job in chunk.jobs:
            job.attempts += 1
        try:
            if self._closing:  # it was taken, and the pool closed before a thread was free for it
                raise EngineDied("the pool was closed while this waited")
            results = self._batch.run(chunk, life)
        except BaseException as error:  # noqa: BLE001 - judged, and given to the jobs
            self._failed(chunk, worker, life, size, error)
        else:
            with self._changed:  # the next chunk may run in it before these results are heard of
                self._fleet.worked(worker, size)
                self._leave(chunk, worker, size)
            for job, result in zip(chunk.jobs, results, strict=True):
                if job.stop:  # said after its last step: its result is dropped, and its session goes with it
                    job.end_stopped()
                else:
                    job.round.settle(result)

    def _failed(self, chunk: JobChunk, worker: Worker, life: Incarnation, size: int, error: BaseException) -> None:
        try:
            verdict = self._judge(chunk, worker, life, error)
        except BaseException as other:  # noqa: BLE001 - whatever it is, no branch stays without an answer
            verdict = Verdict([], [(job, _as_ours(other)) for job in chunk.jobs])
        # From running into the lane in one step: a drain that comes now finds its point in the one or in the other.
        with self._changed:
            verdict.failed += self._requeue(verdict.again)
            self.num_retries += verdict.num_retries
            self._leave(chunk, worker, size)
        for job, why in verdict.failed:
            self._end(job, why)

    def _leave(self, chunk: JobChunk, worker: Worker, size: int) -> None:
        """Under the lock."""
        worker.running -= size
        self.running.discard(chunk)
        self._changed.notify_all()

    def _judge(self, chunk: JobChunk, worker: Worker, life: Incarnation, error: BaseException) -> Verdict:
        """See the table above. Changes nothing in the queues."""
        if is_out_of_memory(error):
            if self._fleet.restarts:
                self._fleet.failed(worker, life, error)
            return self._again(chunk, error, pieces=2, avoid=None)
        if isinstance(error, KvLost):
            return Verdict([], [(job, error) for job in chunk.jobs])
        if isinstance(error, (EngineDied, Busy, StorageFailed)) or not isinstance(error, ThawError):
            if not responds(life):
                self._fleet.failed(worker, life, error)
            died_before = any(job.attempts > 1 for job in chunk.jobs)
            return self._again(chunk, error, pieces=len(chunk.jobs) if died_before else 1, avoid=worker.name)
        if isinstance(error, OLD_KV) and chunk.point.plain and self._may_try_again(chunk):
            self._batch.forget(chunk, life)
            return self._again(chunk, error, pieces=1, avoid=None)
        if chunk.stage == "generate" and len(chunk.jobs) > 1:
            return Verdict(chunk.split(1), [])
        return Verdict([], [(job, error) for job in chunk.jobs])

    def _may_try_again(self, chunk: JobChunk) -> bool:
        return all(job.attempts <= self._retries for job in chunk.jobs)

    def _again(self, chunk: JobChunk, error: BaseException, *, pieces: int, avoid: str | None) -> Verdict:
        """What may be tried again runs again; the others fail with what happened last."""
        left = [job for job in chunk.jobs if job.attempts <= self._retries]
        spent = [job for job in chunk.jobs if job.attempts > self._retries]
        tries = "the branch was given up after {} attempts in as many lives of workers: {}"
        failed: list[tuple[Job, ThawError]] = [(job, EngineDied(tries.format(job.attempts, error))) for job in spent]
        if avoid is not None:
            chunk.avoid.add(avoid)
        again = chunk.part(left).split(-(-len(left) // pieces)) if left else []
        return Verdict(again, failed, num_retries=len(left))

    def _requeue(self, chunks: list[JobChunk]) -> list[tuple[Job, ThawError]]:
        """To the front of its lane: it has waited already. Under the lock. Gives back the jobs that have ended: they
        were stopped while their chunk was judged, or the pool was closed."""
        closed = EngineDied("the pool was closed while this was under way")
        ended: list[tuple[Job, ThawError]] = []
        for chunk in reversed(chunks):
            ended += [(job, closed) for job in chunk.jobs if job.stop or self._closing]
            chunk.jobs = [] if self._closing else [job for job in chunk.jobs if not job.stop]
            if chunk.jobs:
                self._lanes.setdefault(chunk.lane, deque()).appendleft(chunk)
        return ended

    def _fail(self, chunk: JobChunk, error: ThawError) -> None:
        for job in chunk.jobs:
            self._end(job, error)

    @staticmethod
    def _end(job: Job, error: ThawError) -> None:
        if job.stop:
            job.end_stopped()
        else:
            job.fail(error)


def _as_ours(error: BaseException) -> ThawError:
    return error if isinstance(error, ThawError) else EngineDied(f"{type(error).__name__}: {error}")
