"""A live session: tokens, KV, turns and what the next token needs. Owned by the driver's thread.

Between steps one of two things holds: `row` is set and kv.num_tokens == len(tokens) (the next logits are known), or
the last tokens (usually one, just sampled) have no KV yet and are fed first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from thaw.core.objects import Boundary, Turn
from thaw.core.proof import Proof
from thaw.engines.base import SessionRef, SessionView, Slice
from thaw.engines.embedded.backend import Backend, Logits, Row
from thaw.engines.embedded.pages import PagedKV
from thaw.engines.session.turns import OpenTurn


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
    loaded: tuple[Slice, ...] = ()
    """What its first tokens were read from."""

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
