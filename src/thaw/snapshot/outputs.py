"""What a request has given out, token by token, so that a stream is taken up at an offset.

Text belongs to the token with which it became known, as the engine streams it. After a restore the part that was stored
is made again from its token ids, and what follows is awaited from the engine: it must be what was given out before.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import msgspec

from thaw.core.errors import LawBroken
from thaw.core.ids import digest
from thaw.core.objects import Turn
from thaw.engines.base import Codec, Delta
from thaw.engines.session.text import TextStream


class OutputPiece(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens [offset, offset + len(token_ids)) of a request's output. `text`: what became known with them."""

    offset: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str


class GivenTokens(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first `num` tokens of an output, by their digest."""

    num: int = 0
    digest: str = ""

    def check(self, tokens: Sequence[int], what: str) -> None:
        """Raise `LawBroken` unless `tokens` begin with these."""
        if self.num and given(tokens[: self.num]) != self:
            raise LawBroken(
                f"{what}: the {self.num} tokens that were given out before are not the ones that were generated now. "
                "Nothing of it was given out: the state, the engine or the batch shape is another one."
            )


def given(tokens: Iterable[int]) -> GivenTokens:
    ids = tuple(tokens)
    return GivenTokens(num=len(ids), digest=str(digest(struct.pack(f"<{len(ids)}I", *ids)))) if ids else GivenTokens()


class RequestOutput:
    """The output of one request. Not locked: whoever writes holds the request's lock."""

    def __init__(self, before: GivenTokens = GivenTokens()) -> None:  # noqa: B008 - a value
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.texts: list[str] = []
        self.tail = ""
        """Text that came behind the last token."""
        self.expected, self._wrong = before, False
        self.num_seen = 0
        """Tokens that somebody has taken."""

    @property
    def text(self) -> str:
        return "".join(self.texts) + self.tail

    @property
    def num_visible(self) -> int:
        """Tokens that may be given out: none before those that were given out once are the same again."""
        return len(self.tokens) if len(self.tokens) >= self.expected.num and not self._wrong else 0

    def take(self, delta: Delta, what: str) -> None:
        """Add the engine's news. Raises `LawBroken` where it is not what was given out before. The text at an abort was
        held back: it comes again where the request goes on."""
        for i, token in enumerate(delta.token_ids):
            last = i + 1 == len(delta.token_ids)
            self._add(token, delta.logprobs[i] if i < len(delta.logprobs) else 0.0, delta.text if last else "", what)
        if not delta.token_ids and delta.finish_reason != "abort":
            self.tail += delta.text

    def replay(self, codec: Codec, before: Sequence[int], turn: Turn, tokens: Sequence[int], what: str) -> None:
        """Begin with what a turn holds: `before` are the session's tokens in front of it."""
        assert turn.sampling is not None
        stream = TextStream(codec, before, turn.sampling.stop)
        logprobs = turn.logprobs or (0.0,) * len(tokens)
        for token, logprob in zip(tokens, logprobs, strict=True):
            stream.push(token)
            self._add(token, logprob, stream.news(final=False), what)
        if turn.finish_reason not in (None, "abort"):
            self.tail = turn.text[len(self.text) :]

    def _add(self, token: int, logprob: float, text: str, what: str) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.texts.append(text)
        if len(self.tokens) == self.expected.num:
            self._wrong = True
            self.expected.check(self.tokens, what)
            self._wrong = False

    def piece(self, offset: int) -> OutputPiece:
        """From there to what is visible."""
        end = self.num_visible
        self.num_seen = max(self.num_seen, end)
        return OutputPiece(
            offset=offset,
            token_ids=tuple(self.tokens[offset:end]),
            logprobs=tuple(self.logprobs[offset:end]),
            text="".join(self.texts[offset:end]),
        )
