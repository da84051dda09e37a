"""The workers' side of the connector: KV between vLLM's blocks, the arena and packs, on this rank's blobs.

Jobs run in the order the scheduler's side gave them, on the runner's thread before a step's forward pass (copies in
memory), or handed to a thread (packs, big loads). A job that fails costs its own request or command, never the engine.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial, singledispatchmethod
from pathlib import Path
from typing import TypeAlias

from thaw.core.errors import Busy, NotFound, NotKept, StaleSession, StorageFailed, ThawError
from thaw.engines.served.budget import GUEST, Caller, Room
from thaw.engines.served.guard import guarded
from thaw.engines.served.mailbox import Mailbox
from thaw.engines.served.protocol import Answer, WorkerFacts
from thaw.engines.served.worker.host_cache import HostCache, HostRecord, Piece, Tensors
from thaw.engines.served.worker.pack_io import PackIO
from thaw.engines.served.worker.rank_groups import RankGroups
from thaw.engines.served.worker.weights_probe import WeightsSample
from thaw.engines.vllm import jobs
from thaw.engines.vllm.jobs import Job
from thaw.engines.vllm.settings import VllmSettings
from thaw.engines.vllm.worker.copier import make_copier
from thaw.engines.vllm.worker.layout.base import KVLayout
from thaw.engines.vllm.worker.layout.states import StatePages
from thaw.engines.vllm.worker.step_loads import StepLoads

log = logging.getLogger("thaw.vllm")
_Asked: TypeAlias = jobs.ReadPlan | jobs.WriteRecord | jobs.LookAtWeights | jobs.Count | jobs.Watch
"""Jobs that a client sent a command for."""


class WorkerSide:
    def __init__(
        self,
        layouts: Sequence[KVLayout],
        facts: WorkerFacts,
        settings: VllmSettings,
        mail: Mailbox,
        weights: WeightsSample | None,
        tables: Sequence[int] = (),
        states: StatePages | None = None,
    ) -> None:
        """`tables`: for each layout the number of its block table among a job's (default: its own number)."""
        self._facts, self._mail, self._weights = facts, mail, weights
        self._table_of = tuple(tables) or tuple(range(len(layouts)))
        groups = RankGroups(facts.groups, facts.rank, facts.world_size)
        self._windows = groups.windows()
        groups.require([layout.num_kv_heads for layout in layouts])
        spill = Path(settings.spill) if settings.spill else None
        self._arena = HostCache(
            settings.arena_nbytes, spill, groups, spill_nbytes=settings.spill_nbytes, shares=settings.shares(),
            pinned=layouts[0].on_its_own, shared=settings.readers > 0, early_states=jobs.RECENT_STATES,
        )  # fmt: skip
        self._packing = PackIO(groups, mail, self._arena, interior=settings.interior, readers=settings.readers)
        self._copier = make_copier(layouts, self._arena)
        self._states = states
        self._unmapped = False
        self._state_copies = 0
        self._records: dict[str, HostRecord] = {}
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="thaw-io")
        self._lock = threading.Lock()
        self._reading: set[str] = set()
        """Records that are read from packs, and that nobody has let go of since."""
        self._sent: set[str] = set()
        self._received: set[str] = set()
        self._invalid: set[int] = set()
        self._lost: set[str] = set()
        self._step_loads = StepLoads()
        self._epoch: int | None = None
        self._watching = True
        self._tight: dict[Caller, Room] = {}

    # -- called by the connector

    def run(self, todo: Sequence[Job]) -> None:
        """A step's jobs. The weights are looked at once a step, when a job needs to know."""
        self._epoch = None
        if self._states is not None:
            with self._lock:
                self._step_loads.begin(job.request for job in todo if isinstance(job, jobs.Load) and job.background)
        for job in todo:
            guarded(partial(self._do_mapped, job), partial(self._failed, job))
        self._tell_what_is_left()

    def _do_mapped(self, job: Job) -> None:
        """No job while the KV cache is unmapped: what lies at its addresses is nobody's."""
        if self._unmapped:
            raise Busy("this vLLM is asleep, and its KV cache is gone until it wakes up")
        self._do(job)

    def let_go(self) -> None:
        """The KV cache is about to be unmapped: wait for what is on its way, and keep nothing that was made of it. What
        is in the arena stays. Calling twice is fine."""
        if not self._unmapped:
            self._copier.settle()
            self._copier.close()
            self._unmapped = True
            del self._copier

    def take_back(self, layouts: Sequence[KVLayout], states: StatePages | None) -> None:
        """It is mapped again, empty, at the same addresses. Calling twice is fine."""
        if self._unmapped:
            self._copier, self._states = make_copier(layouts, self._arena), states
            self._unmapped = False

    def _tell_what_is_left(self) -> None:
        """The scheduler's side refuses what could not be kept, before it is computed."""
        tight = self._arena.tight()
        if tight != self._tight:
            self._tight = tight
            self._mail.post_tight(self._facts.rank, tight)

    def finished(self) -> tuple[set[str], set[str], set[str]]:
        """Requests whose blocks may be freed, requests whose load is over, and those of them whose load has failed and
        that are told by their names, since last asked."""
        with self._lock:
            sent, self._sent = self._sent, set()
            received, self._received = self._received, set()
            lost, self._lost = self._lost, set()
        return sent, received, lost

    def keep_states(self, todo: Sequence[jobs.KeepState]) -> None:
        """After a step's forward pass: the states that it has left."""
        for job in () if self._unmapped else todo:
            guarded(partial(self._keep_state, job), partial(self._no_state, job))

    def _keep_state(self, job: jobs.KeepState) -> None:
        assert self._states is not None
        record = self._get(job.record)
        if job.lasting:
            self._settle_state(record, job.num_kv, job.state_blocks)
            return
        shape = (self._states.group.num_layers, self._states.nbytes)
        oldest = [job.num_kv, *record.recent][: max(1, len(record.recent) - jobs.RECENT_STATES + 2)]
        spare = [record.recent.pop(token) for token in oldest if token in record.recent]
        raw = spare[0] if spare else self._arena.allocate_raw(shape, record.caller)
        self._states.read(job.state_blocks, raw)
        self._state_copies += 1
        record.recent[job.num_kv] = raw

    def _no_state(self, job: jobs.KeepState, error: ThawError) -> None:
        """Whoever continues from it hears that it is not there."""
        log.warning("thaw: the state after %d tokens is not kept (%s): %s", job.num_kv, error.kind, error)

    def invalid_blocks(self) -> set[int]:
        with self._lock:
            out, self._invalid = self._invalid, set()
        return out

    def metrics(self) -> dict[str, int]:
        """Counts that every worker has its own of."""
        return {
            "arena_nbytes": self._arena.used,
            "spilled_nbytes": self._arena.spilled,
            "state_copies": self._state_copies,
            **self._packing.counts(),
        }

    def close(self) -> None:
        self._packing.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
        if not self._unmapped:
            self._copier.close()

    # -- jobs

    @singledispatchmethod
    def _do(self, job: Job) -> None:
        """The table of jobs: a handler is registered for each kind."""
        raise NotImplementedError(f"no worker knows what to do for a job {type(job).__name__}")

    def _failed(self, job: Job, error: ThawError) -> None:
        log.warning("thaw: %s failed (%s): %s", type(job).__name__, error.kind, error)
        self._tell(job, error)

    @singledispatchmethod
    def _tell(self, job: Job, error: ThawError) -> None:
        """The table of failures: whoever waits for a job is told."""
        raise NotImplementedError(f"nobody knows who waits for a job {type(job).__name__}") from error

    @_tell.register(jobs.Fail)
    @_tell.register(jobs.Forget)
    def _tell_nobody(self, job: jobs.Fail | jobs.Forget, error: ThawError) -> None:
        """Nobody waits for these."""

    @_tell.register(jobs.ReadPlan)
    @_tell.register(jobs.WriteRecord)
    @_tell.register(jobs.LookAtWeights)
    @_tell.register(jobs.Count)
    @_tell.register(jobs.Watch)
    def _tell_client(self, job: _Asked, error: ThawError) -> None:
        self._answer(job.name, Answer(kind=error.kind, error=str(error)))

    @_tell.register(jobs.Load)
    @_tell.register(jobs.CheckRecord)
    def _tell_request(self, job: jobs.Load | jobs.CheckRecord, error: ThawError) -> None:
        self._answer(job.name, Answer(kind=error.kind, error=str(error)))
        self._fail(job.request, job.tables, background=isinstance(job, jobs.Load) and job.background)

    @_tell.register
    def _tell_derived(self, job: jobs.ForkRecord, error: ThawError) -> None:
        self._break(job.record, job.caller, error)

    @_tell.register
    def _tell_synced(self, job: jobs.SaveBlocks, error: ThawError) -> None:
        self._break(job.record, self._caller_of(job.record), error)
        if job.finished is not None:
            self._let_go_later(job.finished)

    def _break(self, name: str, caller: Caller, error: ThawError) -> None:
        """Whoever continues from the record is told why it has no KV."""
        epoch = 0 if self._weights is None else self._weights.epoch
        self._records[name] = HostRecord((), epoch, broken=str(error), caller=caller)

    @_do.register
    def _derive(self, job: jobs.ForkRecord) -> None:
        if job.source is None:
            self._records[job.record] = HostRecord((), self._now(), caller=job.caller)
            return
        source = self._get(job.source)
        if source.num_kv < job.num_kv and source.epoch == self._now():
            raise StorageFailed(f"the session's KV could not be kept: {source.broken or 'it is incomplete'}")
        self._records[job.record] = self._upto(source, job.num_kv, job.caller)

    def _upto(self, record: HostRecord, num_kv: int, caller: Caller | None = None) -> HostRecord:
        """A record of the first `num_kv` tokens, with the state after them where the model keeps states."""
        if self._states is not None and num_kv:
            self._settle_state(record, num_kv)
        return record.upto(num_kv, caller)

    def _settle_state(self, record: HostRecord, num_kv: int, blocks: Sequence[int] = ()) -> None:
        """The state after `num_kv` tokens, which may be that of a recent step or lie in `blocks`, as one that stays.
        Raises `StorageFailed` where there is none."""
        assert self._states is not None
        if num_kv in record.points:
            return
        raw = record.recent.get(num_kv)
        if raw is None and not blocks:
            raise StorageFailed(f"the state after {num_kv} tokens could not be kept: {record.broken or 'no room'}")
        blobs = self._arena.allocate_states(record.caller)
        if raw is not None:
            self._states.blobs(raw, blobs)
        else:
            self._states.save(blocks, blobs)
            self._state_copies += 1
        record.points[num_kv] = blobs

    @_do.register
    def _sync(self, job: jobs.SaveBlocks) -> None:
        """What the record lacks, out of the blocks. On the runner's thread: earlier steps have written it."""
        record = self._get(job.record)
        if record.epoch != self._now():
            record.broken = "the weights changed while it was computed"
        elif not record.broken and job.num_kv > record.num_kv:
            pieces = self._copier.save(self._each(job.tables), record.num_kv, job.num_kv, record.caller)
            whole = self._arena.joined((*record.pieces, *pieces), record.caller)
            if self._states is not None:
                self._settle_state(record, job.num_kv, job.state_blocks)
            self._records[job.record] = HostRecord(
                whole, record.epoch, caller=record.caller, points=record.points, recent=record.recent
            )
        if job.over:
            self._get(job.record).recent.clear()
        if job.now:
            self._get(job.record).wait(0, job.num_kv)
        if job.finished is not None:
            self._let_go_later(job.finished)

    def _let_go_later(self, request: str) -> None:
        """Once what was begun is copied. While the KV cache is unmapped nothing is."""
        if self._unmapped:
            self._let_go(request)
        else:
            self._copier.after_saves(partial(self._let_go, request))

    def _let_go(self, request: str) -> None:
        with self._lock:
            self._sent.add(request)

    @_do.register
    def _load(self, job: jobs.Load) -> None:
        record = self._usable(job.record)
        if record.num_kv < job.stop:
            raise StorageFailed(f"the session has KV for {record.num_kv} tokens; {job.stop} were wanted")
        self._require_windows(record, job.stop)
        if not job.background:
            self._copier.load(self._each(job.tables), record, job.start, job.stop)
            return

        since = self._copier.point()

        state = self._state_to_load(record, job.stop)

        def work() -> None:
            self._copier.load_aside(self._each(job.tables), record, job.start, job.stop, since)
            if self._states is not None:
                self._copier.write_aside(partial(self._states.write, state, job.state_blocks), since)
            self._end_load(job.request)

        self._copier.loads.submit(guarded, work, partial(self._failed, job))

    def _state_to_load(self, record: HostRecord, num_kv: int) -> Tensors:
        if self._states is None:
            return ()
        self._settle_state(record, num_kv)
        return record.points[num_kv]

    def _each(self, tables: jobs.Tables) -> jobs.Tables:
        """The block table of each layout: several may have one of vLLM's groups in common."""
        return tuple(tables[at] for at in self._table_of)

    def _require_windows(self, record: HostRecord, num_kv: int) -> None:
        """Raise `NotKept` unless all is there that is needed to go on after `num_kv` tokens: a record that came from a
        snapshot has the last tokens of a window alone, and what else lies in its blocks is not the session's."""
        for strip, group in self._windows:
            covered, first = group.covers(num_kv), record.first(strip, num_kv)
            if covered and first > covered.start:
                raise NotKept(
                    f"after {num_kv} tokens the group {group.name} needs tokens {covered.start} to "
                    f"{covered.stop - 1}; the engine has it from token {first} on"
                )

    @_do.register
    def _check_record(self, job: jobs.CheckRecord) -> None:
        self._require_windows(self._usable(job.record), job.num_kv)

    @_do.register
    def _fail_load(self, job: jobs.Fail) -> None:
        self._fail(job.request, job.tables, background=job.background)

    def _fail(self, request: str, tables: jobs.Tables, *, background: bool) -> None:
        """Where a model keeps states its blocks cannot say whose they are, and naming one ends the engine: the request
        is named then, whose load is always in the background."""
        if self._states is not None:
            self._end_load(request, lost=True)
            return
        with self._lock:
            self._invalid.update(*tables)
            if background:
                self._received.add(request)

    def _end_load(self, request: str, *, lost: bool = False) -> None:
        with self._lock:
            received, failed = self._step_loads.end(request, lost=lost)
            self._received |= received
            self._lost |= failed

    @_do.register
    def _look(self, job: jobs.LookAtWeights) -> None:
        epoch = self._now()
        if not job.digest:
            self._answer(job.name, Answer(epoch=epoch))
            return
        weights = self._weights
        if weights is None:
            raise NotFound("the model was not found in this worker; its weights cannot be hashed")
        self._in_thread(job, lambda: self._answer(job.name, Answer(epoch=epoch, digest=weights.digest())))

    @_do.register
    def _count(self, job: jobs.Count) -> None:
        self._answer(job.name, Answer(counts={**job.counts, **self.metrics()}))

    @_do.register
    def _watch(self, job: jobs.Watch) -> None:
        self._watching = job.on
        self._answer(job.name, Answer())

    @_do.register
    def _forget(self, job: jobs.Forget) -> None:
        for name in job.records:
            with self._lock:
                self._reading.discard(name)
                self._records.pop(name, None)

    # -- packs, on a thread

    @_do.register
    def _read_plan(self, job: jobs.ReadPlan) -> None:
        # Taken now: while the thread reads, the source may end.
        before = self._upto(self._usable(job.source), job.shared) if job.source is not None else None
        with self._lock:
            self._reading.add(job.record)
        self._in_thread(job, partial(self._read, job, self._now(), () if before is None else before.pieces))

    @_do.register
    def _write_record(self, job: jobs.WriteRecord) -> None:
        # Cut now: while the thread writes, later steps put a longer record in this one's place.
        self._in_thread(job, partial(self._write, job, self._upto(self._usable(job.record), job.num_kv)))

    def _in_thread(self, job: Job, work: Callable[[], None]) -> None:
        self._threads.submit(guarded, work, partial(self._failed, job))

    def _read(self, job: jobs.ReadPlan, epoch: int, before: tuple[Piece, ...]) -> None:
        started = time.perf_counter()
        try:
            plan = self._mail.plan(job.name)
            # Steps go on meanwhile, on the runner's thread. They do not find the record before it is whole, and not at
            # all where its last client has gone.
            found = self._packing.read(plan, job.caller, job.shared)
            with self._lock:
                if job.record in self._reading:
                    pieces = (*before, *found.pieces)
                    record = HostRecord(pieces, epoch, caller=job.caller, points=found.points)
                    self._records[job.record] = record
        finally:
            with self._lock:
                self._reading.discard(job.record)
        seconds = time.perf_counter() - started
        stages = {"read": found.seconds, "fill": seconds}
        answer = Answer(num_kv=plan.num_kv, nbytes=found.nbytes, epoch=epoch, seconds=seconds, stages_s=stages)
        self._answer(job.name, answer)

    def _write(self, job: jobs.WriteRecord, record: HostRecord) -> None:
        pack = job.packs[self._facts.rank]
        answer = self._packing.write(
            record, job.base, job.num_kv, store=job.store, pack=pack, num_tokens=job.num_tokens
        )
        self._answer(job.name, answer)

    # -- records

    def _get(self, name: str) -> HostRecord:
        record = self._records.get(name)
        if record is None:
            raise NotFound("the engine has let go of this session")
        return record

    def _caller_of(self, name: str) -> Caller:
        record = self._records.get(name)
        return GUEST if record is None else record.caller

    def _usable(self, name: str) -> HostRecord:
        record = self._get(name)
        now = self._now()
        if record.broken and record.epoch == now:
            raise StorageFailed(f"the session's KV could not be kept: {record.broken}")
        if record.epoch != now:
            raise StaleSession(
                f"the session's KV is of weights epoch {record.epoch}; the engine's weights changed (epoch {now}). "
                f"{StaleSession.way_out}"
            )
        return record

    def _now(self) -> int:
        if self._epoch is None:
            self._epoch = self._look_or_not()
        return self._epoch

    def _look_or_not(self) -> int:
        if self._weights is None:
            return 0
        return self._weights.look() if self._watching else self._weights.epoch

    def _answer(self, name: str, answer: Answer) -> None:
        self._mail.answer(name, self._facts.rank, answer)
