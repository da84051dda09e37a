"""A live session: tokens, KV, turns and what the next token needs. Owned by the driver's thread.

Between steps one of two things holds: `row` is set and kv.num_tokens == len(tokens) (the next logits are known), or
the last tokens (usually one, just sampled) have no KV yet and are fed first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from thaw.core.errors import StaleSession
from thaw.core.kv_ranges import KVRange
from thaw.core.objects import Boundary, Turn
from thaw.core.proof import Proof
from thaw.engines.base import SessionRef, SessionView, Slice
from thaw.engines.embedded.backend import Backend, Logits, Row
from thaw.engines.embedded.pages import PagedKV
from thaw.engines.embedded.park import Parked
from thaw.engines.embedded.stale import StaleKV
from thaw.engines.embedded.weights import Weights
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
    stale: StaleKV
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
    dropped: bool = False
    """The engine slept and let go of its KV."""

    def all_turns(self) -> tuple[Turn, ...]:
        return (*self.turns, self.turn.freeze()) if self.turn is not None else tuple(self.turns)

    def drop(self) -> None:
        """Let go of its KV and of what decides its next token; what it says stays."""
        self.kv = PagedKV(self.kv.factory)
        self.row = self.last = self.stored_boundary = None
        self.loaded, self.dropped = (), True

    def require_kept(self) -> None:
        """Raise `StaleSession` where its KV was let go of."""
        if self.dropped:
            raise StaleSession(
                f"the engine slept, and let go of the KV of session {self.ref[:8]}…. Open its commit again "
                "(repo.session(point)); repo.sleep() and repo.wake() store sessions before and load them afterwards"
            )

    @property
    def of(self) -> Weights:
        """What computes its KV now."""
        return Weights(self.policy, self.epoch)

    def kv_ranges(self) -> tuple[KVRange, ...]:
        """Which weights computed its KV, also while it is parked; () where those that run did, or nobody asked."""
        kept = self.parked.num_tokens if isinstance(self.parked, Parked) else self.kv.num_tokens
        return self.stale.ranges(self.of, kept)

    def step(self, now: Weights) -> None:
        """Others run now than those that computed its KV, which stays as it is; it does not decide a token any more."""
        self.stale.step(self.of, now, self.kv.num_tokens)
        self.policy, self.epoch = now
        self.row = self.last = self.stored_boundary = None
        self._say_stale()

    def load_stale(self, ranges: tuple[KVRange, ...], *, keep_row: bool) -> Proof:
        """It came with KV of others, as `ranges` say, and its owner wants it kept; the proof says so. `keep_row`: what
        decides its next token is of those that run."""
        self.stale.asked = True
        self.stale.load(self.of, ranges)
        if not keep_row:
            self.row = self.stored_boundary = None
        return self._say_stale()

    def cut_stale(self) -> None:
        """The last token's KV is about to be computed again."""
        had, num_kv = bool(self.stale.spans), self.kv.num_tokens
        self.stale.cut(self.of, num_kv)
        if had:
            proof = self._say_stale()
            self.proof = msgspec.structs.replace(
                proof, num_cached_tokens=min(proof.num_cached_tokens, num_kv), matched=min(proof.matched, num_kv)
            )

    def _say_stale(self) -> Proof:
        """In its proof, which is returned."""
        num_kv, ranges = self.kv.num_tokens, self.kv_ranges()
        before = self.proof or Proof(
            num_prompt_tokens=len(self.tokens),
            num_cached_tokens=num_kv,
            matched=num_kv,
            first_mismatch=None,
            verification="live-shared",
            continuation="decode-exact",
            share_prefix=self.share_prefix,
        )
        self.proof = msgspec.structs.replace(before, kv_ranges=ranges)
        return self.proof

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
            kv_ranges=self.kv_ranges(),
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
