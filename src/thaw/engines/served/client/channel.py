"""What the client says to the engine, and what it hears back.

Every message travels with a request. A command's request is held back by the engine and taken back by the client once
the answers are in the mail, one of every rank's or the scheduler's; a run's answer comes with the end of its stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import Callable, Sequence

import msgspec

from thaw.core.errors import LawBroken, NotFound, ThawError, TimedOut
from thaw.engines.error_kinds import made
from thaw.engines.served import protocol
from thaw.engines.served.client.dialect import Dialect
from thaw.engines.served.client.transport import Chunk, Submission, Transport
from thaw.engines.served.mailbox import SCHEDULER
from thaw.engines.served.protocol import Answer, Message, WorkerFacts, merge

COMMAND_LIMIT_S = 600.0
HELD_S = 1.0
"""A request that has had no answer for so long may be held back by the server's front end."""
FAREWELL_LIMIT_S = 5.0
RUN_LIMIT_S = 30.0
"""How long what the connector says of a run may come after the run's end."""


class EngineChannel:
    """`dropped`: records that nobody needs any more. Any thread may add to it; the next message tells the engine.

    All that it says is said under one name, which stands among the mail's callers until the farewell."""

    def __init__(self, transport: Transport, dialect: Dialect) -> None:
        self.transport, self.mail, self.dialect = transport, transport.mail, dialect
        self._name = secrets.token_hex(16)
        self.mail.add_caller(self._name)
        self.dropped: list[str] = []
        self._ranks: tuple[str | int, ...] = tuple(range(transport.facts.world_size))

    async def command(self, message: Message, senders: tuple[str | int, ...] | None = None) -> Answer:
        """Say it, wait for the mail, take the request back. Raises what the engine answered."""
        message = msgspec.structs.replace(message, drop=self._take_dropped(), caller=self._name)
        if message.for_owner:
            self.mail.grant(message.id)
        submission = Submission(message.id, [0], self.dialect.one_token, None, message)
        sending, left = asyncio.create_task(self._drain(submission)), self._leave_later(message)
        try:
            answers = await self._mailed(message.id, senders or self._ranks, sending)
        finally:
            if left is not None:
                left.cancel()
                self.mail.withdraw_command(message.id)
            await self.transport.abort(submission.name)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        answer = merge(answers)
        if answer.kind:
            raise refusal(answer)
        return answer

    def _leave_later(self, message: Message) -> asyncio.TimerHandle | None:
        """Leave it in the mail, too, if it takes longer: a front end that its owner has paused holds requests back."""
        if not self.transport.facts.takes_mail:
            return None
        return asyncio.get_running_loop().call_later(HELD_S, self.mail.leave_command, message)

    async def run(self, submission: Submission, take: Callable[[Chunk], bool]) -> Answer:
        """Stream a request through `take` until it says enough; what the engine says at the end, refusals too."""
        submission = self._with_news(submission)
        cached: int | None = None
        ended = False  # a stream may go on after it: with counts
        stream = self.transport.stream(submission)
        async with contextlib.aclosing(stream) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                counted = self.dialect.num_cached(chunk)
                cached = cached if counted is None else counted
                ended = ended or chunk.finish_reason is not None
                if not take(chunk) and not ended:
                    await self.transport.abort(submission.name)
                    break
        senders = (SCHEDULER, *self._ranks)
        found = (await self._mailed(submission.message.id, senders, limit_s=RUN_LIMIT_S))[0]
        return found if cached is None else msgspec.structs.replace(found, local=cached)

    async def farewell(self) -> None:
        """An engine that goes on without this client releases what this client kept there."""
        if self.dropped and self.transport.stays:
            message = protocol.Pin(id=secrets.token_hex(16), record=secrets.token_hex(16), seconds=0.0)
            with contextlib.suppress(ThawError, TimeoutError):
                await asyncio.wait_for(self.command(message, (SCHEDULER,)), FAREWELL_LIMIT_S)
        self.mail.drop_caller(self._name)

    def _with_news(self, submission: Submission) -> Submission:
        """By mail, for a stream that is left may have had its last chunk already, and nobody sees what that said."""
        news = {"mail": True, "drop": self._take_dropped(), "caller": self._name}
        message = msgspec.structs.replace(submission.message, **news)
        return dataclasses.replace(submission, message=message)

    def _take_dropped(self) -> tuple[str, ...]:
        out = tuple(self.dropped[: protocol.MAX_DROP])
        del self.dropped[: len(out)]
        return out

    async def _drain(self, submission: Submission) -> None:
        async for _ in self.transport.stream(submission):
            pass

    async def _mailed(
        self, name: str, senders: Sequence[str | int], sending: asyncio.Task[None] | None = None,
        limit_s: float = COMMAND_LIMIT_S,
    ) -> list[Answer]:  # fmt: skip
        """Answers of all `senders`, or the scheduler's refusal."""
        found: dict[str | int, Answer] = {}
        ends, looks, pause = time.monotonic() + limit_s, time.monotonic() + 1.0, 0.0005
        while True:
            for sender in {*senders, SCHEDULER} - found.keys():
                answer = self.mail.take(name, sender)
                if answer is not None:
                    found[sender] = answer
            if SCHEDULER in found and (found[SCHEDULER].kind or SCHEDULER in senders):
                return [found[SCHEDULER]]
            if all(sender in found for sender in senders):
                return [found[sender] for sender in senders]
            if any(answer.kind for answer in found.values()):
                return [answer for answer in found.values() if answer.kind]
            if sending is not None and sending.done() and not sending.cancelled() and sending.exception() is not None:
                raise sending.exception()  # type: ignore[misc]
            if time.monotonic() > looks:
                looks = time.monotonic() + 1.0
                self.mail.check_alive()
            if time.monotonic() > ends:
                raise TimedOut(f"the engine did not answer within {limit_s:.0f} s; look into its log")
            await asyncio.sleep(pause)
            pause = min(pause * 1.3, 0.01)


def refusal(answer: Answer) -> ThawError:
    """The error that an answer of some `kind` stands for."""
    return made(answer.kind, answer.error)


def worker_facts(transport: Transport) -> list[WorkerFacts]:
    """What every worker posted at its boot. Raises `NotFound` for workers without thaw, `LawBroken` where they are not
    of one model."""
    found = [transport.mail.worker_facts(rank) for rank in range(transport.facts.world_size)]
    missing = [rank for rank, facts in enumerate(found) if facts is None]
    if missing:
        raise NotFound(
            f"thaw's connector is not active in worker(s) {missing} of {transport.facts.world_size}; is thaw installed "
            "in the engine's environment? (its log says why a connector was not loaded)"
        )
    known = [facts for facts in found if facts is not None]
    told = {"; ".join(map(str, facts.groups)): facts.rank for facts in known}
    if len(told) > 1:
        each = ", ".join(f"worker {rank} has {groups}" for groups, rank in told.items())
        raise LawBroken(f"the engine's workers have other cache groups than one another: {each}")
    return known
