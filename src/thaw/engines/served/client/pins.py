"""The pins that this client holds: blocks which the engine keeps for a while, at everybody's cost."""

from __future__ import annotations

import asyncio
import contextlib
import secrets

from thaw.core.errors import ThawError
from thaw.engines.base import SessionRef
from thaw.engines.served import protocol
from thaw.engines.served.client.channel import EngineChannel
from thaw.engines.served.client.event_loop import LoopThread
from thaw.engines.served.client.session import ServedSession
from thaw.engines.served.mailbox import SCHEDULER


class ClientPins:
    """By record: the session that it was pinned for, and the timer of its end. On the loop."""

    def __init__(self, loop: LoopThread, talk: EngineChannel) -> None:
        self._loop, self._talk = loop, talk
        self._held: dict[str, tuple[SessionRef, asyncio.TimerHandle]] = {}

    async def pin(self, session: ServedSession, seconds: float) -> int:
        """Hold its full blocks, or with 0 seconds let go; the tokens held."""
        if session.node is None:
            return 0
        name = session.node.name
        answer = await self._talk.command(
            protocol.Pin(id=secrets.token_hex(16), record=name, seconds=float(seconds)), (SCHEDULER,)
        )
        self._forget(name)
        if answer.num_kv:
            ends = self._loop.inner.call_later(answer.seconds + 0.05, self._ended, name)
            self._held[name] = (session.ref, ends)
            if not self._talk.transport.always_served:
                ends.cancel()
        return answer.num_kv

    async def end_of(self, session: ServedSession) -> None:
        """The session is closed: what was pinned for it is let go."""
        if session.node is not None and self._held.get(session.node.name, ("",))[0] == session.ref:
            await self._let_go(session.node.name)

    async def end_all(self) -> None:
        """All of the engine, other clients' too."""
        self.forget_all()
        await self._talk.command(protocol.Unpin(id=secrets.token_hex(16)), (SCHEDULER,))

    def forget_all(self) -> None:
        for record in list(self._held):
            self._forget(record)

    def _forget(self, record: str) -> None:
        if record in self._held:
            self._held.pop(record)[1].cancel()

    def _ended(self, record: str) -> None:
        """An idle engine does not look at its pins, so it is told when one is over."""
        self._loop.spawn(lambda: self._let_go(record))

    async def _let_go(self, record: str) -> None:
        """End one pin. Nobody waits for it, and it ends by itself in any case: so no error."""
        self._forget(record)
        with contextlib.suppress(ThawError):
            await self._talk.command(protocol.Pin(id=secrets.token_hex(16), record=record, seconds=0.0), (SCHEDULER,))
