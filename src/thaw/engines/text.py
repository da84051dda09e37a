"""What tokens say, piece by piece: the text of a session is the same wherever it is cut into turns.

A token may be a piece of a character, and a decoder drops the space before the first word. So a piece is decoded
together with the tokens before it, and a character belongs to the piece in which it becomes whole: one that has only
begun is in no text yet. When what follows does not end it, U+FFFD stands in its place, at the front of what follows.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import msgspec

from thaw.core.objects import Turn, without_chat

if TYPE_CHECKING:
    from thaw.engines.base import Codec

CONTEXT = 8
"""Tokens that are decoded along with a piece, at first."""
MARGIN = 4
"""Characters that they say at least: then more is there than a character (of up to 4 bytes) that has only begun."""
WINDOW = 32
"""Tokens that are decoded at once, at most, where a text comes token by token."""
LONGEST = 4
"""Bytes of a character, at most: so many tell whether a text ends inside one."""
ANY_TOKEN = 0
"""A codec has bytes for all tokens or for none."""


class Window(Protocol):
    """The end of a text, to which tokens are added one by one: each costs the same, however many came before."""

    def push(self, *tokens: int) -> str:
        """The whole characters that these add."""


def window(codec: Codec, before: Sequence[int], *, skip_special_tokens: bool = True) -> Window:
    """The end of the text of `before`."""
    if codec.token_bytes(ANY_TOKEN) is None:
        return _DecodedTogether(codec, before, skip_special_tokens)
    return _ByteByByte(codec, before, skip_special_tokens)


class _ByteByByte:
    """Where every token has bytes of its own: nothing is remembered but a character that has only begun."""

    def __init__(self, codec: Codec, before: Sequence[int], skip_special_tokens: bool) -> None:
        self._bytes_of = partial(codec.token_bytes, skip_special_tokens=skip_special_tokens)
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        tail = b""
        for token in reversed(before):
            tail = (self._bytes_of(token) or b"") + tail
            if len(tail) >= LONGEST:
                break
        self._decode(tail)

    def push(self, *tokens: int) -> str:
        return self._decode(b"".join([self._bytes_of(token) or b"" for token in tokens]))


class _DecodedTogether:
    """Where what a token says depends on its neighbours: it is decoded with those before it."""

    def __init__(self, codec: Codec, before: Sequence[int], skip_special_tokens: bool) -> None:
        self._codec, self._skip = codec, skip_special_tokens
        self._ids: list[int] = []
        self._given = 0
        self._begin(_context(codec, before))

    def push(self, *tokens: int) -> str:
        self._ids += tokens
        text = self._text()
        news, self._given = text[self._given :], len(text)
        if len(self._ids) > WINDOW:
            self._begin(_context(self._codec, _last_visible(self._codec, self._ids)))
        return news

    def _begin(self, ids: list[int]) -> None:
        self._ids = ids
        self._given = len(self._text())

    def _text(self) -> str:
        return self._codec.decode_settled(self._ids, skip_special_tokens=self._skip)


def text_after(codec: Codec, before: Sequence[int], tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """What `tokens` add to the text of a session that holds `before`: whole characters."""
    return window(codec, before, skip_special_tokens=skip_special_tokens).push(*tokens) if tokens else ""


def left_open(codec: Codec, tokens: Sequence[int]) -> str:
    """U+FFFD where the last of these tokens begin a character that is not whole, else nothing."""
    context = _context(codec, tokens)
    return codec.decode(context)[len(codec.decode_settled(context)) :]


def cut_turns(turns: Sequence[Turn], tokens: Sequence[int], at: int, codec: Codec | None) -> tuple[Turn, ...]:
    """`turns` as they were when the session had `at` tokens: later ones gone, a turn cut through left unfinished.

    Without a codec a turn that is cut through has no text."""
    whole = tuple(turn for turn in turns if turn.end <= at)
    cut = [_cut_turn(turn, tokens, at, codec) for turn in turns if turn.start < at < turn.end]
    return (*whole, *cut)


def _cut_turn(turn: Turn, tokens: Sequence[int], at: int, codec: Codec | None) -> Turn:
    count = at - turn.start
    return msgspec.structs.replace(
        without_chat(turn),
        end=at,
        text="" if codec is None else _cut_text(turn, tokens, at, codec),
        finish_reason=None,
        stop_reason=None,
        logprobs=None if turn.logprobs is None else turn.logprobs[:count],
        top_logprobs=None if turn.top_logprobs is None else turn.top_logprobs[:count],
        entropies=turn.entropies and turn.entropies[:count],
    )


def _cut_text(turn: Turn, tokens: Sequence[int], at: int, codec: Codec) -> str:
    """A prompt's special tokens are shown where its text shows them (a rendered conversation's)."""
    before, rest = tokens[: turn.start], tokens[turn.start : at]
    if turn.kind == "prompt":
        shown = text_after(codec, before, rest, skip_special_tokens=False)
        if turn.text.startswith(shown):
            return shown
    return text_after(codec, before, rest)


def whole_characters(data: bytes) -> str:
    """`data` as UTF-8, without a character at its end that has only begun; U+FFFD stands for what is no UTF-8."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def _context(codec: Codec, tokens: Sequence[int]) -> list[int]:
    """The last of `tokens` that the text of what follows depends on."""
    count, ids = CONTEXT, list(tokens[-CONTEXT:])
    while len(text := codec.decode(ids)) < MARGIN and len(ids) < len(tokens):
        count *= 2
        ids = list(tokens[-count:])
    return ids if text == codec.decode_settled(ids) else _visible(codec, ids)


def _last_visible(codec: Codec, tokens: Sequence[int]) -> list[int]:
    """The last of those that say something, as many as any context needs: asking each of a long prompt takes seconds
    where a codec is slow."""
    found = itertools.islice((token for token in reversed(tokens) if codec.decode([token])), WINDOW)
    return list(found)[::-1]


def _visible(codec: Codec, tokens: Sequence[int]) -> list[int]:
    """Those that say something: what is left out in a text does not part the bytes of a character."""
    return [token for token in tokens if codec.decode([token])]
