"""Answers from a gateway (`thaw serve`), over its Chat Completions.

A request names the deepest point of the messages that fits them (`thaw.point`) and sends only the messages behind it.
Without one it sends all, and the gateway finds the prefix by its tokens. A point that the gateway cannot use (another
model, gone) costs a second request, without it, and the answer's record says so.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, ClassVar, NoReturn

import httpx
import msgspec

from thaw.core import errors
from thaw.core.errors import EngineDied, InvalidRequest, ThawError
from thaw.core.sampling import Sampling
from thaw.integrations.langgraph.asking import AnswerPart, CallMade, ChatAnswer, ChatAsk
from thaw.integrations.langgraph.messages import CarriedPoint

UNUSABLE = frozenset({"not-found", "refused", "identity-mismatch", "policy-mismatch", "not-kept", "stale-session"})
"""Kinds of errors about a point that all other messages make up for."""


class GatewaySource:
    """`model` "" takes the gateway's own. `timeout_s`: until an answer, or in a stream its next piece, is there."""

    def __init__(self, base_url: str, api_key: str, model: str, timeout_s: float) -> None:
        root = _checked_url(base_url).rstrip("/")
        if not _is_sendable(api_key):
            raise InvalidRequest("api_key: must be printable ASCII characters, as a header can carry them")
        self._url = f"{root if root.endswith('/v1') else f'{root}/v1'}/chat/completions"
        self._model = model
        self._options: dict[str, Any] = {"headers": {"Authorization": f"Bearer {api_key}"}, "timeout": timeout_s}
        self._client = httpx.Client(**self._options)

    @property
    def model(self) -> str:
        return self._model

    def require_structured(self) -> None:
        """The gateway says whether its engine can, when it is asked."""

    def close(self) -> None:
        """Close its connections; a later call makes new ones."""
        client, self._client = self._client, httpx.Client(**self._options)
        client.close()

    # -- answers

    def answers(self, ask: ChatAsk) -> list[ChatAnswer]:
        with self._unreachable():
            for body, said in self._attempts(ask):
                reply = self._client.post(self._url, json=body)
                if reply.is_success:
                    return _answers(reply.json(), said.pop("reread", None))
                said["reread"] = _refusal(reply.status_code, reply.content, body)
        raise AssertionError("the last attempt names no point, and raises")

    async def aanswers(self, ask: ChatAsk) -> list[ChatAnswer]:
        with self._unreachable():
            async with httpx.AsyncClient(**self._options) as client:
                for body, said in self._attempts(ask):
                    reply = await client.post(self._url, json=body)
                    if reply.is_success:
                        return _answers(reply.json(), said.pop("reread", None))
                    said["reread"] = _refusal(reply.status_code, reply.content, body)
        raise AssertionError("the last attempt names no point, and raises")

    def stream(self, ask: ChatAsk) -> Iterator[AnswerPart | ChatAnswer]:
        with self._unreachable():
            for body, said in self._attempts(ask):
                with self._client.stream("POST", self._url, json=_streamed(body)) as reply:
                    if reply.is_success:
                        events = EventReader(said.pop("reread", None))
                        for line in reply.iter_lines():
                            yield from events.read(line)
                        yield events.answer()
                        return
                    said["reread"] = _refusal(reply.status_code, reply.read(), body)

    async def astream(self, ask: ChatAsk) -> AsyncIterator[AnswerPart | ChatAnswer]:
        with self._unreachable():
            async with httpx.AsyncClient(**self._options) as client:
                for body, said in self._attempts(ask):
                    async with client.stream("POST", self._url, json=_streamed(body)) as reply:
                        if reply.is_success:
                            events = EventReader(said.pop("reread", None))
                            async for line in reply.aiter_lines():
                                for part in events.read(line):
                                    yield part
                            yield events.answer()
                            return
                        said["reread"] = _refusal(reply.status_code, await reply.aread(), body)

    @contextlib.contextmanager
    def _unreachable(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            raise EngineDied(
                f"the gateway at {self._url} gave no answer: {type(error).__name__}: {error}. Is `thaw serve` running "
                "there? Raise timeout_s if answers take longer."
            ) from error

    # -- requests

    def _attempts(self, ask: ChatAsk) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """(body, what the record will say): from the deepest point and, where that cannot be used, from none."""
        said: dict[str, Any] = {}
        for one in ask.carried:
            if one.intact and one.count < len(ask.messages):
                yield self._body(ask, one), said
                break
        yield self._body(ask, None), said

    def _body(self, ask: ChatAsk, at: CarriedPoint | None) -> dict[str, Any]:
        point = {} if at is None else {"point": at.commit}
        return {
            **({"model": self._model} if self._model else {}),
            "messages": list(ask.messages if at is None else ask.messages[at.count :]),
            "thaw": {"note": ask.note, "keep_sampled": ask.keep_sampled, **point},
            **_sampling(ask.sampling),
            **({"tools": list(ask.tools)} if ask.tools else {}),
            **({"chat_template_kwargs": ask.variables} if ask.variables else {}),
            **({"n": ask.n, "logprobs": True} if ask.n > 1 else {}),
        }


def _checked_url(url: str) -> str:
    """Raises `InvalidRequest` unless it is one of a gateway."""
    try:
        scheme = httpx.URL(url).scheme
    except httpx.InvalidURL:
        scheme = ""
    if scheme not in ("http", "https"):
        raise InvalidRequest(f"base_url={ascii(url)[:200]}: must be a gateway's address, such as http://127.0.0.1:8790")
    return url


def _is_sendable(key: str) -> bool:
    return key.isascii() and (not key or key.isprintable())


def _sampling(sampling: Sampling) -> dict[str, Any]:
    """Fields that are not as by default, in the API's names. Raises `InvalidRequest` for what it has no name for."""
    given: dict[str, Any] = msgspec.to_builtins(sampling, enc_hook=int)
    for name in ("entropy", "logprobs"):
        if given.pop(name, None):
            raise InvalidRequest(f"sampling.{name}: not over a gateway; leave it out")
    if sampling.logit_bias:
        given["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    return {**given, "max_tokens": sampling.max_tokens}


def _streamed(body: Mapping[str, Any]) -> dict[str, Any]:
    return {**body, "stream": True, "stream_options": {"include_usage": True}}


# -- replies


def _refusal(status: int, content: bytes, body: Mapping[str, Any]) -> dict[str, object]:
    """Why the point cannot be used, for a record. Raises any other problem as thaw's own error."""
    try:
        problem = json.loads(content)["error"]
        kind, why = str(problem.get("code") or "").replace("_", "-"), str(problem.get("message"))
    except (ValueError, KeyError, TypeError, AttributeError):
        kind, why = "", content[:200].decode(errors="replace")
    if kind in UNUSABLE and "point" in body["thaw"]:
        found: dict[str, object] = {"kind": kind, "why": why}
        return found
    _raise(kind, f"the gateway answered {status}: {why}", status)


def _raise(kind: str, message: str, status: int) -> NoReturn:
    kinds = {one.kind: one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, ThawError)}
    raise kinds.get(kind, InvalidRequest if 400 <= status < 500 else ThawError)(message)


def _answers(reply: dict[str, Any], why: object) -> list[ChatAnswer]:
    record = _record(reply["thaw"], why)
    return [_answer(choice, reply["usage"], record, first=i == 0) for i, choice in enumerate(reply["choices"])]


def _record(told: Mapping[str, Any], why: object) -> dict[str, object]:
    found = {name: value for name, value in told.items() if name not in ("points", "prompt_tokens")}
    return {**found, **({} if why is None else {"reread": why})}


def _answer(
    choice: Mapping[str, Any], usage: Mapping[str, Any], record: Mapping[str, object], *, first: bool
) -> ChatAnswer:
    """Of several choices the first has the prompt, which the gateway counts once for all."""
    message, prompt = choice["message"], usage["prompt_tokens"] if first else 0
    cached = usage["prompt_tokens_details"]["cached_tokens"] if first else 0
    logprobs = [one["logprob"] for one in (choice.get("logprobs") or {}).get("content") or ()]
    mean = {"mean_logprob": math.fsum(logprobs) / len(logprobs)} if logprobs else {}
    shared = record if first else {name: value for name, value in record.items() if not name.endswith("_tokens")}
    return ChatAnswer(
        text=message.get("content") or "",
        calls=tuple(_call(one) for one in message.get("tool_calls") or ()),
        finish_reason=choice["finish_reason"],
        num_prompt=prompt,
        num_cached=cached,
        num_completion=len(logprobs) or usage["completion_tokens"],
        record={**shared, "point": choice["thaw"]["point"], **mean},
    )


def _call(call: Mapping[str, Any]) -> CallMade:
    return CallMade(id=call["id"], name=call["function"]["name"], arguments=call["function"]["arguments"])


class EventReader:
    """A stream's events, one line after the other; `answer` at its end."""

    DATA: ClassVar[str] = "data: "

    def __init__(self, why: object) -> None:
        self._why = why
        self._text = ""
        self._calls: list[CallMade] = []
        self._finish = "abort"
        self._last: dict[str, Any] | None = None

    def read(self, line: str) -> Iterator[AnswerPart]:
        """Raises what the stream ends with, where it ends with an error."""
        if not line.startswith(self.DATA) or line == f"{self.DATA}[DONE]":
            return
        event = json.loads(line.removeprefix(self.DATA))
        if "error" in event:
            problem = event["error"]
            kind = str(problem.get("code") or "").replace("_", "-")
            _raise(kind, f"the gateway's stream ended: {problem.get('message')}", 500)
        if "usage" in event:
            self._last = event
        for choice in event["choices"]:
            self._finish = choice["finish_reason"] or self._finish
            yield from self._parts(choice["delta"])

    def _parts(self, delta: Mapping[str, Any]) -> Iterator[AnswerPart]:
        if delta.get("content"):
            self._text += delta["content"]
            yield AnswerPart(text=delta["content"])
        for one in delta.get("tool_calls") or ():
            self._calls.append(_call(one))
            yield AnswerPart(call=self._calls[-1])

    def answer(self) -> ChatAnswer:
        if self._last is None:
            raise EngineDied("the gateway's stream ended before its last event; ask again")
        usage, told = self._last["usage"], self._last["thaw"]
        return ChatAnswer(
            text=self._text,
            calls=tuple(self._calls),
            finish_reason=self._finish,
            num_prompt=usage["prompt_tokens"],
            num_cached=usage["prompt_tokens_details"]["cached_tokens"],
            num_completion=usage["completion_tokens"],
            record=_record(told, self._why),
        )
