"""What a request to SGLang and its news look like, over HTTP and to an `sglang.Engine` alike.

A request carries thaw's message in `kv_hints`. What thaw inside SGLang says comes through the mail; only the first
question, where the mail is, is answered in the reply.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

import msgspec

from thaw.engines.served import protocol
from thaw.engines.served.client.transport import Chunk, Submission
from thaw.engines.served.sampling_extra import EXTRA
from thaw.engines.sglang.settings import ACTION, REFUSED


class Meta(msgspec.Struct):
    finish_reason: dict[str, Any] | None = None
    completion_tokens: int = 0
    cached_tokens: int | None = None
    output_token_logprobs: list[tuple[float | None, int, str | None]] = []
    output_top_logprobs: list[list[tuple[float, int, str | None]] | None] = []


class StreamEvent(msgspec.Struct):
    """One event of the stream, or a whole reply."""

    output_ids: list[int] = []
    meta_info: Meta | None = None
    error: Any = None


def request(submission: Submission, *, stream: bool = True) -> dict[str, Any]:
    """The fields of SGLang's `GenerateReqInput`."""
    fields = dict(submission.sampling)
    payload: dict[str, Any] = {"message": msgspec.to_builtins(submission.message)}
    extra = fields.pop(EXTRA, None)
    if extra is not None:
        payload["sampling"] = extra
    action = {"action_id": "0", "action_type": ACTION, "action_version": "1", "payload": payload}
    wanted = fields.pop("logprobs", None)
    return {
        "rid": submission.name,
        "input_ids": submission.tokens,
        "sampling_params": fields,
        "stream": stream,
        "return_logprob": wanted is not None,
        "top_logprobs_num": wanted or 0,
        "extra_key": submission.salt,
        "kv_hints": {"protocol_version": "1", "message_id": submission.name, "actions": [action]},
    }


def hello() -> dict[str, Any]:
    """The first question: which mail folder the engine uses. Where thaw is not, it is one token of a plain request."""
    message = protocol.Hello(id=secrets.token_hex(16))
    one = {"temperature": 0.0, "max_new_tokens": 1, "ignore_eos": True}
    return request(Submission(message.id, [0], one, None, message), stream=False)


def facts(news: StreamEvent) -> Mapping[str, str]:
    """What thaw inside SGLang said to `hello`; nothing where it is not there."""
    reason = news.meta_info.finish_reason if news.meta_info is not None else None
    try:
        found = json.loads((reason or {}).get("message") or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def chunk(news: StreamEvent, meta: Meta, seen: int) -> Chunk:
    """What is new after `seen` tokens. SGLang repeats all tokens with every event unless it streams increments."""
    reason = meta.finish_reason or {}
    count = 0 if str(reason.get("message")).startswith(REFUSED) else max(0, meta.completion_tokens - seen)
    return Chunk(
        token_ids=tuple(_last(news.output_ids, count)),
        logprobs=tuple(_number(entry[0]) for entry in _last(meta.output_token_logprobs, count)),
        tops=tuple(_tops(step) for step in _last(meta.output_top_logprobs, count)) or ((),) * count,
        finish_reason=reason.get("type"),
        more={} if meta.cached_tokens is None else {"num_cached_tokens": meta.cached_tokens},
    )


def _last(values: list[Any], count: int) -> list[Any]:
    return values[len(values) - count :] if count else []


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _tops(step: list[tuple[float, int, str | None]] | None) -> tuple[tuple[int, float], ...]:
    return tuple((token, value) for value, token, _ in step or ())
