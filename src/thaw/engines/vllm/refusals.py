"""Why a request of thaw's was refused, in the reply of vLLM's server: a middleware (`middleware` of the one file).

vLLM has one answer to a request that its engine ended with an error: status 500 and "Internal server error", as a reply
or as an event of a stream (up to 0.29 a stream ends without one). The connector has left the reason in the mail; here
it takes the answer's place, with the status that it stands for. All other replies pass as they come, and nothing is
kept of requests without a message of thaw's. Streams of thaw's own clients pass, too: they read the mail themselves.

The mail is by the message's id, so of two requests under way with the same one the later is refused here.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from thaw.core.errors import InvalidRequest, NotFound, ThawError
from thaw.engines.error_kinds import made
from thaw.engines.served import protocol
from thaw.engines.served.http_errors import http_status
from thaw.engines.served.protocol import Answer, Message
from thaw.engines.vllm.client.async_llm import mail_folder
from thaw.engines.vllm.scheduler.commands import SAME_ID

Event: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Event]]
Send: TypeAlias = Callable[[Event], Awaitable[None]]
App: TypeAlias = Callable[[Event, Receive, Send], Awaitable[None]]
MARK = f'"{protocol.KEY}"'.encode()
"""In the body of every request that carries a message."""
NO_JSON = b"\0"
"""After any part of a body: the server does not take it."""
FAILED = b'"InternalServerError"'
"""In the event of a stream that ended with an error."""
DONE = b"data: [DONE]"
"""The last event of every stream."""


class Refusals:
    """Around the server's own application (ASGI)."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._under_way: set[str] = set()

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._under_way)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            exchange.ends()


class _Exchange:
    """One request and its reply. `under_way`: the ids of the messages of all that are."""

    def __init__(self, scope: Event, receive: Receive, send: Send, under_way: set[str]) -> None:
        self._scope, self._receive, self._send, self._under_way = scope, receive, send, under_way
        self._body: list[bytes] = []
        self._message: Message | None = None
        self._twice = False
        self._failed: Event | None = None
        self._said: list[bytes] = []

    async def receive(self) -> Event:
        event = await self._receive()
        if event["type"] == "http.request":
            self._body.append(event.get("body", b""))
            if not event.get("more_body") and MARK not in (body := b"".join(self._body)):
                self._body.clear()
            elif not event.get("more_body"):
                self._body = [body]
                self._message = _message(body)
                if not self._begins():
                    event = {**event, "body": NO_JSON}
        return event

    def _begins(self) -> bool:
        if self._message is None:
            return True
        self._twice = self._message.id in self._under_way
        self._under_way.add(self._message.id)
        return not self._twice

    def ends(self) -> None:
        if self._message is not None and not self._twice:
            self._under_way.discard(self._message.id)

    async def send(self, event: Event) -> None:
        if not self._body:
            await self._send(event)
        elif event["type"] == "http.response.start" and (event["status"] == 500 or self._twice):
            self._failed = event
        elif event["type"] == "http.response.body" and self._failed is not None:
            self._said.append(event.get("body", b""))
            if not event.get("more_body"):
                await self._end(self._failed)
        elif event["type"] == "http.response.body":
            await self._send(self._with_reason(event))
        else:
            await self._send(event)

    def _with_reason(self, event: Event) -> Event:
        """A part of a stream: where it ends with an error, the event of that says why."""
        body: bytes = event.get("body", b"")
        error = self._reason(streams=True) if FAILED in body or DONE in body else None
        if error is None:
            return event
        before, done, after = body.partition(DONE)
        kept = b"" if FAILED in before else before
        return {**event, "body": b"".join((kept, b"data: ", _body(error), b"\n\n", done, after))}

    async def _end(self, start: Event) -> None:
        """The reply as it was, or with the reason."""
        error = self._reason(streams=False)
        body = b"".join(self._said) if error is None else _body(error)
        if error is not None:
            kept = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
            length = (b"content-length", str(len(body)).encode())
            start = {**start, "status": http_status(error), "headers": [*kept, length]}
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})

    def _reason(self, *, streams: bool) -> ThawError | None:
        message = self._message
        if message is not None and self._twice:
            return InvalidRequest(f"id {message.id}: {SAME_ID}")
        if message is None or (streams and message.caller is not None):
            return None
        found = [_taken(letter) for folder in self._mails() for letter in folder.glob(f"{message.id}.*")]
        return next((made(answer.kind, answer.error) for answer in found if answer is not None and answer.kind), None)

    def _mails(self) -> list[Path]:
        try:
            base = mail_folder(self._scope["app"].state.vllm_config)
        except NotFound:
            return []
        return [place / "answers" for place in (base, *base.glob("dp*"))]


def _message(body: bytes) -> Message | None:
    try:
        return protocol.parse(json.loads(body).get("kv_transfer_params"))
    except (ValueError, AttributeError, RecursionError, ThawError):
        return None


_ANSWER = msgspec.json.Decoder(Answer)


def _taken(letter: Path) -> Answer | None:
    try:
        answer = _ANSWER.decode(letter.read_bytes())
        letter.unlink(missing_ok=True)
    except (OSError, msgspec.MsgspecError):
        return None
    return answer


def _body(error: ThawError) -> bytes:
    """As vLLM words its own."""
    said = {"message": str(error), "type": error.kind, "param": None, "code": http_status(error)}
    return json.dumps({"error": said}).encode()
