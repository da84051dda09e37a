"""Sampling parameters and thaw's randomness.

Names and meanings are vLLM's `SamplingParams`. Randomness is a pure function of (seed, position): the draw for the
token at absolute position p of a session is `uniform(seed, p)`, whatever was drawn before it, in whichever process.
So a state needs no generator: the seed and the number of tokens are the whole of it.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping

import msgspec
from blake3 import blake3

from thaw.core.canonical import U64
from thaw.core.errors import BadSampling
from thaw.core.text import is_text

MAX_STOPS = 64
MAX_BIASES = 1024
MAX_BAD_WORDS = 64
MAX_GRAMMAR = 1 << 20
LARGEST = (1 << 53) - 1
"""Of the integers that a turn records as JSON numbers."""


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a completion must look like, in vLLM's words: exactly one of these. `json` is a schema, given as a mapping
    or as text and kept as text (the order of its properties matters); `grammar` is EBNF or Lark."""

    json: str | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None

    def __post_init__(self) -> None:
        """Bring values into one form. Raises `BadSampling`."""
        if isinstance(self.json, Mapping):
            import json

            msgspec.structs.force_setattr(self, "json", json.dumps(self.json))
        msgspec.structs.force_setattr(self, "choice", _tuple("structured_outputs.choice", self.choice, str))
        given = [name for name in self.__struct_fields__ if getattr(self, name)]
        _require(len(given) == 1, "structured_outputs", given, "one of json, regex, choice, grammar")
        value = getattr(self, given[0])
        is_one = given[0] == "choice" or (type(value) is str and is_text(value))
        _require(is_one, f"structured_outputs.{given[0]}", value, "text")
        size = sum(map(len, self.choice)) if self.choice else len(value)
        _require(size <= MAX_GRAMMAR, "structured_outputs", f"{size} characters", f"at most {MAX_GRAMMAR}")


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How to choose the next tokens. Immutable.

    `temperature` 0 is greedy. `top_k` 0 or -1 means all. `presence_penalty` and `frequency_penalty` look at this
    turn's output, `repetition_penalty` at prompt and output. `stop` strings end the turn and are cut from the text
    (the token ids keep them). `logprobs` is how many alternatives to return beside the sampled token's own
    (None: only the sampled token's). Log probabilities are of the model's raw logits, before penalties and
    temperature. `seed` None takes the session's.

    `entropy` records, for each sampled token, the Shannon entropy in nats of the distribution that its log probability
    is of: the softmax of the model's raw logits over the full vocabulary, before biases, bans, penalties, temperature
    and filters. An engine that cannot say it refuses it.

    `logit_bias` is added to the logits of tokens before penalties: given as a mapping of token id to a number in
    [-100, 100], kept as pairs in order of id. `bad_words` may not come up in this turn's output: of each word's tokens,
    at the start of a text and after a space, the last one is banned while the ones before it stand at the output's end.

    `structured_outputs`, given as such or as a mapping, is what the output must look like; log probabilities and
    entropies are then of the tokens that it allows. It ends by itself, so neither `ignore_eos` nor `min_tokens` goes
    with it. An engine without the capability `structured` refuses it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int = 256
    logprobs: int | None = None
    seed: U64 | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[str, ...] = ()
    structured_outputs: StructuredOutputs | None = None
    entropy: bool = False

    def __post_init__(self) -> None:
        """Check types and ranges, and bring values into one form. Raises `BadSampling`."""
        for name in _FLOATS:
            value = getattr(self, name)
            _require(type(value) in (int, float) and math.isfinite(value), name, value, "a finite number")
            self._set(name, float(value))
        for name in ("top_k", "min_tokens", "max_tokens"):
            _require(type(getattr(self, name)) is int, name, getattr(self, name), "an integer")
        for name in ("ignore_eos", "entropy"):
            _require(type(getattr(self, name)) is bool, name, getattr(self, name), "True or False")
        self._set("stop", _tuple("stop", (self.stop,) if isinstance(self.stop, str) else self.stop, str))
        self._set("stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids, int))
        self._set("logit_bias", _biases(self.logit_bias))
        words = self.bad_words
        self._set("bad_words", _tuple("bad_words", (words,) if isinstance(words, str) else words, str))
        self._set("structured_outputs", _structured(self.structured_outputs))
        if self.seed is not None:
            self._set("seed", check_seed(self.seed))
        _require(self.logprobs is None or type(self.logprobs) is int, "logprobs", self.logprobs, "None or an integer")
        self._check()

    def _set(self, name: str, value: object) -> None:
        msgspec.structs.force_setattr(self, name, value)

    def _check(self) -> None:
        _require(0.0 <= self.temperature <= 100.0, "temperature", self.temperature, "0 (greedy) to 100")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "in (0, 1]")
        _require(-1 <= self.top_k <= LARGEST, "top_k", self.top_k, "-1 or 0 (all), or a positive count below 2^53")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "in [0, 1]")
        _require(0.0 < self.repetition_penalty <= 100.0, "repetition_penalty", self.repetition_penalty, "in (0, 100]")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(-2.0 <= getattr(self, name) <= 2.0, name, getattr(self, name), "in [-2, 2]")
        _require(1 <= self.max_tokens <= LARGEST, "max_tokens", self.max_tokens, "at least 1, below 2^53")
        _require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "in [0, max_tokens]")
        _require(self.logprobs is None or 0 <= self.logprobs <= 100, "logprobs", self.logprobs, "None or 0 to 100")
        _require(
            len(self.stop) <= MAX_STOPS and all(self.stop), "stop", self.stop, f"up to {MAX_STOPS} non-empty strings"
        )
        ok = all(0 <= t <= LARGEST for t in self.stop_token_ids)
        _require(ok, "stop_token_ids", self.stop_token_ids, "token ids (0 or more, below 2^53)")
        _require(
            len(self.bad_words) <= MAX_BAD_WORDS and all(word.lstrip() for word in self.bad_words),
            "bad_words", self.bad_words, f"up to {MAX_BAD_WORDS} strings that are not blank",
        )  # fmt: skip
        if self.structured_outputs is not None:
            why = "left out beside structured_outputs, which end by themselves"
            _require(not self.ignore_eos, "ignore_eos", self.ignore_eos, why)
            _require(not self.min_tokens, "min_tokens", self.min_tokens, why)


_FLOATS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


def check_seed(seed: int) -> U64:
    """`seed` if it is an integer of 64 bits, else `BadSampling`."""
    ok = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 1 << 64
    _require(ok, "seed", seed, "an integer in 0 .. 2^64-1")
    return U64(seed)


def _tuple(name: str, values: object, kind: type) -> tuple[object, ...]:
    ok = isinstance(values, (list, tuple)) and all(type(value) is kind for value in values)
    _require(ok, name, values, f"a list of {kind.__name__}")
    found: tuple[object, ...] = tuple(values)  # type: ignore[arg-type]
    _require(all(is_text(x) for x in found if isinstance(x, str)), name, values, "text without half characters")
    return found


def _structured(value: object) -> StructuredOutputs | None:
    if value is None or isinstance(value, StructuredOutputs):
        return value
    names = StructuredOutputs.__struct_fields__
    ok = isinstance(value, Mapping) and value.keys() <= set(names)
    _require(ok, "structured_outputs", value, f"a mapping with one of {', '.join(names)}")
    return StructuredOutputs(**value)  # type: ignore[arg-type]


def _biases(value: object) -> tuple[tuple[int, float], ...]:
    """Pairs in order of token id, from a mapping (ids may be decimal strings, as in JSON) or from pairs."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    ok = isinstance(pairs, (list, tuple)) and all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs)
    found = {_token_id(token): bias for token, bias in pairs} if ok else {}  # type: ignore[attr-defined]
    ok = ok and len(found) == len(pairs) <= MAX_BIASES  # type: ignore[arg-type]
    ok = ok and all(0 <= t < 1 << 32 and type(x) in (int, float) and -100.0 <= x <= 100.0 for t, x in found.items())
    _require(ok, "logit_bias", value, f"a mapping of up to {MAX_BIASES} token ids to numbers in [-100, 100]")
    return tuple((token, float(found[token])) for token in sorted(found))


def _token_id(value: object) -> int:
    """-1 for what is none."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 10:
        return int(value)
    return value if type(value) is int else -1


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise BadSampling(f"{name}={value!r}: must be {expected}")


def _hash64(*numbers: int, domain: bytes) -> int:
    packed = struct.pack(f"<{len(numbers)}Q", *numbers)
    return int.from_bytes(blake3(domain + packed).digest(length=8), "little")


def uniform(seed: int, position: int) -> float:
    """The draw for the token at `position`: uniform in [0, 1), 53 bits, from BLAKE3 of (seed, position)."""
    return (_hash64(seed, position, domain=b"thaw.uniform/1") >> 11) * 2.0**-53


def derive(seed: int, position: int, index: int) -> int:
    """The seed of child `index` of a fork at `position`: 64 bits from BLAKE3 of the three."""
    return _hash64(seed, position, index, domain=b"thaw.derive/1")


def fresh_seed() -> int:
    """A seed from the operating system, for a session that was given none; it is recorded with the session."""
    return int.from_bytes(os.urandom(8), "little")
