"""What clients of servers over HTTP have in common: the connection, a request as a stream, the mail, refusals."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator, Mapping
from typing import ClassVar, Generic, TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec

from thaw.core.errors import Busy, EngineDied, InvalidRequest, NotFound, ThawError
from thaw.core.text import is_text
from thaw.engines.served.client.mailbox_check import shared_mail
from thaw.engines.served.client.transport import Chunk, Submission, Transport
from thaw.engines.served.http_errors import error_text, server_message
from thaw.engines.served.mailbox import Mailbox
from thaw.engines.served.protocol import EngineFacts, Message

JSON = {"Content-Type": "application/json"}
CONNECT_LIMIT_S = 30.0
HELLO_LIMIT_S = 120.0
"""A busy server answers late; one that is starting does not listen yet."""
AT_ONCE = 2
"""News of one stream that are read before others of the event loop go on. Without an end to that, answers that the
server has ready would be read to their last token before anything else that this client has to say or to hear."""


class Call:
    """One request under way. `opened`: the server has taken it; `unwanted`: its end was asked for."""

    def __init__(self) -> None:
        self.news: asyncio.Queue[Chunk | BaseException | None] = asyncio.Queue()
        self.opened = asyncio.Event()
        self.unwanted = False
        self.task: asyncio.Task[None] | None = None


C = TypeVar("C", bound=Call)


class HttpTransport(Transport, Generic[C]):
    """Requests to one server, each a stream over a connection of its own. `url` is the server's."""

    title: ClassVar[str]
    route: ClassVar[str]
    """Where the server takes tokens."""
    shared_by: ClassVar[str] = ""
    """How an operator says where the mail is."""
    example: ClassVar[str]
    """An address of such a server."""
    call: type[C]

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = self.base_of(url)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._calls: dict[str, C] = {}

    @classmethod
    def base_of(cls, url: str) -> str:
        """`http://host:port[/path]`. Raises `InvalidRequest` for what is no address."""
        try:
            parts = urlsplit(url)
            sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and is_text(url)
        except ValueError:  # no port, or no address in brackets
            sound = False
        if not sound:
            raise InvalidRequest(f"{url!r} is not the address of a server; give one such as {cls.example}")
        return url.rstrip("/")

    def _open(self) -> None:
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers=self._headers,
            timeout=httpx.Timeout(None, connect=CONNECT_LIMIT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0),
            trust_env=not _is_loopback(self.url),
        )

    @abc.abstractmethod
    def _body(self, submission: Submission) -> dict[str, object]:
        """The request's JSON."""

    @abc.abstractmethod
    def _chunk(self, data: bytes, call: C) -> Chunk | None:
        """What an event of the stream says. Raises what the server refused."""

    async def _in_turn(self, message: Message, call: C) -> None:
        """Wait until the request may be sent."""

    def _is_read(self, call: C) -> bool:
        """Whether an open stream is read; one that is not is closed."""
        return True

    async def stream(self, submission: Submission) -> AsyncIterator[Chunk]:
        call = self._calls[submission.name] = self.call()
        call.task = asyncio.create_task(self._follow(submission, call))
        try:
            while (news := await call.news.get()) is not None:
                if isinstance(news, BaseException):
                    raise news
                yield news
        finally:
            self._calls.pop(submission.name, None)
            await end(call.task)

    async def _follow(self, submission: Submission, call: C) -> None:
        """The request from beginning to end; it ends early when it is cancelled, which closes the connection."""
        failed: BaseException | None = None
        try:
            body = msgspec.json.encode(self._body(submission))  # 60,000 tokens: 0.3 ms; by httpx's own encoder 6
            request = self._client.build_request("POST", self.route, content=body, headers=JSON)
            await self._in_turn(submission.message, call)
            async with contextlib.aclosing(await self._client.send(request, stream=True)) as response:
                if response.status_code != 200:
                    raise self._refusal(response.status_code, await response.aread())
                call.opened.set()
                if self._is_read(call):
                    await self._pass_on(response, call)
        except httpx.HTTPError as error:
            failed = EngineDied(
                f"the server at {self.url} went away ({error_text(error)}); start it again and hydrate from a commit"
            )
        except ThawError as error:
            failed = error
        finally:
            call.opened.set()
            if call.unwanted and not isinstance(failed, ThawError):
                call.news.put_nowait(Chunk(finish_reason="abort"))
            call.news.put_nowait(failed)

    async def _pass_on(self, response: httpx.Response, call: C) -> None:
        ended = False
        async for line in _lines(response):
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            chunk = self._chunk(data, call)
            if chunk is not None:
                ended = ended or chunk.finish_reason is not None
                call.news.put_nowait(chunk)
                if call.news.qsize() >= AT_ONCE:
                    await asyncio.sleep(0)
        if not ended:
            raise httpx.RemoteProtocolError("the stream ended in the middle")

    def _refusal(self, status: int, content: bytes) -> ThawError:
        """The server's error as one of thaw's."""
        message = server_message(content)
        if status in (401, 403):
            return InvalidRequest(
                f"{self.url} refused the API key ({status}): give the server's own as api_key (--api-key, or "
                "the variable THAW_API_KEY)"
            )
        if status == 404:
            said = message or f"no {self.route} there"
            return NotFound(f"{self.url}: {said}; give the address of a {self.title} server")
        if status in (429, 503):
            return Busy(f"the server at {self.url} takes no requests now ({status}: {message}); try again later")
        if status < 500:
            return InvalidRequest(f"the server at {self.url} refused the request ({status}): {message}")
        return EngineDied(f"the server at {self.url} failed ({status}: {message}); its log says why")

    def _shared(self, said: Mapping[str, str]) -> tuple[Mailbox, EngineFacts]:
        """The engine's mail, looked at from here."""
        return shared_mail(said, f"the engine at {self.url}", self.shared_by)

    async def close(self) -> None:
        for call in list(self._calls.values()):
            if call.task is not None:
                await end(call.task)
        if hasattr(self, "_client"):
            await self._client.aclose()


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """The whole lines of a stream of events. They end with a line feed; httpx's own also end at U+0085, U+2028 and
    others, which servers write as they are inside the JSON of an event, where a model has said them."""
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line


async def end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
