"""Where two points part: the last common token, both texts from there, and the bytes they share.

Tokens decide, not history: the common point is where the token sequences part, also for sessions with no commit in
common. Bytes are counted by blob id, so what is shared is what is stored once.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from thaw.core.objects import Turn
from thaw.core.prefix import common_prefix
from thaw.repo import cover, timeline
from thaw.repo.resolve import ResolvedPoint
from thaw.repo.timeline import Timeline
from thaw.repo.weight import blobs_of, weigh
from thaw.store import Store


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One of the two points, from the common point on.

    `token`: the first token that differs, None when this side ends there. `logprob` and `top_logprobs` as recorded
    when it was sampled. `text` leaves out what both sides say alike. `nbytes_own`: bytes that only this side needs.
    """

    point: ResolvedPoint
    num_tokens: int
    num_own_tokens: int
    token: int | None
    text: str
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...] | None
    turn: int
    nbytes: int
    nbytes_own: int


class Diff(msgspec.Struct, frozen=True, kw_only=True):
    """`num_common_tokens`: both sequences are equal up to there. `common_text_end`: the end of the shared text, for
    showing where they part."""

    a: Side
    b: Side
    num_common_tokens: int
    common_text_end: str
    same_model: bool
    nbytes_shared: int

    @property
    def equal(self) -> bool:
        return self.a.num_own_tokens == 0 and self.b.num_own_tokens == 0


CONTEXT = 120
"""Characters of shared text that are shown."""


class _Loaded(msgspec.Struct, kw_only=True):
    point: ResolvedPoint
    line: Timeline
    tokens: tuple[int, ...]
    turns: tuple[Turn, ...]
    blobs: set[str]


def diff(store: Store, a: ResolvedPoint, b: ResolvedPoint) -> Diff:
    """Compare two points; reads objects only."""
    left, right = _load(store, a), _load(store, b)
    common = common_prefix(left.tokens, right.tokens)
    text_a, text_b, shared_text = _part(_text_around(left.turns, common), _text_around(right.turns, common))
    shared = left.blobs & right.blobs
    return Diff(
        a=_side(store, left, common, text_a, shared),
        b=_side(store, right, common, text_b, shared),
        num_common_tokens=common,
        common_text_end=shared_text[-CONTEXT:],
        same_model=left.line.state.model == right.line.state.model,
        nbytes_shared=weigh(store, shared),
    )


def _load(store: Store, point: ResolvedPoint) -> _Loaded:
    line = timeline.read(store, timeline.read_state(store, point.state))
    n = point.num_tokens
    return _Loaded(
        point=point,
        line=line,
        tokens=line.tokens[:n],
        turns=line.turns if point.at_end else _whole_text_turns(line.turns, n),
        blobs=blobs_of(line, cover.num_kv_at(line, n), with_boundary=point.at_end),
    )


def _whole_text_turns(turns: Sequence[Turn], n: int) -> tuple[Turn, ...]:
    """Turns that begin before token n; the one cut through keeps its text, there being no tokenizer here to cut it."""
    return tuple(turn for turn in turns if turn.start < n)


def _text_around(turns: Sequence[Turn], common: int) -> tuple[str, str]:
    """(text before, text from) the turn in which token `common` lies."""
    before = "".join(turn.text for turn in turns if turn.end <= common)
    return before, "".join(turn.text for turn in turns if turn.end > common)


def _part(a: tuple[str, str], b: tuple[str, str]) -> tuple[str, str, str]:
    """Both texts from where they part, and the shared text before."""
    whole_a, whole_b = a[0] + a[1], b[0] + b[1]
    start = min(len(a[0]), len(b[0])) if a[0][: len(b[0])] == b[0][: len(a[0])] else 0
    end = start + next(
        (i for i, (x, y) in enumerate(zip(whole_a[start:], whole_b[start:], strict=False)) if x != y),
        min(len(whole_a), len(whole_b)) - start,
    )
    return whole_a[end:], whole_b[end:], whole_a[:end]


def _side(store: Store, loaded: _Loaded, common: int, text: str, shared: set[str]) -> Side:
    turn = next((t for t in loaded.turns if t.start <= common < t.end), None)
    inside = common < len(loaded.tokens)
    i = common - turn.start if turn is not None else 0
    sampled = inside and turn is not None and turn.logprobs is not None
    return Side(
        point=loaded.point,
        num_tokens=len(loaded.tokens),
        num_own_tokens=len(loaded.tokens) - common,
        token=loaded.tokens[common] if inside else None,
        text=text,
        logprob=turn.logprobs[i] if sampled and turn is not None and turn.logprobs is not None else None,
        top_logprobs=turn.top_logprobs[i] if sampled and turn is not None and turn.top_logprobs is not None else None,
        turn=sum(t.end <= common for t in loaded.turns),
        nbytes=weigh(store, loaded.blobs),
        nbytes_own=weigh(store, loaded.blobs - shared),
    )
