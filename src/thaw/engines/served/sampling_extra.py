"""What a thaw request tells vLLM's worker about sampling: `SamplingParams.extra_args["thaw_sampling"]`.

thaw's parameters, the seed and where this turn's output began travel with the request, as plain JSON; `sampling.py`
chooses the tokens from them. A resumed request says the same as the one it continues, so nothing else has to be
kept: no generator, no counters. No torch and no vLLM here, so both sides of the engine import it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import msgspec
import rfc8785

from thaw.core import canonical
from thaw.core.canonical import U64
from thaw.core.errors import BadSampling, ThawError
from thaw.core.sampling import Sampling, check_seed
from thaw.engines.session.bad_words import BadIds

EXTRA = "thaw_sampling"
Count = Annotated[int, msgspec.Meta(ge=0)]
Word = Annotated[tuple[Count, ...], msgspec.Meta(min_length=1)]


class SamplingExtra(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How to choose this request's tokens. `seed` is the turn's (`sampling.seed` is not looked at).

    `output_start` is the absolute index, in the request's prompt and output tokens, of the first token of this turn's
    output. While the turn has fewer than `sampling.min_tokens` tokens, `sampling.stop_token_ids` and `eos_token_ids`
    may not come; `eos_token_ids` None stands for the stop ids that vLLM itself holds for the request: the tokenizer's
    and the generation config's ends of text and the request's own `stop_token_ids`.
    `bad_ids` are `sampling.bad_words` as token ids: the worker has no tokenizer.
    """

    sampling: Sampling
    seed: U64
    output_start: Count
    eos_token_ids: tuple[Count, ...] | None = None
    bad_ids: tuple[Word, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.bad_ids) != bool(self.sampling.bad_words):
            raise BadSampling("bad_ids and sampling.bad_words: one of the two is missing")


def to_extra(
    sampling: Sampling,
    *,
    seed: int,
    output_start: int,
    eos_token_ids: Iterable[int] | None = None,
    bad_ids: BadIds = (),
) -> dict[str, Any]:
    """The value for `extra_args[EXTRA]`: JSON-able, 64-bit integers as decimal strings."""
    extra = SamplingExtra(
        sampling=sampling,
        seed=check_seed(seed),
        output_start=output_start,
        eos_token_ids=None if eos_token_ids is None else tuple(sorted(eos_token_ids)),
        bad_ids=bad_ids,
    )
    plain: dict[str, Any] = canonical.to_plain(extra)
    return plain


def from_extra(extra_args: Mapping[str, Any] | None) -> SamplingExtra | None:
    """What `extra_args` carries for thaw, as a mapping or, where vLLM's server takes no mapping, as its JSON text; None
    without thaw's key. Raises `BadSampling` for anything that `to_extra` would not have written."""
    if not extra_args or EXTRA not in extra_args:
        return None
    found = extra_args[EXTRA]
    try:
        data = found.encode() if isinstance(found, str) else rfc8785.dumps(found)
        return canonical.decode(data, SamplingExtra, what=EXTRA)
    except (ThawError, UnicodeError, rfc8785.CanonicalizationError, RecursionError) as error:
        raise BadSampling(f"extra_args[{EXTRA!r}]: {error}") from None


def needed(sampling: Sampling) -> bool:
    """Whether the server cannot do this itself: False for plain greedy, whose token is its own argmax."""
    s = sampling
    chosen = s.temperature >= 1e-5 or s.min_tokens > 0 or bool(s.logit_bias or s.bad_words) or penalises(s)
    return chosen or s.entropy


def penalises(sampling: Sampling) -> bool:
    return sampling.repetition_penalty != 1.0 or bool(sampling.frequency_penalty or sampling.presence_penalty)
