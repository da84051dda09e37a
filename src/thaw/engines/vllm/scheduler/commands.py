"""Commands: requests that compute nothing and are held back until they are answered. Here is what each one starts.

They ask the scheduler's side for what it keeps, and put jobs for the workers into its queue.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import singledispatchmethod
from typing import TYPE_CHECKING, Any

import msgspec

from thaw.core.errors import Busy, InvalidRequest, ThawError, TimedOut, TooLong
from thaw.engines.base import HydratePlan
from thaw.engines.served import protocol
from thaw.engines.served.adapters import require_source
from thaw.engines.served.budget import GUEST, MAX_COMMANDS, Budget, Shares
from thaw.engines.served.late_groups import late_groups
from thaw.engines.served.mailbox import SCHEDULER
from thaw.engines.served.protocol import Answer, merge
from thaw.engines.vllm import jobs
from thaw.engines.vllm.scheduler.records import SchedulerRecord

if TYPE_CHECKING:
    from thaw.engines.vllm.scheduler.scheduler import SchedulerSide


HELD_LIMIT_S = 900.0
"""A request whose command is still held then has been left by its client, who waits no longer than
`talk.COMMAND_LIMIT_S`: it runs its one token and ends."""


SAME_ID = "another request that is under way has a message of this id; give each message one of its own"


@dataclass(frozen=True)
class HeldCommand:
    command: protocol.Command
    since: float = field(default_factory=time.monotonic)

    @property
    def is_overdue(self) -> bool:
        return time.monotonic() - self.since > HELD_LIMIT_S


class SchedulerCommands:
    """By the request that carries each. Each caller has its share of `MAX_COMMANDS`."""

    def __init__(self, side: SchedulerSide, shares: Shares) -> None:
        self._side = side
        self._open: dict[str, HeldCommand] = {}
        self._budget = Budget("held commands", MAX_COMMANDS, shares)

    def __contains__(self, request: str) -> bool:
        return request in self._open

    def holds(self, name: str, *, besides: str = "") -> bool:
        """Whether one of them, carried by another request than `besides`, has a message of this id: its answer has that
        name."""
        return any(held.command.id == name for request, held in self._open.items() if request != besides)

    def begin(self, request: str, message: protocol.Command) -> None:
        """Raises what is to be answered; nothing is held where that is one too many."""
        self._hold(request, message)
        self._start(message)

    @singledispatchmethod
    def _start(self, message: protocol.Command) -> None:
        """The table of commands: a handler is registered for each kind."""
        raise NotImplementedError(f"no scheduler knows how to start a command {type(message).__name__}")

    @_start.register
    def _hello(self, message: protocol.Hello) -> None:
        """Nothing is to be done before its answer (`_reply`)."""

    @_start.register
    def _look(self, message: protocol.Look) -> None:
        self._side.queue.append(jobs.LookAtWeights(message.id, message.digest))

    @_start.register
    def _get_stats(self, message: protocol.GetStats) -> None:
        self._side.queue.append(jobs.Count(message.id, self._counts()))

    @_start.register
    def _unpin(self, message: protocol.Unpin) -> None:
        self._side.reset()
        self._side.mail.answer(message.id, SCHEDULER, Answer())

    @_start.register
    def _end_run(self, message: protocol.EndRun) -> None:
        self._side.end_soon(message.run)
        self._side.mail.answer(message.id, SCHEDULER, Answer())

    @_start.register
    def _switch(self, message: protocol.Switch) -> None:
        self._side.on = message.on
        if not message.on:
            self._side.reset()
        self._side.queue.append(jobs.Watch(message.id, message.watch_weights))

    def _hold(self, request: str, message: protocol.Command) -> None:
        if self.holds(message.id):
            raise InvalidRequest(f"id {message.id}: {SAME_ID}")
        if not isinstance(message, protocol.Hello):  # which goes on in the next step
            self._budget.require(message.caller or GUEST)
            self._budget.take(message.caller or GUEST)
        self._open[request] = HeldCommand(message)

    def may_pass(self, request: str) -> bool:
        """Whether it may run its one token now: its answer goes with the reply, or nobody waits for it any more."""
        held = self._open[request]
        if isinstance(held.command, protocol.Hello) or held.is_overdue:
            return True
        return held.command.in_reply and self._answered(held.command.id)

    def end(self, request: str) -> dict[str, Any] | None:
        """The request is over: what goes back with its output."""
        command = self._open.pop(request).command
        if not isinstance(command, protocol.Hello):
            self._budget.give_back(command.caller or GUEST)
        self._withdraw(command)
        return self._reply(command)

    def _answered(self, name: str) -> bool:
        side = self._side
        if side.mail.peek(name, SCHEDULER) is not None:
            return True
        return all(side.mail.peek(name, rank) is not None for rank in range(side.facts.world_size))

    def _withdraw(self, command: protocol.Command) -> None:
        """A command that ends before the workers heard of it is not done any more, and whoever waits is told."""
        side = self._side
        mine = [job for job in side.queue if getattr(job, "name", None) == command.id]
        if mine:
            side.queue[:] = [job for job in side.queue if job not in mine]
            error = Busy("the engine's owner stopped all requests before this one began (a pause?); try it again later")
            side.mail.answer(command.id, SCHEDULER, refused(error))

    def _reply(self, command: protocol.Command) -> dict[str, Any] | None:
        side = self._side
        if isinstance(command, protocol.Hello):
            return reply(command.id, Answer(facts={"mail": str(side.mail.folder), "pid": str(side.facts.pid)}))
        if not command.in_reply:
            return None
        own = side.mail.take(command.id, SCHEDULER)
        if own is not None:
            return reply(command.id, own)
        parts = [side.mail.take(command.id, rank) for rank in range(side.facts.world_size)]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return reply(command.id, refused(TimedOut("the request ended before all workers had answered its command")))
        return reply(command.id, merge(found))

    def _counts(self) -> dict[str, int]:
        side = self._side
        pool = side.contents.pool
        return {
            "records": len(side.records),
            "running": side.num_running(),
            "commands": len(self._open) - 1,
            "blocks": side.facts.num_blocks,
            "free_blocks": pool.get_num_free_blocks() if pool is not None else 0,
            "pinned_blocks": side.pins.num_blocks(),
            **side.counts(),
        }

    @_start.register
    def _fill(self, message: protocol.Fill) -> None:
        side = self._side
        caller = message.caller or GUEST
        plan = side.mail.plan(message.id)
        shared = self._shared(message, plan)
        side.require_room(message.record, caller, plan.num_kv - shared)
        if plan.num_kv > side.facts.max_model_len:
            raise TooLong(f"{plan.num_kv} tokens exceed the engine's {side.facts.max_model_len}")
        size = side.facts.block_size
        before = side.records.known(message.source).chain[: shared // size] if message.source is not None else []
        chain = [*before, *side.contents.chain(plan.num_kv // size - len(before))]
        tokens, late = list(plan.tokens[: plan.num_kv]), late_groups(plan, plan.identity.groups)
        record = SchedulerRecord(tokens, plan.num_kv, chain, caller=caller, late=late, adapter=plan.identity.adapter)
        record.points = {point.token for point in plan.points}
        side.records.keep(message.record, record)
        side.queue.append(jobs.ReadPlan(message.id, message.record, caller, message.source, shared))
        side.counters["hydrates"] += 1

    def _shared(self, message: protocol.Fill, plan: HydratePlan) -> int:
        """How many of the plan's tokens the message's source has. Raises what refuses to take them from there."""
        if message.source is None:
            return 0
        side, want = self._side, message.num_kv
        source = side.records.known(message.source)
        require_source(source.adapter, plan.identity.adapter)
        if side.catch_up(message.source, source, want) < want or tuple(source.tokens[:want]) != plan.tokens[:want]:
            raise InvalidRequest(f"fill: the session beside has other tokens than the plan's first {want}")
        side.records.touch(message.source)
        return want

    @_start.register
    def _write(self, message: protocol.Write) -> None:
        side = self._side
        side.mail.mount(message.store)
        record = side.records.known(message.record)
        num_kv = message.end(side.catch_up(message.record, record, message.num_kv), side.facts.world_size)
        side.require_state(record, num_kv)
        num_tokens = record.live.num_tokens if record.live is not None else len(record.tokens)
        side.counters["captures"] += 1
        side.queue.append(
            jobs.WriteRecord(message.id, message.record, message.store, message.packs, message.base, num_kv, num_tokens)
        )

    @_start.register
    def _pin(self, message: protocol.Pin) -> None:
        self._side.mail.answer(message.id, SCHEDULER, self._pinned(message))

    def _pinned(self, message: protocol.Pin) -> Answer:
        side = self._side
        side.pins.unpin(message.record)
        if message.seconds == 0:
            return Answer()
        count, seconds = side.pins.pin(message.record, side.records.known(message.record), message.seconds)
        return Answer(num_kv=count // side.contents.num_groups * side.facts.block_size, seconds=seconds)


def refused(error: ThawError) -> Answer:
    return Answer(kind=error.kind, error=str(error))


def reply(name: str, answer: Answer) -> dict[str, Any]:
    """What vLLM hands back as `kv_transfer_params`."""
    return {protocol.KEY: {"id": name, **msgspec.to_builtins(answer)}}
