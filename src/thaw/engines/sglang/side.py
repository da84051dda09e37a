"""thaw inside SGLang: what every session's record holds, and what is done for a request of thaw's.

It runs in SGLang's scheduler process, between steps. A *record* is a session's KV in this process's arena: append-only,
named by the client, cut and copied by reference. A request names the record it goes on from and the one it extends;
when it ends, or SGLang takes its memory away, what it computed is copied into that record, and SGLang's cache may evict
it.

Tokens and bytes. SGLang's tree finds KV by tokens, salted by lineage. Two siblings that sampled the same tokens in
batches of different shape have equal tokens and unequal bits. So the content of every slot carries a number here
(`chain` of a record, `_content` of a slot): before a request is admitted, what the tree would give it must be the
record's own, else it gets a salt of its own and loads everything; and nothing goes into the tree over another's bits.

Every rank has one of these, with its own heads. They hold the same records with the same numbers; what may differ is
whether a piece of work succeeded, and that is agreed before it matters (`agreement`).
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import torch

from thaw.core.errors import (
    Busy,
    InvalidRequest,
    NotFound,
    StaleSession,
    StorageFailed,
    ThawError,
    TooLong,
    Unsupported,
)
from thaw.engines.served import protocol
from thaw.engines.served.arena import Arena, Piece
from thaw.engines.served.arena import Record as Kept
from thaw.engines.served.mail import SCHEDULER, Mail
from thaw.engines.served.packing import Packing
from thaw.engines.served.protocol import Answer, EngineFacts, WorkerFacts
from thaw.engines.served.sampling_extra import SamplingExtra
from thaw.engines.served.weights import WeightsSample
from thaw.engines.sglang.agreement import Agreement, Due, described
from thaw.engines.sglang.pool import Pool
from thaw.engines.sglang.records import Pinned, Record, Run, empty_chain
from thaw.engines.sglang.rows import Chosen
from thaw.engines.sglang.settings import SglangSettings

MAX_RECORDS = 100_000
MAIL_SWEEP_S = 300.0
GONE = "the engine has let go of this session (it restarted, or the session was idle too long)"


class Side:
    def __init__(
        self, pool: Pool, facts: WorkerFacts, engine: EngineFacts, settings: SglangSettings, mail: Mail,
        weights: WeightsSample | None, agreement: Agreement,
    ) -> None:  # fmt: skip
        self._pool, self._facts, self._engine, self._settings, self._mail = pool, facts, engine, settings, mail
        self._weights, self._watching, self._agreement = weights, True, agreement
        spill = Path(settings.spill) if settings.spill else None
        self._arena = Arena(settings.arena_nbytes, spill, pool.num_heads, pool.num_layers, pool.head_dim, pool.dtype)
        self._packing = Packing(facts, mail, self._arena, pool.dtype)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="thaw-io")
        self._records: OrderedDict[str, Record] = OrderedDict()
        self.runs: dict[str, Run] = {}
        self.pins: dict[str, Pinned] = {}
        self._content = torch.zeros(pool.num_slots, dtype=torch.int64)
        self._numbers = 1
        self._swept = time.monotonic()
        self._on = settings.enabled
        self.row: Callable[[Any, int], torch.Tensor] = _unbound
        """Slots of a request's first tokens."""
        self.pin: Callable[[Record], tuple[Any, int]] = _unbound
        self.unpin: Callable[[Any], None] = _unbound
        self.free_tail: Callable[[torch.Tensor], None] = _unbound
        self.room: Callable[[], dict[str, int]] = dict
        self.counters = dict.fromkeys(("captures", "hydrates", "forks", "refused", "preempted", "loaded_tokens"), 0)

    # -- a request arrives

    def begin(
        self, rid: str, message: protocol.Run, tokens: list[int], salt: str | None, extra: SamplingExtra | None
    ) -> Run:
        """Take the request in. Raises what refuses it, on all ranks alike; nothing is kept then."""
        self._sweep()
        self.forget(message.drop)
        if not self._on:
            raise Unsupported("thaw is switched off in this engine; plain requests work")
        source, want = self._source(message), 0
        epoch = self._now()
        pieces: tuple[Piece, ...] = ()
        chain = empty_chain()
        if source is not None:
            want = self._ready(source, message.num_kv, tokens, epoch)
            pieces, chain = source.kept.cut(want), source.chain[:want]
        run = Run(rid, message, want, len(tokens), Chosen(extra, tokens))
        self._keep(message.record, Record(tokens[:want], Kept(pieces, epoch), chain, live=run, salt=salt or ""))
        self.runs[rid] = run
        self.counters["forks"] += message.source not in (None, message.record)
        return run

    def _ready(self, source: Record, want: int, tokens: list[int], epoch: int) -> int:
        """How many of the `want` tokens can be used, on every rank."""

        def look() -> int:
            self._usable(source, epoch)
            ready = min(want, self._catch_up(source, want))
            same = _common(source.tokens[:ready], tokens)
            if same < ready:
                raise InvalidRequest(f"the request's tokens differ from the session's at token {same} of {ready}")
            return ready

        return self._agreement.least(self._agreement.together(look))

    def _source(self, message: protocol.Run) -> Record | None:
        own = self._records.get(message.record)
        if own is not None and own.live is not None:
            raise Busy("the session is running already")
        if message.source is None:
            return None
        source = self._records.get(message.source)
        if source is None:
            raise NotFound(GONE)
        self._touch(message.source)
        return source

    def hello(self, message: protocol.Hello) -> str:
        """Where the mail is, for a client that was only told an address."""
        return msgspec.json.encode({"mail": str(self._mail.folder), "pid": str(self._engine.pid)}).decode()

    def refuse(self, name: str, error: ThawError) -> None:
        self.counters["refused"] += 1
        self._say(name, Answer(kind=error.kind, error=str(error)))

    # -- a request is admitted

    def record_of(self, run: Run) -> Record | None:
        """What the request goes on from, or None when its KV may not be used any more."""
        record = self._records.get(run.message.record)
        if record is None or run.error is not None:
            return None
        epoch, found = self._now(), record
        try:
            self._agreement.together(lambda: self._usable(found, epoch))
        except ThawError as error:
            run.error = error
            return None
        return record

    def is_content(self, slots: torch.Tensor, chain: torch.Tensor) -> bool:
        """Whether the slots hold the chain's content, on every rank."""
        return bool(self._agreement.least(torch.equal(self._content[slots.cpu()], chain[: len(slots)])))

    def own_length(self, slots: torch.Tensor, chain: torch.Tensor) -> int:
        """How many of the slots, from the first, hold the chain's content, on every rank."""
        return self._agreement.least(_equal_length(self._content[slots.cpu()], chain))

    def load(self, run: Run, record: Record, start: int, stop: int, slots: torch.Tensor) -> bool:
        """Tokens [start, stop) of the record into these slots, on every rank. Where one could not the request has its
        error, and the slots hold nobody's content on any."""

        def write() -> None:
            for a, b, view in record.kept.spans(start, stop):
                self._pool.write(slots[a - start : b - start], view)

        try:
            self._agreement.together(write)
        except ThawError as error:
            run.error = error
            self._content[slots.cpu()] = 0
            return False
        self._content[slots.cpu()] = record.chain[start:stop]
        self.counters["loaded_tokens"] += stop - start
        return True

    # -- what a request has computed

    def number(self, run: Run, upto: int) -> None:
        """Give what the request has written into its slots numbers of its own."""
        if upto <= run.numbered:
            return
        slots = self.row(run.req, upto)[run.numbered :].cpu()
        self._content[slots] = torch.arange(self._numbers, self._numbers + len(slots))
        self._numbers += len(slots)
        run.numbered = upto

    def sync(self, run: Run, upto: int) -> None:
        """The record has the request's first `upto` tokens, or is broken; on this rank, whatever others have. Who goes
        on from it asks all."""
        record = self._records.get(run.message.record)
        if record is None or record.live is not run:
            return
        self.number(run, upto)
        if record.kept.broken or run.error is not None:
            return
        if record.kept.epoch != self._seen():
            record.kept.broken = "the weights changed while it was computed"
            return
        slots = self.row(run.req, upto)
        chain = self._content[slots.cpu()]
        same = _equal_length(record.chain, chain)
        if same == upto:
            return
        try:
            piece = self._arena.allocate(upto - same)
            self._pool.read(slots[same:], piece)
            pieces = self._arena.joined((*record.kept.cut(same), Piece(same, upto - same, piece)))
        except (ThawError, RuntimeError, MemoryError) as error:
            record.kept.broken = str(error)
            return
        record.kept = Kept(pieces, record.kept.epoch)
        record.chain, record.tokens = chain.clone(), _tokens(run.req)[:upto]

    def computed(self, run: Run) -> int:
        """Tokens of the request that have KV once the steps launched so far are done; never the last one, which runs
        again."""
        req = run.req
        if req is None or not req.kv.holds_kv:
            return 0
        return max(0, min(int(req.kv.kv_committed_len), len(req.origin_input_ids) + len(req.output_ids) - 1))

    def _catch_up(self, record: Record, want: int | None) -> int:
        """How many tokens the record has; of one that is running, those computed by now are copied first."""
        run = record.live
        if run is None or (want is not None and want <= record.num_kv):
            return record.num_kv
        ready = self.computed(run)
        if want is not None:
            ready = min(ready, want)
        if ready > record.num_kv:
            self.sync(run, ready)
        return record.num_kv

    # -- a request loses its memory, or ends

    def released(self, run: Run, *, retracted: bool) -> None:
        """SGLang is about to take the request's slots back. If it is to go on later, it goes on from the record."""
        ready = self.computed(run)
        if run.message.keep or retracted:
            self.sync(run, ready)
        if retracted:
            run.retracted += 1
            self.counters["preempted"] += 1
            record = self._records.get(run.message.record)
            run.want = record.num_kv if record is not None else 0
            run.numbered = 0

    def end(self, rid: str, *, num_tokens: int | None = None) -> None:
        """The request is over: say where its record stands."""
        run = self.runs.pop(rid, None)
        if run is None:
            return
        if run.tail is not None:
            self.free_tail(run.tail)
        record = self._records.get(run.message.record)
        num_kv = 0
        if record is not None and record.live is run:
            record.live = None
            num_kv = record.num_kv
            self._touch(run.message.record)
        error = run.error
        answer = Answer(
            kind="" if error is None else error.kind,
            error="" if error is None else str(error),
            num_tokens=num_tokens if num_tokens is not None else run.num_prompt,
            num_kv=num_kv,
            preempted=run.retracted,
            kept=run.message.keep,
        )
        self._say(run.message.id, answer)

    # -- commands

    def command(self, message: protocol.Command) -> None:
        """Begin it; the answer comes by mail. Raises what refuses it, on all ranks alike."""
        self._sweep()
        self.forget(message.drop)
        if isinstance(message, protocol.Fill):
            self._fill(message)
        elif isinstance(message, protocol.Write):
            self._write(message)
        elif isinstance(message, protocol.Pin):
            self._say(message.id, self._pin(message))
        elif isinstance(message, protocol.Look):
            self._look(message)
        elif isinstance(message, protocol.Stats):
            self._answer(message.id, Answer(counts=self._counts()))
        elif isinstance(message, protocol.Unpin):
            self.unpin_all()
            self._say(message.id, Answer())
        elif isinstance(message, protocol.Switch):
            self._on, self._watching = message.on, message.watch_weights
            if not message.on:
                self.unpin_all()
            self._answer(message.id, Answer())

    def _fill(self, message: protocol.Fill) -> None:
        plan = self._agreement.together(lambda: self._mail.plan(message.id))
        if plan.num_kv > self._engine.max_model_len:
            raise TooLong(f"{plan.num_kv} tokens exceed the engine's {self._engine.max_model_len}")
        epoch, started = self._now(), time.perf_counter()
        chain = torch.arange(self._numbers, self._numbers + plan.num_kv)
        self._numbers += plan.num_kv
        self.counters["hydrates"] += 1
        # The record is there at once, broken until it is whole: who is quicker than the disk is refused, not served.
        kept = Kept((), epoch, broken="it is not read yet")
        self._keep(message.record, Record(list(plan.tokens[: plan.num_kv]), kept, chain))

        def read() -> Answer:
            pieces, nbytes, read_s = self._packing.read(plan)
            kept.pieces = self._arena.joined(pieces)
            kept.broken = ""
            seconds = time.perf_counter() - started
            stages = {"read": read_s, "fill": seconds}
            return Answer(num_kv=plan.num_kv, nbytes=nbytes, epoch=epoch, seconds=seconds, stages_s=stages)

        self._in_thread(message.id, read)

    def _write(self, message: protocol.Write) -> None:
        record = self._records.get(message.record)
        if record is None:
            raise NotFound(GONE)
        started = time.perf_counter()
        epoch, found = self._now(), record

        def look() -> int:
            self._mail.store(message.store)
            self._usable(found, epoch)
            ready = self._catch_up(found, message.num_kv)
            self._usable(found, epoch)
            return ready

        num_kv = self._agreement.least(self._agreement.together(look))
        if message.num_kv is not None:
            if message.num_kv > num_kv:
                raise InvalidRequest(f"capture of {message.num_kv} tokens: the session has KV for {num_kv}")
            num_kv = message.num_kv
        if message.base > num_kv:
            raise InvalidRequest(f"capture from token {message.base}: the session has KV for {num_kv} tokens")
        if len(message.packs) != self._facts.world_size:
            raise InvalidRequest(f"{len(message.packs)} packs for {self._facts.world_size} ranks: give one to each")
        run = record.live
        num_tokens = len(_tokens(run.req)) if run is not None and run.req is not None else len(record.tokens)
        self.counters["captures"] += 1
        pieces, cut_s = record.kept.cut(num_kv), time.perf_counter() - started
        pack = message.packs[self._facts.rank]

        def write() -> Answer:
            answer = self._packing.write(
                pieces, message.base, num_kv, store=message.store, pack=pack, num_tokens=num_tokens, epoch=epoch
            )
            answer.stages_s["cut"] = cut_s
            return answer

        self._in_thread(message.id, write)

    def _look(self, message: protocol.Look) -> None:
        epoch = self._now()
        if not message.digest:
            self._answer(message.id, Answer(epoch=epoch))
            return
        weights = self._weights
        if weights is None:
            raise NotFound("the model was not found in this process; its weights cannot be hashed")
        self._in_thread(message.id, lambda: Answer(epoch=epoch, digest=weights.digest()))

    def _counts(self) -> dict[str, int]:
        return {
            "records": len(self._records),
            "running": len(self.runs),
            "pinned_tokens": self.num_pinned(),
            **self.room(),
            **self.counters,
            "arena_nbytes": self._arena.used,
            "spilled_nbytes": self._arena.spilled,
        }

    def _in_thread(self, name: str, work: Callable[[], Answer]) -> None:
        def run() -> None:
            try:
                answer = work()
            except Exception as error:  # noqa: BLE001 - the answer says so
                failed = described(error)
                answer = Answer(kind=failed.kind, error=str(failed))
            self._answer(name, answer)

        self._threads.submit(run)

    def _answer(self, name: str, answer: Answer) -> None:
        self._mail.answer(name, self._facts.rank, answer)

    def _say(self, name: str, answer: Answer) -> None:
        """What all ranks know alike is said by the first."""
        if not self._facts.rank:
            self._mail.answer(name, SCHEDULER, answer)

    # -- records and pins

    def _keep(self, name: str, record: Record) -> None:
        self._records[name] = record
        self._touch(name)

    def _touch(self, name: str) -> None:
        """Records stand in the order of their last use."""
        self._records[name].touched = time.monotonic()
        self._records.move_to_end(name)

    def due(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Records and pins that have had their time, by this rank's clock. Asked of the first rank alone, between two
        steps; nothing ends before all ranks are told."""
        now = time.monotonic()
        over = max(0, len(self._records) - MAX_RECORDS)
        oldest = itertools.islice(self._records.items(), 64)
        limit = now - self._settings.session_ttl_s
        records = itertools.takewhile(lambda item: item[0] < over or item[1][1].touched < limit, enumerate(oldest))
        pins = tuple(name for name, pinned in self.pins.items() if pinned.until <= now)
        return tuple(name for _, (name, _) in records), pins

    def end_due(self, due: Due) -> None:
        """Let go of what the first rank's clock says is over. A pin must not hold anybody up who comes after it."""
        for name in due.pins:
            self._let_go(name)
        for name in due.records:
            record = self._records.get(name)
            if record is not None and record.live is not None:
                self._touch(name)
            else:
                self.forget((name,))

    def _sweep(self) -> None:
        """Mail that nobody fetched."""
        now = time.monotonic()
        if now - self._swept > MAIL_SWEEP_S and not self._facts.rank:
            self._swept = now
            self._mail.sweep()

    def forget(self, names: Iterable[str]) -> None:
        for name in names:
            if self._records.pop(name, None) is not None:
                self._let_go(name)

    def _pin(self, message: protocol.Pin) -> Answer:
        self._let_go(message.record)
        if message.seconds == 0:
            return Answer()
        record = self._records.get(message.record)
        if record is None:
            raise NotFound(GONE)
        limit = min(message.seconds, self._settings.pin_seconds)
        lock, num_tokens = self.pin(record)
        room = int(self._settings.pin_fraction * self._engine.num_blocks * self._engine.block_size) - self.num_pinned()
        if num_tokens > room:
            self.unpin(lock)
            raise InvalidRequest(
                f"pinning {num_tokens} tokens: only {max(room, 0)} of {self._engine.num_blocks} blocks' may still be "
                f"pinned (pin_fraction {self._settings.pin_fraction}); park instead, or unpin others"
            )
        self.pins[message.record] = Pinned(time.monotonic() + limit, lock, num_tokens)
        return Answer(num_kv=num_tokens, seconds=limit)

    def _let_go(self, name: str) -> None:
        pinned = self.pins.pop(name, None)
        if pinned is not None:
            self.unpin(pinned.lock)

    def unpin_all(self) -> None:
        for name in list(self.pins):
            self._let_go(name)

    def num_pinned(self) -> int:
        return sum(pinned.num_tokens for pinned in self.pins.values())

    def flushed(self) -> None:
        """SGLang has thrown its cache away: slots hold nobody's content, and the locks are gone with the tree."""
        self.pins.clear()
        self._content.zero_()
        for run in self.runs.values():
            run.tail = None

    # -- weights

    def _usable(self, record: Record, epoch: int) -> None:
        if record.kept.epoch != epoch:
            raise StaleSession(
                f"the session's KV is of weights epoch {record.kept.epoch}; the engine's weights changed (epoch "
                f"{epoch}). Open a session and append its tokens again, or hydrate a commit with policy='recompute'."
            )
        if record.kept.broken:
            raise StorageFailed(f"the session's KV could not be kept: {record.kept.broken}")

    def _now(self) -> int:
        """The epoch of the weights, the same on all ranks: what one of them sees has changed for all."""
        epoch = -self._agreement.least(-self._seen())
        if self._weights is not None:
            self._weights.epoch = epoch
        return epoch

    def _seen(self) -> int:
        """As this rank alone sees it."""
        if self._weights is None:
            return 0
        return self._weights.look() if self._watching else self._weights.epoch

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _tokens(req: Any) -> list[int]:
    return [*req.origin_input_ids, *req.output_ids]


def _equal_length(one: torch.Tensor, two: torch.Tensor) -> int:
    count = min(len(one), len(two))
    unequal = (one[:count] != two[:count]).nonzero()
    return int(unequal[0]) if len(unequal) else count


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    if list(one) == list(two[: len(one)]):
        return len(one)
    return next(i for i, (a, b) in enumerate(itertools.zip_longest(one, two)) if a != b)


def _unbound(*_: Any) -> Any:
    raise AssertionError("the cache binds this when it is made")
