"""Sampling parameters as callers have them: thaw's own, or an engine's `SamplingParams`.

Another library's object is read by the names that both share (vLLM's). What it asks for beyond these is refused by
name, never dropped.
"""

from __future__ import annotations

import msgspec

from thaw.core.errors import BadSampling, InvalidRequest
from thaw.core.sampling import Sampling

_FIELDS = tuple(field.name for field in msgspec.structs.fields(Sampling))
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1, None),
    "best_of": (1, None),
    "logit_bias": (None, {}),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "logits_processors": (None, []),
    "prompt_logprobs": (None,),
    "guided_decoding": (None,),
    "structured_outputs": (None,),
    "truncate_prompt_tokens": (None,),
    "include_stop_str_in_output": (False, None),
}


def check_seed(seed: int | None) -> None:
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 1 << 64):
        raise InvalidRequest(f"seed={seed!r}: must be an integer in 0 .. 2^64-1, or None for a fresh one")


def as_sampling(value: object) -> Sampling:
    """`value` as thaw's `Sampling`; None gives the defaults. Raises `BadSampling` naming what is not supported."""
    if value is None:
        return Sampling()
    if isinstance(value, Sampling):
        return value
    if not hasattr(value, "temperature") or not hasattr(value, "max_tokens"):
        raise InvalidRequest(f"sampling is a {type(value).__name__}; give thaw.Sampling or the engine's SamplingParams")
    for name, neutral in _NEUTRAL.items():
        asked = getattr(value, name, None)
        if asked not in neutral:
            raise BadSampling(f"{type(value).__name__}.{name}={asked!r} is not supported; leave it out")
    fields = {name: getattr(value, name) for name in _FIELDS if getattr(value, name, None) is not None}
    if getattr(value, "max_tokens", None) is None:
        raise BadSampling(f"{type(value).__name__}.max_tokens is None: give a number")
    return Sampling(**fields)
