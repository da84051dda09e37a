"""Over HTTP: the stock OpenAI server, through plain requests to /v1/completions.

A request is a stream. To abort it is to close the stream: the server notices and takes the request out of the engine.
Streams do not carry what the connector says at the end; it comes through the mail (`protocol.Run.mail`), which client
and engine share as they share the store. Log probabilities travel as JSON numbers and come out with the same bits.

Data parallel: a transport keeps to one engine, the one that answered first (or `rank`), because that engine's memory
holds its sessions; `other_ranks` are the others of the same server (`fleet.Fleet` uses all).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Mapping
from typing import Any, ClassVar

import httpx
import msgspec
import rfc8785

from thaw.core.errors import EngineDied, InvalidRequest, NotFound, TimedOut, Unsupported
from thaw.engines.served import protocol
from thaw.engines.served.client import http
from thaw.engines.served.client.http import HELLO_LIMIT_S, Call
from thaw.engines.served.client.transport import Chunk, Submission
from thaw.engines.served.http_errors import error_text, server_message
from thaw.engines.served.mailbox import ranks_beside
from thaw.engines.served.protocol import Message

log = logging.getLogger("thaw.vllm")
RANK_HEADER = "X-data-parallel-rank"
RELOAD_LIMIT_S = 600.0
MODELS, LOAD_ADAPTER = "/v1/models", "/v1/load_lora_adapter"
TURN_LIMIT_S = 2.0
"""A server that does not say that it has taken a request gets the next of its group after this long all the same."""
_TOKEN = "token_id:"
_PLAIN = {
    "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "n": 1,
}  # fmt: skip
"""Said always: what is left out, the server takes from the model's generation config."""


class _Card(msgspec.Struct):
    id: str
    root: str | None = None
    parent: str | None = None


class _Models(msgspec.Struct):
    data: list[_Card] = []


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens_details: _Details | None = None


class _Error(msgspec.Struct):
    message: str = ""
    type: str | None = None
    code: int | str | None = None


class _News(msgspec.Struct):
    """One event of the stream, or a whole reply."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None
    kv_transfer_params: dict[str, Any] | None = None


class VllmHttpTransport(http.HttpTransport[Call]):
    """`url` is the server's, with or without /v1. `rank` chooses one engine of a data-parallel server."""

    title: ClassVar[str] = "vLLM"
    route: ClassVar[str] = "/v1/completions"
    example: ClassVar[str] = "http://localhost:8000"
    shared_by: ClassVar[str] = " (option `mail` of `thaw engine config vllm`)"
    call = Call

    def __init__(self, url: str, api_key: str | None = None, *, rank: int | None = None) -> None:
        super().__init__(url, api_key)
        self._rank = rank
        self._opening: dict[str, Call] = {}
        self.other_ranks: tuple[int, ...] = ()
        """Engines of the same server that this client does not use."""

    @classmethod
    def base_of(cls, url: str) -> str:
        return super().base_of(url).removesuffix("/v1")

    async def connect(self) -> None:
        self._open()
        if self._rank is not None:
            self._client.headers[RANK_HEADER] = str(self._rank)
        said = await self._hello()
        self.mail, self.facts = self._shared(said)
        if self.mail.folder.name.startswith("dp"):
            await self._keep_to_rank(self.facts.data_parallel_rank)

    async def _hello(self) -> Mapping[str, str]:
        """Which mail folder the engine uses, and its process. Raises `NotFound` for a server that is none of thaw's."""
        message = protocol.Hello(id=secrets.token_hex(16))
        body = {**_PLAIN, "prompt": [0], "max_tokens": 1, "kv_transfer_params": protocol.params(message)}
        try:
            reply = await self._client.post(self.route, json=body, timeout=HELLO_LIMIT_S)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise NotFound(
                f"no server at {self.url} ({error}): is it running, and has it finished starting? "
                "`thaw engine config vllm` writes the file to start one with"
            ) from None
        except httpx.TimeoutException:
            raise TimedOut(f"the server at {self.url} did not answer within {HELLO_LIMIT_S:.0f} s") from None
        except httpx.HTTPError as error:
            raise EngineDied(f"{self.url}: {error_text(error)}") from None
        if reply.status_code != 200:
            raise self._refusal(reply.status_code, reply.content)
        answer = (_read(reply.content).kv_transfer_params or {}).get(protocol.KEY) or {}
        facts: Mapping[str, str] = answer.get("facts") or {}
        if "mail" not in facts:
            raise NotFound(
                f"the vLLM at {self.url} runs without thaw's connector: start it with the file that "
                "`thaw engine config vllm` writes (--config FILE)"
            )
        return facts

    async def _keep_to_rank(self, rank: int) -> None:
        """All requests go to the engine that answered. A server of one rank alone takes no header."""
        self.other_ranks = tuple(other for other in ranks_beside(self.mail.folder) if other != rank)
        self._client.headers[RANK_HEADER] = str(rank)
        try:
            said = await self._hello()
        except InvalidRequest:
            del self._client.headers[RANK_HEADER]
            said = await self._hello()
        if said["mail"] != str(self.mail.folder):
            raise NotFound(f"{self.url}: requests for data-parallel rank {rank} reach another engine ({said['mail']})")
        log.info("thaw: %s: data-parallel rank %d; others: %s", self.url, rank, self.other_ranks)

    def _body(self, submission: Submission) -> dict[str, Any]:
        """The request's JSON. What thaw tells its logits processor goes as text: the server takes no mappings there."""
        fields = dict(submission.sampling)
        extra = fields.pop("extra_args", {})
        body: dict[str, Any] = {
            **_PLAIN,
            **fields,
            "prompt": submission.tokens,
            "request_id": submission.name,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
            "kv_transfer_params": protocol.params(submission.message),
        }
        if extra:
            body["vllm_xargs"] = {name: rfc8785.dumps(value).decode() for name, value in extra.items()}
        if submission.adapter is not None:
            body["model"] = submission.adapter.name
        if submission.salt is not None:
            body["cache_salt"] = submission.salt
        return body

    async def _in_turn(self, message: Message, call: Call) -> None:
        """Requests go over connections of their own: one that names a record waits until the server has taken the one
        that makes it, and one of a group until it has taken the one before, because the batch's rows are in the order
        in which they come."""
        names = [getattr(message, field, None) for field in ("record", "source")]
        makers = [self._opening[name] for name in names if name in self._opening]
        group = getattr(message, "group", None)
        before = self._opening.get(group) if group is not None else None
        for name in (names[0], group):
            if name is not None:
                self._opening[name] = call
        for maker in makers:
            await maker.opened.wait()
        if before is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(before.opened.wait(), TURN_LIMIT_S)

    def _is_read(self, call: Call) -> bool:
        return not call.unwanted

    async def _follow(self, submission: Submission, call: Call) -> None:
        try:
            await super()._follow(submission, call)
        finally:
            for name in [name for name, last in self._opening.items() if last is call]:
                del self._opening[name]

    def _chunk(self, data: bytes, call: Call) -> Chunk | None:
        news = _read(data)
        if news.error is not None:
            if news.error.type == "InternalServerError" and news.error.message == "Internal server error":
                return Chunk(finish_reason="error")
            raise self._refusal(int(news.error.code or 500), msgspec.json.encode({"error": news.error}))
        if not news.choices:
            details = news.usage.prompt_tokens_details if news.usage is not None else None
            cached = details.cached_tokens if details is not None else None
            return Chunk(more={"num_cached_tokens": cached}) if cached is not None else None
        one = news.choices[0]
        logprobs = one.logprobs or _Logprobs([], [])
        return Chunk(
            token_ids=tuple(one.token_ids or ()),
            logprobs=tuple(_number(value) for value in logprobs.token_logprobs),
            tops=tuple(_tops(step) for step in logprobs.top_logprobs),
            finish_reason=one.finish_reason,
        )

    async def adapters(self) -> dict[str, str]:
        try:
            reply = await self._client.get(MODELS)
        except httpx.HTTPError as error:
            raise EngineDied(f"{self.url}: {error_text(error)}") from None
        if reply.status_code != 200:
            raise self._refusal(reply.status_code, reply.content)
        cards = msgspec.json.decode(reply.content, type=_Models).data
        return {card.id: card.root for card in cards if card.parent is not None and card.root}

    async def load_adapter(self, name: str, folder: str) -> None:
        try:
            said = {"lora_name": name, "lora_path": folder}
            reply = await self._client.post(LOAD_ADAPTER, json=said, timeout=RELOAD_LIMIT_S)
        except httpx.HTTPError as error:
            raise EngineDied(f"{self.url}: {error_text(error)}") from None
        if reply.status_code == 404:
            raise Unsupported(
                f"the server at {self.url} loads no adapters while it runs: start it with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, or with the adapter (--lora-modules NAME=FOLDER)"
            )
        if reply.status_code != 200:
            raise InvalidRequest(f"{self.url} refused adapter {name!r}: {server_message(reply.content)}")

    async def reload_weights(self, folder: str) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        for route, said in (("/collective_rpc", body), ("/reset_prefix_cache", {})):
            await self._operate(route, said, "change its weights", f"the weights of {folder}")

    async def sleep(self, level: int) -> None:
        await self._operate(f"/sleep?level={level}", {}, "put it to sleep", "to sleep")

    async def wake(self, level: int) -> None:
        """The weights first: requests of others run once all is there."""
        if level > 1:
            await self._operate("/wake_up?tags=weights", {}, "wake it", "to wake up")
            await self.reload_weights(self.facts.model)
        await self._operate("/wake_up" if level == 1 else "/wake_up?tags=kv_cache", {}, "wake it", "to wake up")

    async def _operate(self, route: str, said: dict[str, Any], act: str, what: str) -> None:
        """One of the routes that the server has in its development mode."""
        try:
            reply = await self._client.post(route, json=said, timeout=RELOAD_LIMIT_S)
        except httpx.HTTPError as error:
            raise EngineDied(f"{self.url}: {error_text(error)}") from None
        if reply.status_code == 404:
            raise Unsupported(f"the server at {self.url} lets nobody {act}: start it with VLLM_SERVER_DEV_MODE=1")
        if reply.status_code != 200:
            raise InvalidRequest(f"{self.url} refused {what}: {server_message(reply.content)}")

    async def abort(self, name: str) -> None:
        call = self._calls.get(name)
        if call is None or call.task is None:
            return
        call.unwanted = True
        if call.opened.is_set():
            await http.end(call.task)


_NEWS = msgspec.json.Decoder(_News)


def _read(data: bytes) -> _News:
    try:
        return _NEWS.decode(data)
    except msgspec.MsgspecError as error:
        raise EngineDied(f"the server sent what is not vLLM's: {error}") from None


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _tops(step: dict[str, float | None] | None) -> tuple[tuple[int, float], ...]:
    return tuple((int(token.removeprefix(_TOKEN)), _number(value)) for token, value in (step or {}).items())
