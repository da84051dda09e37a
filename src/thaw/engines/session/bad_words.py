"""Banned words, as token ids: what vLLM does with `bad_words`, for every engine.

A function of the words, the tokenizer and the turn's own output, so a resumed turn needs nothing but its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from thaw.core.errors import BadSampling
from thaw.core.sampling import Sampling
from thaw.engines.base import Codec

BadIds: TypeAlias = tuple[tuple[int, ...], ...]
"""Token sequences, none of them empty."""


def bad_ids(codec: Codec, words: Sequence[str]) -> BadIds:
    """Each word's tokens at the start of a text, and those after a space where that is another form of the same length
    (vLLM's rule). Raises `BadSampling` for a word that has no tokens."""
    out: list[tuple[int, ...]] = []
    start = len(codec.encode("", first=True)) if words else 0
    for word in words:
        plain, spaced = (tuple(codec.encode(space + word.lstrip(), first=True)[start:]) for space in ("", " "))
        if not plain:
            raise BadSampling(f"bad_words has {word!r}, which is no token of this model's vocabulary; leave it out")
        out.append(plain)
        if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
            out.append(spaced)
    return tuple(out)


def endings(words: BadIds, output: Sequence[int]) -> frozenset[int]:
    """The ids that would complete one of `words` after `output`, this turn's tokens so far."""
    return frozenset(word[-1] for word in words if _ends_with(output, word[:-1]))


def straddling(words: BadIds, output: Sequence[int]) -> tuple[int, ...] | None:
    """One of `words` that `output` may have begun: who forgets `output` would let it come."""
    begun = (word for word in words for n in range(1, len(word)) if _ends_with(output, word[:n]))
    return next(begun, None)


def check(sampling: Sampling, codec: Codec, vocab_size: int, *, structured: bool = False) -> None:
    """Raise `BadSampling` for a bias on no token of the vocabulary, for a bad word without tokens, and for structured
    output where the engine has none."""
    if sampling.structured_outputs is not None and not structured:
        raise BadSampling(
            "structured_outputs: this engine has no grammars (the vllm engine has); leave it out and check the text"
        )
    beyond = [token for token, _ in sampling.logit_bias if token >= vocab_size]
    if beyond:
        raise BadSampling(f"logit_bias names token ids {beyond[:5]}: the vocabulary has {vocab_size}")
    bad_ids(codec, sampling.bad_words)


def _ends_with(tokens: Sequence[int], end: Sequence[int]) -> bool:
    return len(end) <= len(tokens) and tuple(tokens[len(tokens) - len(end) :]) == tuple(end)
