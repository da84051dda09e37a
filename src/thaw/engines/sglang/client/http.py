"""Over HTTP: the stock server, through plain requests to its own route /generate.

A request is a stream, and carries thaw's message in `kv_hints`. What thaw inside SGLang says comes through the mail,
which client and engine share as they share the store; only the first question, where the mail is, is answered in the
reply. Log probabilities travel as JSON numbers and come out with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import httpx
import msgspec

from thaw.core.errors import EngineDied, NotFound, TimedOut
from thaw.engines.served.client import http
from thaw.engines.served.client.http import HELLO_LIMIT_S, Call
from thaw.engines.served.client.transport import Chunk, Submission
from thaw.engines.served.http_errors import error_text
from thaw.engines.sglang.client import wire


class _Call(Call):
    """`seen`: tokens passed on."""

    seen = 0


class SglangHttpTransport(http.HttpTransport[_Call]):
    """`url` is the server's."""

    title: ClassVar[str] = "SGLang"
    route: ClassVar[str] = "/generate"
    example: ClassVar[str] = "http://localhost:30000"
    call = _Call

    async def connect(self) -> None:
        self._open()
        self.mail, self.facts = self._shared(await self._hello())

    async def _hello(self) -> Mapping[str, str]:
        """Which mail folder the engine uses, and its process. Raises `NotFound` for a server that is none of thaw's."""
        try:
            reply = await self._client.post(self.route, json=wire.hello(), timeout=HELLO_LIMIT_S)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise NotFound(f"no server at {self.url} ({error}): is it running, and has it finished starting?") from None
        except httpx.TimeoutException:
            raise TimedOut(f"the server at {self.url} did not answer within {HELLO_LIMIT_S:.0f} s") from None
        except httpx.HTTPError as error:
            raise EngineDied(f"{self.url}: {error_text(error)}") from None
        if reply.status_code != 200:
            raise self._refusal(reply.status_code, reply.content)
        facts = wire.facts(_read(reply.content))
        if "mail" not in facts:
            raise NotFound(
                f"the SGLang at {self.url} runs without thaw's cache: start it with --radix-cache-backend thaw, and "
                "with thaw installed in its environment"
            )
        return facts

    def _body(self, submission: Submission) -> dict[str, Any]:
        return wire.request(submission)

    def _chunk(self, data: bytes, call: _Call) -> Chunk:
        news = _read(data)
        if news.error is not None or news.meta_info is None:
            raise self._refusal(400, msgspec.json.encode({"error": news.error}))
        chunk = wire.chunk(news, news.meta_info, call.seen)
        call.seen = max(call.seen, news.meta_info.completion_tokens)
        return chunk

    async def abort(self, name: str) -> None:
        """Ask for its end; the stream then ends by itself, with what the engine says."""
        call = self._calls.get(name)
        if call is None or call.task is None:
            return
        call.unwanted = True
        try:
            await self._client.post("/abort_request", json={"rid": name})
        except httpx.HTTPError:
            return  # the stream tells what happened

    async def post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """One of the server's own routes. Raises `InvalidRequest` when it says no."""
        try:
            reply = await self._client.post(route, json=body)
        except httpx.HTTPError as error:
            raise EngineDied(f"{self.url}: {error_text(error)}") from None
        if reply.status_code != 200:
            raise self._refusal(reply.status_code, reply.content)
        try:
            found = reply.json()
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


_NEWS = msgspec.json.Decoder(wire.StreamEvent)


def _read(data: bytes) -> wire.StreamEvent:
    try:
        return _NEWS.decode(data)
    except msgspec.MsgspecError as error:
        raise EngineDied(f"the server sent what is not SGLang's: {error}") from None
