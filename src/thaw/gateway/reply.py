"""Replies over HTTP: JSON, server-sent events, and waiting for jobs while the client is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from thaw.gateway.asked import RequestOutcome
from thaw.gateway.job import ReplyJob
from thaw.gateway.problems import told

PAUSE_S = 15.0
"""Of silence in a stream."""
LINE_ENDS = {"\x85": rb"\u0085", "\u2028": rb"\u2028", "\u2029": rb"\u2029"}
"""What ends a line for some clients, and not in a stream of events; as JSON says it in ASCII."""


class ClientGone(Exception):
    """Nobody waits for the reply any more."""


def as_json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers=dict(headers or {}), media_type="application/json")


def event(value: Mapping[str, object], name: str | None = None) -> bytes:
    """One server-sent event."""
    said = msgspec.json.encode(value)
    if not said.isascii():
        for character, written in LINE_ENDS.items():
            said = said.replace(character.encode(), written)
    data = b"data: " + said + b"\n\n"
    return data if name is None else f"event: {name}\n".encode() + data


def headers_of(
    ignored: Sequence[str], outcomes: Iterable[RequestOutcome] = (), parent: str | None = None
) -> dict[str, str]:
    """What every reply says in its headers. A stream has no point yet, and says where it began."""
    found = {"x-thaw-ignored": ",".join(ignored)} if ignored else {}
    points = [outcome.point for outcome in outcomes]
    if points:
        found["x-thaw-point"] = ",".join(points)
    if parent:
        found["x-thaw-parent"] = parent
    return found


class EventStream(Response):
    """A stream of events. When the client goes away, `gone` is called and nothing more is sent."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], gone: Callable[[], object], headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", **(headers or {})})
        del self.headers["content-length"]
        self.events, self._gone = events, gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sending = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                self._gone()
        finally:
            for task in (sending, gone):
                task.cancel()
            try:
                await sending
            except asyncio.CancelledError:
                pass
            except Exception as error:  # noqa: BLE001 - the log has it, without what the client said
                told(error, "a stream")

    async def _send(self, send: Send) -> None:
        """The events, and a comment whenever none came for a while: a proxy would take silence for the end."""
        clock = asyncio.get_running_loop().time
        last = clock()

        async def fill_pauses() -> None:
            nonlocal last
            while True:
                await asyncio.sleep(last + PAUSE_S - clock())
                if clock() - last >= PAUSE_S:
                    last = clock()
                    await send({"type": "http.response.body", "body": b": still here\n\n", "more_body": True})

        pausing = asyncio.create_task(fill_pauses())
        try:
            async for chunk in self.events:
                if not chunk:
                    continue
                last = clock()
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        finally:
            pausing.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def outcomes_of(request: Request, jobs: Sequence[ReplyJob]) -> list[RequestOutcome]:
    """What became of all jobs; the first error counts, and ends the others. Raises `ClientGone` when the client went
    away: then they are stopped."""
    gone = asyncio.create_task(disconnected(request.receive))
    all_done: asyncio.Future[list[RequestOutcome]] = asyncio.gather(*(asyncio.shield(job.outcome) for job in jobs))
    try:
        waited: set[asyncio.Future[Any]] = {gone, all_done}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not all_done.done():
            raise ClientGone
        return all_done.result()
    except BaseException:
        for job in jobs:
            job.stop()
        raise
    finally:
        gone.cancel()
        if not all_done.done():
            all_done.cancel()
            all_done.add_done_callback(lambda done: done.cancelled() or done.exception())


async def begun(jobs: Sequence[ReplyJob]) -> None:
    """Wait until the engine has taken all, so that an error is still a status; the first one ends the others."""
    try:
        for job in jobs:
            await asyncio.shield(job.begun)
    except BaseException:
        for job in jobs:
            job.stop()
        raise
