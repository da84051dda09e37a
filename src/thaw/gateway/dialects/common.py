"""What the dialects share: sampling fields, messages and tools in one form, log probabilities, thaw's own extension."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from thaw.core.errors import BadSampling
from thaw.core.sampling import Sampling, StructuredOutputs, derive
from thaw.engines.base import Codec, Engine, Message, Policy
from thaw.gateway.asked import RequestOutcome
from thaw.gateway.problems import ApiError, invalid, unsupported

HINTS = frozenset(
    {
        "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
        "service_tier", "session_id", "x_session_id", "client_metadata",
    }
)  # fmt: skip
"""Of OpenAI's fields those that can change no output: thaw finds prefixes by their tokens."""
MAX_SEED = (1 << 64) - 1
LONGEST = {"stop": 64, "stop_token_ids": 1024, "logit_bias": 1024, "bad_words": 64}
MAX_WORD = 4096
"""Characters of a stop string or a bad word."""


class Extension(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`thaw`, of every request: where to continue, after how many of its turns or tokens, and what to name the end.

    `point` is a branch, a tag, a commit or a point as thaw spells them. `note` is the commit's message.
    """

    point: str | None = None
    turn: int | None = None
    token: int | None = None
    branch: str | None = None
    note: str | None = None
    keep_sampled: bool = False
    policy: Policy = "exact"


class SamplingFields(msgspec.Struct, kw_only=True):
    """Fields of sampling: OpenAI's, and vLLM's beside them."""

    model: str = ""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    structured_outputs: dict[str, Any] | None = None
    thaw: Extension = Extension()


_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logit_bias", "stop", "stop_token_ids", "bad_words", "min_tokens", "ignore_eos", "structured_outputs",
)  # fmt: skip


def sampling_of(body: SamplingFields, engine: Engine, **more: object) -> Sampling:
    """`more`: fields that an endpoint calls otherwise. Raises `ApiError` naming the field."""
    given = {name: getattr(body, name) for name in _SAMPLING} | more
    given["seed"] = None if body.seed is None else body.seed & MAX_SEED
    _require_short(given)
    if body.min_tokens:
        given["max_tokens"] = max(body.min_tokens, Sampling().max_tokens)
    if given.get("structured_outputs") is not None and "structured" not in engine.info.capabilities:
        raise unsupported("structured_outputs", f"the engine {engine.info.name} cannot do it; leave it out")
    try:
        return Sampling(**{name: value for name, value in given.items() if value is not None})
    except BadSampling as error:
        name, _, why = str(error).partition("=")
        raise invalid(name, why) from None


def _require_short(given: Mapping[str, Any]) -> None:
    """Lists that are looked at for every token, and recorded with the turn, are short. Raises `ApiError`."""
    for name, most in LONGEST.items():
        value = given.get(name) or ()
        words = [value] if isinstance(value, str) else value
        if len(words) > most:
            raise invalid(name, f"it has {len(words):,} entries; at most {most:,}")
        longest = max((len(word) for word in words if isinstance(word, str)), default=0)
        if longest > MAX_WORD:
            raise invalid(name, f"one of them has {longest:,} characters; at most {MAX_WORD:,}")


def choices_of(sampling: Sampling, n: int) -> list[Sampling]:
    """One for each choice: with a seed, each has its own, the first the given one."""
    if n < 1:
        raise invalid("n", f"{n}; at least 1")
    seed = sampling.seed
    if seed is None:
        return [sampling] * n
    return [sampling if i == 0 else msgspec.structs.replace(sampling, seed=derive(int(seed), 0, i)) for i in range(n)]


def check_model(model: str, served: Sequence[str]) -> None:
    if model and model not in served and "*" not in served:
        raise ApiError(
            404,
            f"there is no model {model[:100]!r} here; use {served[0]!r}",
            code="model_not_found",
            param="model",
        )


def structured(format: Mapping[str, Any] | None, param: str, engine: Engine) -> dict[str, Any] | None:
    """`response_format` or `text.format` as thaw's structured outputs. Raises `ApiError` where the engine has none."""
    if format is not None and not isinstance(format, Mapping):
        raise invalid(param, "an object with a type")
    kind = "text" if format is None else format.get("type")
    if kind == "text":
        return None
    if kind not in ("json_schema", "json_object"):
        raise unsupported(param, f"type {str(kind)[:40]!r}; it is text, json_schema or json_object")
    if "structured" not in engine.info.capabilities:
        raise unsupported(param, f"the engine {engine.info.name} does not support structured output; leave it out")
    if kind == "json_object":
        return {"json": {"type": "object"}}
    assert format is not None
    inner = format.get("json_schema")
    schema = format.get("schema", inner.get("schema") if isinstance(inner, Mapping) else None)
    if not isinstance(schema, dict):
        raise invalid(param, "json_schema without a schema")
    return {"json": schema}


def effort_of(effort: object, param: str) -> dict[str, object]:
    """How hard to think, as the template variables that models' templates read; "none" is not at all."""
    if effort is None:
        return {}
    if not isinstance(effort, str):
        raise invalid(param, "it is a word, as low, medium or high")
    return {"reasoning_effort": effort} | ({"enable_thinking": False} if effort == "none" else {})


def unread_of(tools: Sequence[Mapping[str, Any]], fields: Iterable[str]) -> list[str]:
    """Those fields of tools that are not read here, for the header that names them."""
    return [f"tools.{name}" for name in fields if any(tool.get(name) not in (None, False, []) for tool in tools)]


# -- messages and tools

PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def content_of(content: object, where: str) -> object:
    """A message's content with nothing in it but text: one part is a string, marks of caches and ids are gone."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(where, "content is a string or a list of parts")
    parts = [{"type": "text", "text": _text(part, f"{where}[{i}]")} for i, part in enumerate(content)]
    return parts[0]["text"] if len(parts) == 1 else parts


def _text(part: object, where: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else None
    key = PARTS.get(kind) if isinstance(kind, str) else None
    if not isinstance(part, dict) or key is None or not isinstance(part.get(key), str):
        raise unsupported(where, f"a part of type {str(kind)[:40]!r}; only text is supported")
    text: str = part[key]
    return text


ROLES = {"developer": "system"}
"""Roles that templates call otherwise."""
_MESSAGE = ("name", "tool_calls", "tool_call_id", "function_call", "reasoning_content")


def message_of(message: object, where: str) -> Message:
    """A chat message with what templates read, and nothing else."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise invalid(where, "a message is an object with a role and content")
    role = message["role"]
    found: Message = {"role": ROLES.get(role, role)}
    if isinstance(message.get("reasoning"), str):
        message = {"reasoning_content": message["reasoning"], **message}
    content = content_of(message.get("content"), f"{where}.content")
    if content is not None:
        found["content"] = content
    return found | {name: message[name] for name in _MESSAGE if message.get(name) not in (None, [])}


def tools_of(tools: Sequence[Mapping[str, Any]] | None, where: str = "tools") -> tuple[Message, ...]:
    """Functions in Chat Completions' shape, in order of their names: a client that lists them in another order the
    next time still finds its prefix. Raises `ApiError` for any other kind of tool."""
    return tuple(sorted((_tool(tool, f"{where}[{i}]") for i, tool in enumerate(tools or ())), key=_name))


def _tool(tool: Mapping[str, Any], where: str) -> Message:
    if tool.get("type") != "function":
        raise unsupported(where, f"a tool of type {str(tool.get('type'))[:40]!r}; only functions are supported")
    function = tool["function"] if isinstance(tool.get("function"), dict) else tool
    if not isinstance(function.get("name"), str):
        raise invalid(where, "a function needs a name")
    kept = {name: function[name] for name in ("name", "description", "parameters") if function.get(name) is not None}
    return {"type": "function", "function": kept}


def _name(tool: Message) -> str:
    function = tool["function"]
    assert isinstance(function, dict)
    return str(function["name"])


def constrained(
    sampling: Sampling, schema: dict[str, Any] | StructuredOutputs | None, param: str = "tool_choice"
) -> Sampling:
    """With a schema that what is said must have. Raises `ApiError` where the request has one of its own."""
    if schema is None:
        return sampling
    if sampling.structured_outputs is not None:
        raise invalid(param, "a forced call cannot be combined with structured output; leave one out")
    wanted = schema if isinstance(schema, StructuredOutputs) else {"json": schema}
    try:
        return msgspec.structs.replace(sampling, structured_outputs=wanted)
    except BadSampling as error:
        raise invalid(param, str(error)) from None


def call_of(id: str, name: str, arguments: str) -> dict[str, object]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


# -- log probabilities


def token_logprobs(
    codec: Codec,
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    tops: Sequence[Iterable[tuple[int, float]]] | None = None,
    num_top: int = 0,
) -> list[dict[str, object]]:
    """One entry a token, as Chat Completions and Responses have them."""
    out = []
    for i, (token, logprob) in enumerate(zip(token_ids, logprobs, strict=False)):
        best = sorted(tops[i], key=lambda pair: -pair[1])[:num_top] if tops else []
        out.append({**_token(codec, token, logprob), "top_logprobs": [_token(codec, t, p) for t, p in best]})
    return out


def _token(codec: Codec, token: int, logprob: float) -> dict[str, object]:
    text = codec.decode([token], skip_special_tokens=False)
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def best_first(outcomes: Sequence[RequestOutcome]) -> list[RequestOutcome]:
    """By mean log probability of what was sampled."""
    return sorted(outcomes, key=lambda one: -sum(one.logprobs) / max(1, len(one.logprobs)))
