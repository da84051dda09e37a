"""Sampling parameters as callers have them: thaw's own, or an engine's `SamplingParams`.

Another library's object is read by the names that both share (vLLM's). Whatever else it asks for is refused by name and
value, never dropped: also by a field that this thaw has never heard of, as a session could not continue it exactly.
Only how vLLM would hand its results out is not looked at: thaw has its own way.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from thaw.core.errors import BadSampling, InvalidRequest
from thaw.core.sampling import Sampling, StructuredOutputs

_FIELDS = tuple(field.name for field in msgspec.structs.fields(Sampling))
_DELIVERY = frozenset(
    ("output_kind", "stream_interval", "detokenize", "flat_logprobs", "skip_clone", "output_text_buffer_length")
)
"""No token and no log probability depends on these."""
_PROMPT = "a session reads no token twice, so its prompt has no log probabilities; score the prompt in a plain request"
_GRAMMAR = "say it as structured_outputs"
_INSTEAD: dict[str, str] = {
    "n": "fork the session, and generate in the children",
    "best_of": "fork the session, generate in the children, and adopt the best",
    "prompt_logprobs": _PROMPT,
    "prompt_logprob_token_ids": _PROMPT,
    "prompt_logprob_start": _PROMPT,
    "logprob_token_ids": "ask for the likeliest by logprobs",
    "guided_decoding": _GRAMMAR,
    "allowed_token_ids": "give the others a logit_bias of -100, or leave it out",
    "logits_processors": "code is no part of a session; use logit_bias and bad_words",
    "truncate_prompt_tokens": "cut the prompt before it is appended",
    "skip_special_tokens": "decode token_ids: engine.codec.decode(ids, skip_special_tokens=False)",
    "spaces_between_special_tokens": "decode token_ids as you like",
    "include_stop_str_in_output": "stop_reason is the stop string, and token_ids keep it",
    "extra_args": "what an engine's plug-ins read there is no part of a session; leave it out",
    "skip_reading_prefix_cache": "going on from a session's KV is what thaw does; use a plain request",
    "lora_request": "open the session with it (adapter=NAME), or load the engine with the merged weights",
}
"""What to do instead, of fields that people use."""
_USUAL: dict[str, object] = {"n": 1, "best_of": 1, "skip_special_tokens": True, "spaces_between_special_tokens": True}
"""What neither asks for anything nor is empty, where the object itself does not say."""


def check_seed(seed: int | None) -> None:
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 1 << 64):
        raise InvalidRequest(f"seed={seed!r}: must be an integer in 0 .. 2^64-1, or None for a fresh one")


def as_token(name: str, value: object) -> int:
    """`value` as a number of tokens; any integer type will do. Raises `InvalidRequest` for anything else, also for
    truth values and for floats that are whole."""
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            return operator.index(value)  # type: ignore[arg-type]
    raise InvalidRequest(f"{name}={value!r}: must be an integer, a number of tokens of the session")


def as_points(values: object) -> tuple[int, ...]:
    """`points=` of any iterable, read once. Raises `InvalidRequest` naming what is not a number of tokens."""
    if isinstance(values, (str, bytes, bytearray, Mapping)) or not isinstance(values, Iterable):
        raise InvalidRequest(f"points={values!r}: give a list of numbers of tokens, such as points=[1024, 4096]")
    return tuple(as_token("point", value) for value in values)


def require_to_come(points: Sequence[int], start: int, end: int | None = None) -> None:
    """Raise `InvalidRequest` for points that are not among the tokens to come of a session of `start` tokens: up to
    `end`, where that is known."""
    outside = [point for point in points if point <= start or (end is not None and point > end)]
    if outside and end is not None and end <= start:
        raise InvalidRequest(f"points {outside[:5]}: no token comes after the {start} that are there")
    if outside:
        where = f"{start + 1} or more" if end is None else f"one of {start + 1}..{end}"
        raise InvalidRequest(
            f"points {outside[:5]}: a point is a number of tokens of the whole session, here {where}, which are still "
            "to be read"
        )


def as_sampling(value: object) -> Sampling:
    """`value` as thaw's `Sampling`; None gives the defaults. Raises `BadSampling` naming what is not supported."""
    if value is None:
        return Sampling()
    if isinstance(value, Sampling):
        return value
    kind = type(value).__name__
    if not hasattr(value, "temperature") or not hasattr(value, "max_tokens"):
        raise InvalidRequest(f"sampling is a {kind}; give thaw.Sampling or the engine's SamplingParams")
    for name, asked in _beyond(value):
        shown = repr(asked) if len(repr(asked)) <= 80 else f"{repr(asked)[:80]}…"
        raise BadSampling(f"{kind}.{name}={shown} is not supported: {_INSTEAD.get(name, 'leave it out')}")
    if value.max_tokens is None:
        raise BadSampling(f"{kind}.max_tokens=None is not supported: give a number")
    fields = {name: getattr(value, name) for name in _FIELDS if getattr(value, name, None) is not None}
    if fields.get("structured_outputs") is not None:
        fields["structured_outputs"] = _structured(kind, fields["structured_outputs"])
    return Sampling(**fields)


def _structured(kind: str, value: object) -> StructuredOutputs:
    """vLLM's `StructuredOutputsParams`. Raises `BadSampling` for what of it is not thaw's."""
    if isinstance(value, Mapping):
        return Sampling(structured_outputs=value).structured_outputs  # type: ignore[arg-type,return-value]
    asked = {name: found for name, found in vars(value).items() if found and not name.startswith("_")}
    beyond = sorted(asked.keys() - set(StructuredOutputs.__struct_fields__))
    if beyond:
        raise BadSampling(f"{kind}.structured_outputs.{beyond[0]}={asked[beyond[0]]!r} is not supported: leave it out")
    return StructuredOutputs(**asked)


def _beyond(value: object) -> Iterator[tuple[str, object]]:
    """(name, value) of what is asked for beyond thaw's own fields."""
    defaults = dict.fromkeys(_INSTEAD) | _USUAL
    if isinstance(value, msgspec.Struct):
        defaults |= {field.name: field.default for field in msgspec.structs.fields(value)}
    for name, default in defaults.items():
        asked = getattr(value, name, None)
        if name.startswith("_") or name in _FIELDS or name in _DELIVERY or asked is None:
            continue
        if not _neutral(asked, default):
            yield name, asked


def _neutral(asked: object, default: object) -> bool:
    """Whether it is the default, or as empty as a default of None."""
    if default is None or default is msgspec.NODEFAULT:
        return asked is False or (isinstance(asked, (str, list, tuple, dict, set)) and not asked)
    return bool(asked == default)
