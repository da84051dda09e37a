"""A live session: tokens, KV, turns and what the next token needs. Owned by the driver's thread.

Between steps one of two things holds: `row` is set and kv.num_tokens == len(tokens) (the next logits are known), or
the last tokens (usually one, just sampled) have no KV yet and are fed first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from thaw.core.canonical import U64
from thaw.core.errors import PolicyMismatch
from thaw.core.objects import Boundary, Turn
from thaw.core.proof import Proof
from thaw.core.sampling import Sampling
from thaw.engines.base import Codec, SessionRef, SessionView
from thaw.engines.embedded.backend import Backend, Logits, Row
from thaw.engines.embedded.bad_words import BadIds, bad_ids
from thaw.engines.embedded.pages import PagedKV
from thaw.engines.embedded.text import TextStream


@dataclass
class OpenTurn:
    """The completion being generated: everything in `Turn`, still growing. `bad_ids`: its bad words, as token ids."""

    start: int
    sampling: Sampling
    seed: int
    policy: str
    role: str | None
    stream: TextStream
    bad_ids: BadIds = ()
    logprobs: list[float] = field(default_factory=list)
    tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)

    def freeze(self, reason: str | None = None, stop_reason: str | int | None = None) -> Turn:
        """The turn as a value; with `reason` None it is an unfinished one."""
        return Turn(
            kind="completion",
            start=self.start,
            end=self.start + len(self.logprobs),
            role=self.role,
            text=self.stream.text,
            sampling=self.sampling,
            seed=U64(self.seed),
            finish_reason=reason,  # type: ignore[arg-type]
            stop_reason=stop_reason,
            logprobs=tuple(self.logprobs),
            top_logprobs=tuple(self.tops) if self.sampling.logprobs else None,
            policy=self.policy,
        )


@dataclass
class LastLogits:
    """The last logits computed for a session: they predict the token at `position`."""

    logits: Logits
    index: int
    position: int
    batch: int


@dataclass
class LiveSession:
    ref: SessionRef
    kv: PagedKV
    seed: int
    salt: str
    share_prefix: bool
    policy: str
    epoch: int
    tokens: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    turn: OpenTurn | None = None
    row: Row | None = None
    last: LastLogits | None = None
    stored_boundary: Boundary | None = None
    proof: Proof | None = None
    busy: object | None = None
    parked: object | None = None

    def all_turns(self) -> tuple[Turn, ...]:
        return (*self.turns, self.turn.freeze()) if self.turn is not None else tuple(self.turns)

    def view(self) -> SessionView:
        return SessionView(
            tokens=tuple(self.tokens),
            num_kv=self.kv.num_tokens,
            turns=self.all_turns(),
            seed=self.seed,
            salt=self.salt,
            running=self.busy is not None,
            parked=self.parked is not None,
            proof=self.proof,
        )

    def boundary(self, backend: Backend) -> Boundary | None:
        """The last logits as a boundary (without the stored hidden state), computed now."""
        if self.row is not None:
            digest, top = backend.boundary(backend.logits([self.row]), 0)
            return Boundary(position=len(self.tokens), digest=digest, top=top, batch=1)
        if self.last is not None:
            digest, top = backend.boundary(self.last.logits, self.last.index)
            return Boundary(position=self.last.position, digest=digest, top=top, batch=self.last.batch)
        return self.stored_boundary


class HasTurns(Protocol):
    """Any engine's session: tokens, turns and a seed."""

    tokens: list[int]
    turns: list[Turn]
    seed: int


def reopen(session: HasTurns, codec: Codec) -> OpenTurn | None:
    """Take the unfinished (or aborted) last completion back up, replaying its tokens into the text stream."""
    turn = session.turns[-1] if session.turns else None
    if turn is None or turn.kind != "completion" or turn.finish_reason not in (None, "abort") or turn.sampling is None:
        return None
    session.turns.pop()
    stream = TextStream(codec, session.tokens[: turn.start], turn.sampling.stop)
    for token in session.tokens[turn.start : turn.end]:
        stream.push(token)
    stream.news(final=False)  # was given before the interruption
    return OpenTurn(
        start=turn.start,
        sampling=turn.sampling,
        seed=int(turn.seed if turn.seed is not None else session.seed),
        policy=turn.policy,
        role=turn.role,
        stream=stream,
        bad_ids=bad_ids(codec, turn.sampling.bad_words),
        logprobs=list(turn.logprobs or ()),
        tops=list(turn.top_logprobs or ()),
    )


def require_same_policy(turn: Turn, version: str) -> None:
    """Raise `PolicyMismatch` if the unfinished `turn` was begun under another version: a turn is of one policy."""
    if turn.policy != version:
        raise PolicyMismatch(
            f"resume: the completion was begun under policy {turn.policy!r}; the engine now runs {version!r}, and its "
            "tokens would be of no one policy. Use generate: what follows is then a completion of its own."
        )


def cut_turns(turns: Sequence[Turn], at: int, codec: Codec | None, tokens: Sequence[int]) -> list[Turn]:
    """`turns` as they were when the session had `at` tokens: later ones gone, a turn cut through left unfinished."""
    out = []
    for turn in turns:
        if turn.end <= at:
            out.append(turn)
        elif turn.start < at:
            out.append(_truncate(turn, at, codec, tokens))
    return out


def _truncate(turn: Turn, at: int, codec: Codec | None, tokens: Sequence[int]) -> Turn:
    count = at - turn.start
    text = codec.decode(list(tokens[turn.start : at])) if codec is not None else ""
    return Turn(
        kind=turn.kind,
        start=turn.start,
        end=at,
        role=turn.role,
        text=text,
        sampling=turn.sampling,
        seed=turn.seed,
        logprobs=None if turn.logprobs is None else turn.logprobs[:count],
        top_logprobs=None if turn.top_logprobs is None else turn.top_logprobs[:count],
        policy=turn.policy,
    )


def reseed(session: HasTurns, seed: int) -> None:
    """Give a fork's child its own seed, also in a completion that was cut through."""
    session.seed = seed
    turn = session.turns[-1] if session.turns else None
    if turn is not None and turn.kind == "completion" and turn.finish_reason is None:
        session.turns[-1] = msgspec.structs.replace(turn, seed=U64(seed))
