"""Commands: requests that compute nothing. Here is what each one starts; its answer comes by mail.

They run between two steps. What takes long, reading and writing packs, goes on in threads of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import singledispatchmethod
from typing import TYPE_CHECKING

import torch

from thaw.core.errors import InvalidRequest, NotFound, TooLong, Unsupported
from thaw.engines.base import HydratePlan
from thaw.engines.served import protocol
from thaw.engines.served.budget import GUEST, MAX_COMMANDS, Budget, Caller, Shares
from thaw.engines.served.guard import described
from thaw.engines.served.protocol import Answer
from thaw.engines.served.worker.host_cache import HostRecord
from thaw.engines.served.worker.pack_io import PackIO
from thaw.engines.sglang.scheduler.records import RankRecord
from thaw.engines.sglang.scheduler.weights_epoch import require_usable

if TYPE_CHECKING:
    from thaw.engines.sglang.scheduler.scheduler import RankSide


class RankCommands:
    """Each caller has its share of `MAX_COMMANDS` that threads work at, or have yet to begin."""

    def __init__(self, side: RankSide, packing: PackIO, shares: Shares) -> None:
        self._side, self._packing = side, packing
        self._budget, self._lock = Budget("held commands", MAX_COMMANDS, shares), threading.Lock()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="thaw-io")

    def begin(self, message: protocol.Command) -> None:
        """Raises what refuses it, on all ranks alike."""
        self._side.mail.require_granted(message)
        caller = message.caller or GUEST
        self._side.agreement.together(lambda: self._require_room(caller))
        self._start(message)

    @singledispatchmethod
    def _start(self, message: protocol.Command) -> None:
        """The table of commands: a handler is registered for each kind but `Hello`, which is answered before it comes
        here."""
        raise NotImplementedError(f"no rank knows how to start a command {type(message).__name__}")

    @_start.register
    def _get_stats(self, message: protocol.GetStats) -> None:
        self._side.answer(message.id, Answer(counts=self._counts()))

    @_start.register
    def _unpin(self, message: protocol.Unpin) -> None:
        self._side.pins.reset()
        self._side.say(message.id, Answer())

    @_start.register
    def _end_run(self, message: protocol.EndRun) -> None:
        raise Unsupported("requests of models with recurrent layers alone are ended so, and SGLang runs none with thaw")

    @_start.register
    def _switch(self, message: protocol.Switch) -> None:
        side = self._side
        side.on, side.epochs.watching = message.on, message.watch_weights
        if not message.on:
            side.pins.reset()
        side.answer(message.id, Answer())

    def _require_room(self, caller: Caller) -> None:
        with self._lock:
            self._budget.require(caller)

    @_start.register
    def _fill(self, message: protocol.Fill) -> None:
        side = self._side
        caller = message.caller or GUEST
        plan = side.agreement.together(lambda: side.mail.plan(message.id))
        before, shared = self._shared(message, plan), message.num_kv if message.source is not None else 0
        side.require_room(message.record, caller, plan.num_kv - shared)
        if plan.num_kv > side.engine.max_model_len:
            raise TooLong(f"{plan.num_kv} tokens exceed the engine's {side.engine.max_model_len}")
        epoch, started = side.epochs.now(), time.perf_counter()
        chain = side.contents.fresh(plan.num_kv - shared)
        if before is not None:
            chain = torch.cat([before.chain[:shared], chain])
        there = before.kept.upto(shared).pieces if before is not None else ()
        side.counters["hydrates"] += 1
        # The record is there at once, broken until it is whole: who is quicker than the disk is refused, not served.
        kept = HostRecord((), epoch, broken="it is not read yet", caller=caller)
        side.records.keep(message.record, RankRecord(list(plan.tokens[: plan.num_kv]), kept, chain, caller=caller))

        def read() -> Answer:
            found = self._packing.read(plan, caller, shared)
            kept.pieces, kept.points = (*there, *found.pieces), found.points
            kept.broken = ""
            seconds = time.perf_counter() - started
            stages = {"read": found.seconds, "fill": seconds}
            return Answer(num_kv=plan.num_kv, nbytes=found.nbytes, epoch=epoch, seconds=seconds, stages_s=stages)

        self._in_thread(message, read)

    def _shared(self, message: protocol.Fill, plan: HydratePlan) -> RankRecord | None:
        """The record that has the plan's first tokens. Raises what refuses to take them from there, on all ranks
        alike."""
        if message.source is None:
            return None
        side, want = self._side, message.num_kv
        source, epoch = side.records.known(message.source), side.epochs.now()

        def look() -> None:
            require_usable(source, epoch)
            ready = side.catch_up(source, want)
            if ready < want or tuple(source.tokens[:want]) != plan.tokens[:want]:
                raise InvalidRequest(f"fill: the session beside has other tokens than the plan's first {want}")

        side.agreement.together(look)
        side.records.touch(message.source)
        return source

    @_start.register
    def _write(self, message: protocol.Write) -> None:
        side = self._side
        record = side.records.known(message.record)
        started, epoch = time.perf_counter(), side.epochs.now()
        num_kv = message.end(self._num_ready(message, record, epoch), side.facts.world_size)
        run = record.live
        num_tokens = len(run.tokens() if run is not None and run.req is not None else record.tokens)
        side.counters["captures"] += 1
        taken, cut_s = record.kept.upto(num_kv), time.perf_counter() - started
        pack = message.packs[side.facts.rank]

        def write() -> Answer:
            answer = self._packing.write(
                taken, message.base, num_kv, store=message.store, pack=pack, num_tokens=num_tokens
            )
            answer.stages_s["cut"] = cut_s
            return answer

        self._in_thread(message, write)

    def _num_ready(self, message: protocol.Write, record: RankRecord, epoch: int) -> int:
        """How many of the record's tokens every rank has."""
        side = self._side

        def look() -> int:
            side.mail.mount(message.store)
            require_usable(record, epoch)
            ready = side.catch_up(record, message.num_kv)
            require_usable(record, epoch)
            return ready

        return side.agreement.least(side.agreement.together(look))

    @_start.register
    def _pin(self, message: protocol.Pin) -> None:
        self._side.say(message.id, self._pinned(message))

    def _pinned(self, message: protocol.Pin) -> Answer:
        side = self._side
        side.pins.unpin(message.record)
        if message.seconds == 0:
            return Answer()
        num_tokens, seconds = side.pins.pin(message.record, side.records.known(message.record), message.seconds)
        return Answer(num_kv=num_tokens, seconds=seconds)

    @_start.register
    def _look(self, message: protocol.Look) -> None:
        side = self._side
        epoch = side.epochs.now()
        if not message.digest:
            side.answer(message.id, Answer(epoch=epoch))
            return
        weights = side.epochs.weights
        if weights is None:
            raise NotFound("the model was not found in this process; its weights cannot be hashed")
        self._in_thread(message, lambda: Answer(epoch=epoch, digest=weights.digest()))

    def _counts(self) -> dict[str, int]:
        side = self._side
        return {
            "records": len(side.records),
            "running": len(side.runs),
            "pinned_tokens": side.pins.num_tokens(),
            **side.room(),
            **side.counters,
            "arena_nbytes": side.arena.used,
            "spilled_nbytes": side.arena.spilled,
            **self._packing.counts(),
        }

    def _in_thread(self, message: protocol.Command, work: Callable[[], Answer]) -> None:
        caller = message.caller or GUEST
        with self._lock:
            self._budget.take(caller)

        def run() -> None:
            try:
                answer = work()
            except Exception as error:  # noqa: BLE001 - the answer says so
                failed = described(error)
                answer = Answer(kind=failed.kind, error=str(failed))
            with self._lock:
                self._budget.give_back(caller)
            self._side.answer(message.id, answer)

        self._threads.submit(run)
