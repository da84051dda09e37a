"""thaw inside SGLang: what every session's record holds, and what is done for a request of thaw's.

It runs in SGLang's scheduler process, between steps. A *record* is a session's KV in this process's arena: append-only,
named by the client, cut and copied by reference. A request names the record it continues from and the one it extends;
when it ends, or SGLang takes its memory away, what it computed is copied into that record, and SGLang's cache may evict
it.

Tokens and bytes. SGLang's tree finds KV by tokens, salted by lineage. Two siblings that sampled the same tokens in
batches of different shape have equal tokens and unequal bits. So the content of every slot carries a number here
(`chain` of a record, `SlotContents` of the slots): before a request is admitted, what the tree would give it must be
the record's own, else it gets a salt of its own and loads everything; and nothing goes into the tree over another's
bits.

Every rank has one of these, with its own heads. They hold the same records with the same numbers; what may differ is
whether a piece of work succeeded, and that is agreed before it matters (`rank_consensus`).
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from thaw.core.errors import Busy, InvalidRequest, ThawError, Unsupported
from thaw.core.prefix import common_prefix
from thaw.engines.served import protocol
from thaw.engines.served.budget import GUEST, Caller
from thaw.engines.served.guard import guarded, unheard
from thaw.engines.served.late_groups import LateGroup, require_kept
from thaw.engines.served.mailbox import SCHEDULER, Mailbox
from thaw.engines.served.protocol import Answer, EngineFacts, WorkerFacts
from thaw.engines.served.sampling_extra import SamplingExtra
from thaw.engines.served.scheduler.records import Records
from thaw.engines.served.worker.host_cache import HostCache, HostRecord, Piece
from thaw.engines.served.worker.pack_io import PackIO
from thaw.engines.served.worker.rank_groups import RankGroups
from thaw.engines.served.worker.weights_probe import WeightsSample
from thaw.engines.sglang.scheduler.commands import RankCommands
from thaw.engines.sglang.scheduler.content_ids import SlotContents, empty_chain, equal_length
from thaw.engines.sglang.scheduler.kv_pool import StripPool
from thaw.engines.sglang.scheduler.pins import RadixPins, unbound
from thaw.engines.sglang.scheduler.rank_consensus import Due, RankConsensus
from thaw.engines.sglang.scheduler.records import RankRecord, RankRequest
from thaw.engines.sglang.scheduler.sampler import Chosen
from thaw.engines.sglang.scheduler.weights_epoch import WeightsEpochs, require_usable
from thaw.engines.sglang.settings import SglangSettings

log = logging.getLogger("thaw.sglang")
MAIL_SWEEP_S = 300.0
LOOK_S = 0.05
"""How often the mail is looked into for commands."""
MOST_BEGUN = 100_000
"""Names of commands that are remembered, lest one is begun twice."""
SWITCH_S = 0.0002
"""On an accelerator SGLang's scheduler never rests, and the interpreter lets it run for 5 ms while threads that read
packs wait for their turn."""


class RankSide:
    def __init__(
        self, pools: Sequence[StripPool], facts: WorkerFacts, engine: EngineFacts, settings: SglangSettings,
        mail: Mailbox, weights: WeightsSample | None, agreement: RankConsensus,
    ) -> None:  # fmt: skip
        self.facts, self.engine, self.mail, self.agreement = facts, engine, mail, agreement
        self.on = settings.enabled
        self.records: Records[RankRecord] = Records(settings.session_ttl_s, settings.shares())
        self.runs: dict[str, RankRequest] = {}
        self.contents = SlotContents(pools[0].num_slots, agreement)
        self.epochs = WeightsEpochs(weights, agreement)
        self.pins = RadixPins(settings, engine)
        spill = Path(settings.spill) if settings.spill else None
        groups, device = RankGroups(facts.groups, facts.rank, facts.world_size), pools[0].device.type
        groups.require([pool.num_heads for pool in pools])
        self.arena = HostCache(
            settings.arena_nbytes, spill, groups, spill_nbytes=settings.spill_nbytes, shares=settings.shares(),
            pinned=device == "cuda", shared=settings.readers > 0,
        )  # fmt: skip
        packing = PackIO(groups, mail, self.arena, interior=settings.interior, readers=settings.readers)
        self._commands = RankCommands(self, packing, settings.shares())
        if device != "cpu":
            sys.setswitchinterval(SWITCH_S)
        self._pools = tuple(pools)
        """One for each strip of the arena's pieces."""
        self._windows = groups.windows()
        self._swept = time.monotonic()
        self._looks = 0.0
        self._begun: dict[str, None] = {}
        self.row: Callable[[Any, int], torch.Tensor] = unbound
        """Slots of a request's first tokens."""
        self.free_tail: Callable[[torch.Tensor], None] = unbound
        self.room: Callable[[], dict[str, int]] = dict
        self.counters = dict.fromkeys(("captures", "hydrates", "forks", "refused", "preempted", "loaded_tokens"), 0)

    # -- a request arrives

    def begin(
        self, rid: str, message: protocol.Run, tokens: list[int], salt: str | None, extra: SamplingExtra | None
    ) -> RankRequest:
        """Take the request in. Raises what refuses it, on all ranks alike; nothing is kept then."""
        self._sweep()
        self.forget(message.drop)
        if not self.on:
            raise Unsupported("thaw is switched off in this engine; plain requests work")
        caller = message.caller or GUEST
        self.require_room(message.record, caller, message.num_new(len(tokens)))
        source, want = self._source(message), 0
        epoch = self.epochs.now()
        kept, chain = HostRecord((), epoch, caller=caller), empty_chain()
        if source is not None:
            want = self._ready(source, message.num_kv, tokens, epoch)
            kept, chain = source.kept.upto(want, caller), source.chain[:want]
        tell = None if self.facts.rank else partial(self.mail.put_entropy, message.id)
        run = RankRequest(rid, message, want, len(tokens), Chosen(extra, tokens, tell))
        run.chosen.failed = partial(self.stop, run)
        self.records.keep(
            message.record, RankRecord(tokens[:want], kept, chain, live=run, salt=salt or "", caller=caller)
        )
        self.runs[rid] = run
        self.counters["forks"] += message.source not in (None, message.record)
        return run

    def require_room(self, record: str, caller: Caller, num_tokens: int) -> None:
        """Raises `Busy` where the caller may not keep one more record, or that many tokens more on some rank."""
        self.records.require_room(record, caller)
        self.agreement.together(lambda: self.arena.room(caller).require(num_tokens))

    def require_caller(self, message: protocol.Message) -> None:
        """Raises `InvalidRequest`, on all ranks alike."""
        self.agreement.together(lambda: self.mail.require_caller(message))

    def _ready(self, source: RankRecord, want: int, tokens: list[int], epoch: int) -> int:
        """How many of the `want` tokens can be used, on every rank."""

        def look() -> int:
            require_usable(source, epoch)
            ready = min(want, self.catch_up(source, want))
            require_kept(self._late(source), ready)
            same = common_prefix(source.tokens[:ready], tokens)
            if same < ready:
                raise InvalidRequest(f"the request's tokens differ from the session's at token {same} of {ready}")
            return ready

        return self.agreement.least(self.agreement.together(look))

    def _late(self, record: RankRecord) -> list[LateGroup]:
        """Its groups with a window of which earlier tokens are not there."""
        found = [(group, record.kept.first(strip, record.num_kv)) for strip, group in self._windows]
        return [LateGroup(group, first) for group, first in found if first]

    def _source(self, message: protocol.Run) -> RankRecord | None:
        own = self.records.get(message.record)
        if own is not None and own.live is not None:
            raise Busy("the session is running already")
        if message.source is None:
            return None
        source = self.records.known(message.source)
        self.records.touch(message.source)
        return source

    def hello(self, message: protocol.Hello) -> str:
        """Where the mail is, for a client that was only told an address."""
        return msgspec.json.encode({"mail": str(self.mail.folder), "pid": str(self.engine.pid)}).decode()

    def command(self, message: protocol.Command) -> None:
        """Begin it; the answer comes by mail. Raises what refuses it, on all ranks alike. One that has come by mail and
        comes with a request, too, is begun once."""
        if message.id in self._begun:
            return
        self._begun[message.id] = None
        if len(self._begun) > MOST_BEGUN:
            del self._begun[next(iter(self._begun))]
        self._sweep()
        self.forget(message.drop)
        self._commands.begin(message)

    def left(self) -> tuple[bytes, ...]:
        """Commands in the mail: a front end that was paused holds requests back, and these come without it. Asked of
        the first rank alone, between two steps, also while the engine is paused."""
        now = time.monotonic()
        if now < self._looks:
            return ()
        self._looks = now + LOOK_S
        return self.mail.take_commands()

    def mailed(self, data: bytes) -> None:
        """Begin a command that was left in the mail, or answer what refuses it."""
        message: Any = None

        def begin() -> None:
            nonlocal message
            message = protocol.parse({protocol.KEY: msgspec.json.decode(data)})
            if isinstance(message, protocol.Run | protocol.Hello) or message is None or message.caller is None:
                raise InvalidRequest("a message in the mail's folder of commands is none")
            self.require_caller(message)
            self.command(message)

        guarded(begin, lambda error: self.refuse("by mail", message, error))

    # -- a request is admitted

    def record_of(self, run: RankRequest) -> RankRecord | None:
        """What the request continues from, or None when its KV may not be used any more."""
        record = self.records.get(run.message.record)
        if record is None or run.error is not None:
            return None
        epoch, found = self.epochs.now(), record
        try:
            self.agreement.together(lambda: require_usable(found, epoch))
        except ThawError as error:
            run.error = error
            return None
        return record

    def stop(self, run: RankRequest, error: ThawError) -> None:
        """The request ends with this error, and nobody continues from what it computed."""
        run.error = error
        record = self.records.get(run.message.record)
        if record is not None and record.live is run:
            record.kept.broken = str(error)
        unheard(error)

    def load(self, run: RankRequest, record: RankRecord, start: int, stop: int, slots: torch.Tensor) -> bool:
        """Tokens [start, stop) of the record into these slots, on every rank. Where one could not the request has its
        error, and the slots hold nobody's content on any."""

        def write() -> None:
            for strip, pool in enumerate(self._pools):
                there = record.kept.spans(strip, start, stop)
                for a, b, view in there:
                    pool.write(slots[a - start : b - start], view)
                for a, b in gaps(start, stop, [(a, b) for a, b, _ in there]):
                    pool.clear(slots[a - start : b - start])

        try:
            self.agreement.together(write)
        except ThawError as error:
            run.error = error
            self.contents.clear(slots)
            return False
        self.contents.put(slots, record.chain[start:stop])
        self.counters["loaded_tokens"] += stop - start
        return True

    def drop_tail(self, run: RankRequest) -> None:
        """The slots that hold it go back, unless SGLang has taken them over."""
        tail, run.tail = run.tail, None
        if tail is not None:
            self.free_tail(tail)

    # -- what a request has computed

    def number(self, run: RankRequest, upto: int) -> None:
        """Give what the request has written into its slots numbers of its own."""
        if upto <= run.numbered:
            return
        slots = self.row(run.req, upto)[run.numbered :]
        self.contents.put(slots, self.contents.fresh(len(slots)))
        run.numbered = upto

    def sync(self, run: RankRequest, upto: int) -> None:
        """The record has the request's first `upto` tokens, or is broken; on this rank, whatever others have. Who goes
        on from it asks all."""
        record = self.records.get(run.message.record)
        if record is None or record.live is not run:
            return
        self.number(run, upto)
        if record.kept.broken or run.error is not None:
            return
        if record.kept.epoch != self.epochs.seen():  # not `now`: inside `together` no collective may run
            record.kept.broken = "the weights changed while it was computed"
            return
        slots = self.row(run.req, upto)
        chain = self.contents.of(slots)
        same = equal_length(record.chain, chain)
        if same == upto:
            return
        try:
            tensors = self.arena.allocate(upto - same, record.caller)
            # SGLang may have launched steps that still write these slots; reading waits for them.
            for pool, tensor in zip(self._pools, tensors, strict=True):
                pool.read(slots[same:], tensor)
            pieces = self.arena.joined((*record.kept.cut(same), Piece(same, upto - same, tensors)), record.caller)
        except (ThawError, RuntimeError, MemoryError) as error:
            record.kept.broken = str(error)
            return
        points = record.kept.upto(same).points
        record.kept = HostRecord(pieces, record.kept.epoch, caller=record.caller, points=points)
        record.chain, record.tokens = chain.clone(), run.tokens()[:upto]

    def catch_up(self, record: RankRecord, want: int | None) -> int:
        """How many tokens the record has; of one that is running, those computed by now are copied first."""
        run = record.live
        if run is None or (want is not None and want <= record.num_kv):
            return record.num_kv
        ready = run.num_computed()
        if want is not None:
            ready = min(ready, want)
        if ready > record.num_kv:
            self.sync(run, ready)
        return record.num_kv

    # -- a request loses its memory, or ends

    def released(self, run: RankRequest, *, retracted: bool) -> None:
        """SGLang is about to take the request's slots back. If it is to go on later, it continues from the record."""
        ready = run.num_computed()
        if run.message.keep or retracted:
            self.sync(run, ready)
        if retracted:
            run.retracted += 1
            self.counters["preempted"] += 1
            record = self.records.get(run.message.record)
            run.want = record.num_kv if record is not None else 0
            run.numbered = 0

    def end(self, rid: str, *, num_tokens: int | None = None) -> None:
        """The request is over: say where its record stands."""
        run = self.runs.pop(rid, None)
        if run is None:
            return
        self.drop_tail(run)
        record = self.records.get(run.message.record)
        num_kv = 0
        if record is not None and record.live is run:
            record.live = None
            num_kv = record.num_kv
            self.records.touch(run.message.record)
        error = run.error
        answer = Answer(
            kind="" if error is None else error.kind,
            error="" if error is None else str(error),
            num_tokens=num_tokens if num_tokens is not None else run.num_prompt,
            num_kv=num_kv,
            preempted=run.retracted,
            kept=run.message.keep,
        )
        if run.message.caller is not None:
            self.say(run.message.id, answer)

    def flushed(self) -> None:
        """SGLang has thrown its cache away: slots hold nobody's content, and the locks are gone with the tree."""
        self.pins.lost()
        self.contents.clear()
        for run in self.runs.values():
            run.tail = None

    # -- what is answered

    def answer(self, name: str, answer: Answer) -> None:
        """This rank's part."""
        self.mail.answer(name, self.facts.rank, answer)

    def say(self, name: str, answer: Answer) -> None:
        """What all ranks know alike is said by the first."""
        if not self.facts.rank:
            self.mail.answer(name, SCHEDULER, answer)

    def refuse(self, rid: str, message: protocol.Message | None, error: ThawError) -> None:
        """By mail to who shares it; to the operator in the first rank's log."""
        self.counters["refused"] += 1
        if not self.facts.rank:
            log.warning("thaw: request %s is refused (%s): %s", rid, error.kind, error)
        if message is not None and message.caller is not None:
            self.say(message.id, Answer(kind=error.kind, error=str(error)))

    # -- what has had its time

    def due(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Records and pins that have had their time, by this rank's clock. Asked of the first rank alone, between two
        steps; nothing ends before all ranks are told."""
        return self.records.overdue(), self.pins.overdue()

    def end_due(self, due: Due) -> None:
        """Let go of what the first rank's clock says is over. A pin must not hold anybody up who comes after it."""
        for name in due.pins:
            self.pins.unpin(name)
        self.forget(self.records.unused(due.records))

    def forget(self, names: Iterable[str]) -> None:
        for name in names:
            if self.records.drop(name):
                self.pins.unpin(name)

    def _sweep(self) -> None:
        """Mail that nobody fetched."""
        now = time.monotonic()
        if now - self._swept > MAIL_SWEEP_S and not self.facts.rank:
            self._swept = now
            guarded(self.mail.sweep, unheard)


def gaps(start: int, stop: int, runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """What of tokens [start, stop) is in none of the runs, which are in order and apart from one another."""
    out, at = [], start
    for a, b in runs:
        out.append((at, a))
        at = b
    return [(a, b) for a, b in [*out, (at, stop)] if a < b]
