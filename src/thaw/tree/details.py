"""One point in full, as the tree shows it: its turns, and of what was sampled each token with its margin.

The *margin* of a sampled token is how much likelier it was than the best alternative, in nats; below 0 another token
was likelier. It is known where alternatives were recorded (`Sampling(logprobs=2)`, `--logprobs 2`). Else there is only
the token's own log probability.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import msgspec

from thaw.core.errors import ThawError
from thaw.core.objects import ChatTurn, Turn
from thaw.engines.base import Codec
from thaw.engines.text import window
from thaw.repo.repository import PointLike, Repository
from thaw.repo.show import Shown

SURE = (0.1, 0.5, 1.5, 3.0)
"""Margins, in nats, that part the five colours: below the first a token might as well have been another one."""
LIKELY = (-1.6, -0.7, -0.25, -0.05)
"""Log probabilities that part them where no margin is known."""


class TokenShown(msgspec.Struct, frozen=True, kw_only=True):
    """A sampled token. `text` is None without a tokenizer. `margin` is None where no alternatives were recorded, `best`
    the likelier token's text where another one was."""

    text: str | None
    token: int
    logprob: float
    margin: float | None
    best: str | None = None

    @property
    def colour(self) -> int:
        """0 (might as well have been another) to 4 (sure); -1: another was likelier."""
        if self.margin is not None:
            return -1 if self.margin < 0 else sum(self.margin >= bound for bound in SURE)
        return sum(self.logprob >= bound for bound in LIKELY)


class TurnShown(msgspec.Struct, frozen=True, kw_only=True):
    """A turn. `roles`: of the messages that a prompt was rendered from, where that is known. `tokens` are None where
    nothing was sampled or no log probabilities were kept."""

    number: int
    kind: str
    role: str | None
    roles: tuple[str, ...] = ()
    start: int
    end: int
    text: str
    finish: str | None
    tokens: tuple[TokenShown, ...] | None

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for turns that look the same, wherever they are."""
        return (
            self.number,
            self.kind,
            self.role,
            self.roles,
            self.start,
            self.end,
            self.text,
            self.finish,
            self.tokens,
        )


class PointShown(msgspec.Struct, frozen=True, kw_only=True):
    """A point: what `thaw show` says of it, its turns with their tokens."""

    shown: Shown
    turns: tuple[TurnShown, ...]

    @property
    def name(self) -> str:
        """A spelling of the point that stays valid."""
        return str(self.shown.point)


def read_point(repo: Repository, point: PointLike, codec: Codec | None) -> PointShown:
    """Raises what `Repository.show` raises. Without a codec tokens have no text."""
    shown = repo.show(point)
    return PointShown(
        shown=shown,
        turns=tuple(_turn(turn, number, shown.tokens, codec) for number, turn in enumerate(shown.turns, 1)),
    )


def _turn(turn: Turn, number: int, tokens: Sequence[int], codec: Codec | None) -> TurnShown:
    pieces = _pieces(turn, tokens, codec) if turn.kind == "completion" and codec is not None else None
    return TurnShown(
        number=number,
        kind=turn.kind,
        role=turn.role,
        roles=_roles(turn),
        start=turn.start,
        end=turn.end,
        text=turn.text or "".join(pieces or ()),
        finish=turn.finish_reason,
        tokens=_tokens(turn, tokens, pieces, codec),
    )


def _roles(turn: Turn) -> tuple[str, ...]:
    """Of the messages that are told in this turn alone."""
    if not isinstance(turn, ChatTurn) or turn.chat.begin != turn.start:
        return ()
    return tuple(str(msgspec.json.decode(message).get("role")) for message in turn.chat.messages)


def _pieces(turn: Turn, tokens: Sequence[int], codec: Codec) -> tuple[str, ...] | None:
    """What each token adds to the text; None where that is not what was said, as with another model's tokenizer."""
    end = window(codec, tokens[: turn.start])
    try:
        pieces = tuple(end.push(token) for token in tokens[turn.start : turn.end])
    except (ThawError, LookupError, OverflowError, ValueError):  # a token that this tokenizer does not know
        return None
    return pieces if not turn.text or "".join(pieces).startswith(turn.text) else None


def _tokens(
    turn: Turn, tokens: Sequence[int], pieces: Sequence[str] | None, codec: Codec | None
) -> tuple[TokenShown, ...] | None:
    if turn.logprobs is None:
        return None
    ids = tokens[turn.start : turn.end]
    tops = turn.top_logprobs or ()
    known = codec if pieces is not None else None
    return tuple(
        _token(token, logprob, top, text, known)
        for token, logprob, top, text in itertools.zip_longest(ids, turn.logprobs, tops[: len(ids)], pieces or ())
    )


def _token(
    token: int, logprob: float, top: Sequence[tuple[int, float]] | None, text: str | None, codec: Codec | None
) -> TokenShown:
    others = sorted((pair for pair in top or () if pair[0] != token), key=lambda pair: -pair[1])
    margin = logprob - others[0][1] if others and math.isfinite(logprob) else None
    best = None
    if margin is not None and margin < 0:
        best = _text_of(others[0][0], codec)
    return TokenShown(text=text, token=token, logprob=logprob, margin=margin, best=best)


def _text_of(token: int, codec: Codec | None) -> str:
    """Its number where the tokenizer does not know it, as for another model's."""
    try:
        known = None if codec is None else codec.decode([token], skip_special_tokens=False)
    except (ThawError, LookupError, OverflowError, ValueError):
        known = None
    return f"token {token}" if known is None else known


def codec_at_hand(repo: Repository) -> Codec | None:
    """The tokenizer of the model that the repository was last used with, if its files are here and can be read. No
    engine is loaded."""
    settings = repo.engine_settings()
    model = None if settings is None else settings.options.get("model")
    if not isinstance(model, str) or not (Path(model) / "tokenizer.json").is_file():
        return None
    try:
        from thaw.engines.hf.codec import HFCodec
        from thaw.engines.hf.tokenizer import load_tokenizer

        return HFCodec(load_tokenizer(model))
    except (ImportError, ThawError):
        return None
