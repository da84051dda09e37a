"""One client's connection: what it may cost before, beside and after its requests.

    too slow     a request's headers must be there in time, and a reply must be read on
    ambiguous    a request that two servers could read as two different ones is refused: Transfer-Encoding (with or
                 without Content-Length), header lines that end without a carriage return
    too many     beyond a number of connections, the one that has waited longest for a request is dropped

A client that is refused here has sent no request that could be read, so it gets a plain 400 and is hung up on.
"""

from __future__ import annotations

import asyncio
import logging
import re
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from thaw.gateway.settings import Limits

log = logging.getLogger("thaw.gateway")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_END_OF_HEAD = re.compile(rb"\n\r?\n")
_SHARE_OF_FILES = 0.6
"""Of the files that this process may open; the rest is the repository's."""


class _StrictConnection(h11.Connection):
    """Takes requests that end where a Content-Length says. Tiny chunks would cost far more than they hold."""

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request) and any(name == b"transfer-encoding" for name, _ in event.headers):
            raise h11.RemoteProtocolError("Transfer-Encoding is not accepted")
        return event


class Guards:
    """What the connections of one server share."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        unlimited = files == resource.RLIM_INFINITY
        self.most = limits.connections if unlimited else min(limits.connections, int(files * _SHARE_OF_FILES))
        self.open: set[GuardedConnection] = set()
        self.idle: dict[GuardedConnection, None] = {}
        """Those without a request, in the order in which they came to be so."""

    def connect(self, **options: Any) -> GuardedConnection:
        """As uvicorn calls a protocol's class."""
        return GuardedConnection(self, **options)

    def make_room(self) -> None:
        if len(self.open) > self.most:
            oldest = next(iter(self.idle))
            del self.idle[oldest]
            oldest.drop()


class GuardedConnection(H11Protocol):
    def __init__(self, guards: Guards, **options: Any) -> None:
        super().__init__(**options)
        self._guards = guards
        self.conn = _StrictConnection(h11.SERVER, guards.limits.head_nbytes)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tail = b""
        """The last bytes of headers that are still coming."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._guards.open.add(self)
        self._watch()
        self._guards.make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._guards.open.discard(self)
        self._guards.idle.pop(self, None)
        for name in list(self._timers):
            self._cancel(name)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE and self._has_bare_line_feed(data):
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("A line of the headers ends without a carriage return.")
            return
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start("read", self._guards.limits.stall_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel("read")

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._start("read", self._guards.limits.stall_s)

    def drop(self) -> None:
        """At once, with whatever was not yet read by the client."""
        self.transport.abort()

    def _watch(self) -> None:
        """Start or end the waits that the connection's state calls for."""
        limits = self._guards.limits
        answered = self.cycle is None or self.cycle.response_complete
        if self.conn.their_state is h11.IDLE and answered:
            self._guards.idle.setdefault(self)
            if self.timeout_keep_alive_task is None:
                self._start("head", limits.head_s)
        else:
            self._guards.idle.pop(self, None)
            self._cancel("head")
        if self.conn.their_state is h11.SEND_BODY and answered:
            self._start("rest", limits.body_s)
        else:
            self._cancel("rest")

    def _start(self, name: str, seconds: float) -> None:
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(seconds, self.drop)

    def _cancel(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def _has_bare_line_feed(self, data: bytes) -> bool:
        """In what `data` has of the headers, which may come in any pieces."""
        seen = self._tail + data
        end = _END_OF_HEAD.search(seen)
        head = seen if end is None else seen[: end.end()]
        found = _BARE_LF.search(head, len(self._tail)) is not None
        self._tail = head[-3:] if end is None else b""
        return found
