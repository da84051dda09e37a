"""How far a session already says what a rendered conversation says, and what is still to be appended.

Both are token ids. Where they differ inside a sampled answer, their texts are compared: a model may spell a text in
other tokens than the tokenizer would, and as long as the text is the same the sampled ones stay. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from thaw.core.objects import Turn
from thaw.engines.base import Codec

CONTEXT = 8
"""Tokens before a piece that are decoded along with it."""


class Aligned(msgspec.Struct, frozen=True, kw_only=True):
    """Keep the session's first `keep` tokens and append `new`."""

    keep: int
    new: tuple[int, ...]


def align(codec: Codec, tokens: Sequence[int], turns: Sequence[Turn], start: int, wanted: Sequence[int]) -> Aligned:
    """The session's tokens from `start` on against `wanted`."""
    i, j = start, 0
    while True:
        while i < len(tokens) and j < len(wanted) and tokens[i] == wanted[j]:
            i, j = i + 1, j + 1
        answer = next((turn for turn in turns if turn.kind == "completion" and turn.start <= i < turn.end), None)
        if i == len(tokens) or j == len(wanted) or answer is None:
            return Aligned(keep=i, new=tuple(wanted[j:]))
        said = said_end(codec, tokens, i, answer.end)
        if said == i:
            return Aligned(keep=i, new=tuple(wanted[j:]))
        mine, theirs = _Text(codec, tokens, i, said, hide=True), _Text(codec, wanted, j, len(wanted), hide=False)
        text = mine.upto(said)
        end = theirs.end_of(len(text))
        if theirs.upto(end) != text:
            return _parted(codec, mine, theirs, text)
        i, j = said, end


def said_end(codec: Codec, tokens: Sequence[int], start: int, end: int) -> int:
    """Where the text of tokens [start, end) ends: an end token behind it says nothing."""
    while end > start and not codec.decode([tokens[end - 1]]):
        end -= 1
    return end


def _parted(codec: Codec, mine: _Text, theirs: _Text, text: str) -> Aligned:
    """The texts differ, `mine` is `text`: keep what is said alike, in whole tokens, and say the rest as wanted."""
    alike = _common(text, theirs.upto(theirs.end_of(len(text))))
    keep = mine.end_of(alike)
    while keep > mine.start and len(mine.upto(keep)) > alike:
        keep -= 1
    count = len(mine.upto(keep))
    end = theirs.end_of(count)
    rest = theirs.upto(end)[count:]
    return Aligned(keep=keep, new=(*(codec.encode_chat(rest, inside=True) if rest else ()), *theirs.ids[end:]))


def _common(a: str, b: str) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


class _Text:
    """What ids [start, end) say behind those before them; a character at the end that has only begun is not said yet.
    `hide`: special tokens say nothing, as in a turn's text."""

    def __init__(self, codec: Codec, ids: Sequence[int], start: int, end: int, *, hide: bool) -> None:
        self.start, self.end = start, end
        self._decode: Callable[[Sequence[int]], str] = lambda some: codec.decode_settled(some, skip_special_tokens=hide)
        self.ids = ids
        self._before = max(0, start - CONTEXT)
        self._skipped = len(self._decode(ids[self._before : start]))

    def upto(self, end: int) -> str:
        return self._decode(self.ids[self._before : end])[self._skipped :]

    def end_of(self, count: int) -> int:
        """The first end at which at least `count` characters are said; the last one where they never are."""
        low, high, step = self.start, self.start, max(count // 4, 1)
        while high < self.end and len(self.upto(high)) < count:
            low, high, step = high, min(high + step, self.end), step * 2
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(self.upto(middle)) >= count else (middle + 1, high)
        return low
