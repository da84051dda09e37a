"""Requests that are sent again with their `Idempotency-Key`: they get the response of the first one.

The first one's work does not depend on its connection, so a client whose connection broke finds all of it, also of a
stream, from its first event on. Kept in memory, the last ones; an error is not kept.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from thaw.gateway.problems import ApiError
from thaw.gateway.reply import EventStream

MOST = 256
MOST_NBYTES = 64 << 20
ERRORS = (b'data: {"error":', b"event: error", b"event: response.failed")
"""How the last event of a stream begins that ended with an error. That of a parked response has none."""
Named: TypeAlias = tuple[str, str, str]
"""Namespace, endpoint, key."""


def detached(request: Request) -> Request:
    """The request of a client that never goes away."""

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    return Request(request.scope, receive)


class RecordedReply:
    """The bytes of a reply, as they come."""

    def __init__(self, reply: Response) -> None:
        self.status, self.headers = reply.status_code, dict(reply.headers)
        self._parts: list[bytes] = []
        self._news, self._ended, self._failed = asyncio.Event(), False, False
        if isinstance(reply, EventStream):
            self._task = asyncio.create_task(self._record(reply.events))
        else:
            self._parts, self._ended = [bytes(reply.body)], True
        self._streams = isinstance(reply, EventStream)

    @property
    def nbytes(self) -> int:
        return sum(map(len, self._parts))

    @property
    def broke(self) -> bool:
        """Whether it is a stream that ended with an error."""
        last = next((part for part in reversed(self._parts) if part), b"")
        told = last.rstrip().rpartition(b"\n\n")[2].startswith(ERRORS)
        return self._streams and self._ended and (self._failed or told)

    def again(self) -> Response:
        headers = {name: value for name, value in self.headers.items() if name != "content-length"}
        if self._streams:
            return EventStream(self._follow(), lambda: None, headers)
        return Response(self._parts[0], self.status, headers)

    async def _record(self, events: AsyncIterator[bytes]) -> None:
        try:
            async for part in events:
                self._parts.append(part)
                self._tell()
        except BaseException:
            self._failed = True
            raise
        finally:
            self._ended = True
            self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _follow(self) -> AsyncIterator[bytes]:
        at = 0
        while True:
            news = self._news
            while at < len(self._parts):
                at += 1
                yield self._parts[at - 1]
            if self._ended:
                return
            await news.wait()


class Repeats:
    """Used by one event loop."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Named, tuple[bytes, asyncio.Task[RecordedReply]]] = OrderedDict()

    async def reply(self, named: Named, body: bytes, make: Callable[[], Awaitable[Response]]) -> Response:
        """The first request's reply, which `make` makes. Raises what that raises, and `ApiError` for another body."""
        digest = hashlib.sha256(body).digest()
        kept = self._kept.get(named)
        if kept is not None and kept[0] != digest:
            raise ApiError(422, "this Idempotency-Key was sent with another body", code="idempotency_key_reused")
        if kept is None or _broke(kept[1]):
            kept = self._kept[named] = digest, asyncio.create_task(_recorded(make))
        known, task = kept
        try:
            recorded = await asyncio.shield(task)
        except BaseException:
            if task.done() and self._kept.get(named) == (known, task):
                del self._kept[named]
            raise
        self._trim()
        return recorded.again()

    def _trim(self) -> None:
        """The oldest ones that are done go first."""
        done = {named: task for named, (_, task) in self._kept.items() if task.done() and task.exception() is None}
        nbytes = sum(task.result().nbytes for task in done.values())
        for named, task in done.items():
            if len(self._kept) <= MOST and nbytes <= MOST_NBYTES:
                return
            nbytes -= task.result().nbytes
            del self._kept[named]


def _broke(task: asyncio.Task[RecordedReply]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None and task.result().broke


async def _recorded(make: Callable[[], Awaitable[Response]]) -> RecordedReply:
    return RecordedReply(await make())
