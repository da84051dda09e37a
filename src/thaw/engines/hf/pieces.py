"""Text to tokens and back, without chat and without a view on which tokens a text shows.

`FastPieces` is over a tokenizer of the `tokenizers` library, `SlowPieces` over one of transformers that is written in
Python. Both know a text's beginning from what is appended to it: SentencePiece puts a space before the first word of a
text (and its decoder takes it away again), and nothing before what follows.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

FIRST = "a"
"""A text that shows what a tokenizer puts around a text."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Pieces(Protocol):
    start: tuple[int, ...]
    """The tokens that every text begins with."""
    apart: bool
    """Whether a text's bytes are those of its tokens, one after another."""

    def encode(self, text: str) -> list[int]:
        """A text's tokens, from its beginning, without `start` and without tokens that would end it."""

    def encode_inside(self, text: str) -> list[int]:
        """The tokens of what is appended to a text: decoded behind it they give `text`, no space more."""

    def encode_chat_inside(self, text: str) -> list[int]:
        """As `encode_inside`, but behind a special token in `text` as a whole text goes on there: some tokenizers put a
        space there, too, and a conversation has the same tokens whether it was appended or is rendered whole."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """All tokens, special ones too."""

    def ends_inside(self, token_ids: Sequence[int]) -> bool:
        """Whether these end inside a character that more tokens may end; asked where the text ends in U+FFFD."""

    def token_bytes(self, token_id: int) -> bytes | None:
        """The token's part of a text's bytes, where they are `apart`."""


class FastPieces:
    """`backend`: a `tokenizers.Tokenizer`. It is told to neither cut nor fill up texts."""

    def __init__(self, backend: Any) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._alphabet = byte_level_alphabet() if is_byte_level(backend) else {}
        self._fallback = "ByteFallback" in _kinds(_state(backend.decoder))
        self.apart = list(_kinds(_state(backend.decoder))) == ["ByteLevel"]
        self._known: dict[int, bytes] = {}
        self.start = _start(backend.encode(FIRST).ids, self.encode(FIRST))

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_inside(self, text: str) -> list[int]:
        return list(self._inside.encode(text, add_special_tokens=False).ids)

    def encode_chat_inside(self, text: str) -> list[int]:
        encoding = self._inside.encode(text, add_special_tokens=False)
        ids, added = list(encoding.ids), self._backend.get_added_tokens_decoder()
        first = next((i for i, token in enumerate(ids) if token in added), None)
        return ids if first is None else [*ids[:first], *self.encode(text[encoding.offsets[first][0] :])]

    @cached_property
    def _inside(self) -> Any:
        """The same tokenizer, without a space put before a text."""
        backend = self._backend
        before = [_state(backend.normalizer), _state(backend.pre_tokenizer)]
        after = [_without_prefix(state) for state in before]
        if after == before:
            return backend
        whole = json.loads(backend.to_str())
        whole["normalizer"], whole["pre_tokenizer"] = after
        return type(backend).from_str(json.dumps(whole))

    def decode(self, token_ids: Sequence[int]) -> str:
        text = str(self._backend.decode(token_ids, skip_special_tokens=False))
        return self._decode_bytes(token_ids) if self._fallback and "\ufffd" in text else text

    def _decode_bytes(self, token_ids: Sequence[int]) -> str:
        """Where bytes are no UTF-8: the library gives up a whole run of byte tokens for one bad byte, so that what was
        a character would be none any more when the next token comes. Here each stays what it was."""
        tokens = [self._backend.id_to_token(token) or "" for token in token_ids]
        runs = itertools.groupby(tokens, lambda token: _BYTE.fullmatch(token) is not None)
        parts = [[_bytes(run).decode(errors="replace")] if are_bytes else list(run) for are_bytes, run in runs]
        return str(self._backend.decoder.decode([token for part in parts for token in part]))

    def ends_inside(self, token_ids: Sequence[int]) -> bool:
        tail = b""
        for token in reversed(token_ids):
            tail = self._bytes_of(token) + tail
            if len(tail) >= 4:  # no character is longer
                break
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(tail)
        return bool(decoder.getstate()[0])

    def token_bytes(self, token_id: int) -> bytes | None:
        if not self.apart:
            return None
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._bytes_of(token_id)
        return found

    def _bytes_of(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) or ""
        if self._fallback and _BYTE.fullmatch(token):
            return _bytes([token])
        if self._alphabet and all(c in self._alphabet for c in token):
            return bytes(self._alphabet[c] for c in token)
        return token.encode()


class SlowPieces:
    """`tokenizer`: one of transformers without a backend of the `tokenizers` library."""

    apart = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.start = _start(tokenizer.encode(FIRST), self.encode(FIRST))
        self._newline = self.encode("\n")

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_inside(self, text: str) -> list[int]:
        """Behind a newline, which is then taken away, as transformers does it; alone where that melts with the text."""
        ids = self.encode("\n" + text)
        found = self._newline and ids[: len(self._newline)] == self._newline
        return ids[len(self._newline) :] if found else self.encode(text)

    def encode_chat_inside(self, text: str) -> list[int]:
        return self.encode_inside(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def ends_inside(self, token_ids: Sequence[int]) -> bool:
        return True

    def token_bytes(self, token_id: int) -> bytes | None:
        return None


def is_byte_level(backend: Any) -> bool:
    """Whether a token's characters stand for bytes, as GPT-2's do."""
    return "ByteLevel" in _kinds(_state(backend.decoder))


def _start(whole: Sequence[int], bare: Sequence[int]) -> tuple[int, ...]:
    """What stands before a text's own tokens; what comes after them would end it and is left out."""
    n = len(bare)
    at = next((i for i in range(len(whole) - n + 1) if list(whole[i : i + n]) == list(bare)), 0)
    return tuple(whole[:at])


def _bytes(tokens: Iterator[str] | list[str]) -> bytes:
    return bytes(int(token[3:5], 16) for token in tokens)


def _state(part: Any) -> Any:
    """A normalizer, pre-tokenizer or decoder as in tokenizer.json; None where there is none."""
    return None if part is None else json.loads(part.__getstate__())


def _kinds(state: Any) -> Iterator[str]:
    if isinstance(state, dict):
        yield str(state.get("type"))
        for part in state.get("decoders", ()):
            yield from _kinds(part)


def _without_prefix(state: Any) -> Any:
    """The normalizer or pre-tokenizer without what puts a space before a text."""
    if not isinstance(state, dict) or state.get("type") == "Prepend":
        return None
    for name in ("normalizers", "pretokenizers"):
        if name in state:
            parts = (_without_prefix(part) for part in state[name])
            return {**state, name: [part for part in parts if part is not None]}
    if state.get("type") == "Metaspace":
        return {**state, "prepend_scheme": "never"}
    return {**state, "add_prefix_space": False} if state.get("add_prefix_space") else state


def byte_level_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's `bytes_to_unicode`): printable
    characters of Latin-1 for themselves, and characters from U+0100 on for the other bytes, in order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in plain)
    return {**{chr(byte): byte for byte in plain}, **{chr(0x100 + i): byte for i, byte in enumerate(others)}}
