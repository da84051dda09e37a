"""A trunk: the point of a round, found once and fixed, whatever happens to sessions and workers afterwards.

From a live session a private fork is taken at once (no KV is copied), so that the caller may go on with the session,
or close it. From a repository or the arena it is a stored point; from plain tokens it is only these.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field

from thaw.core.objects import Turn
from thaw.engines.base import SessionRef
from thaw.pool.shm.shared_store import SharedPoint, SharedStore
from thaw.pool.stores import KeptIn, StoredPoint
from thaw.pool.workers.worker import Incarnation
from thaw.repo.session import Session


class OwnedSession:
    """A session that belongs to whoever holds this object; it is closed when nobody does."""

    def __init__(self, life: Incarnation, ref: SessionRef) -> None:
        self.life, self.ref = life, ref
        weakref.finalize(self, life.forget, ref).atexit = False


@dataclass(eq=False)
class ForkPoint:
    """`at`: number of tokens. `seed`: what children's seeds derive from. `policy`: the version its KV is of.

    `held`: the private fork, if it lives somewhere. `stored`: where it lies in one of the pool's stores. `kept`: what
    of it they have. `plain`: nothing but tokens, so prefilling it again is what was done before. `source`: the caller's
    session, as the engine named it then, to remember that it was captured.
    """

    key: Hashable
    at: int
    tokens: tuple[int, ...]
    turns: tuple[Turn, ...]
    seed: int
    policy: str
    held: OwnedSession | None = None
    stored: StoredPoint | None = None
    plain: bool = False
    kept: KeptIn = field(default_factory=KeptIn)
    captured: SharedPoint | None = None
    source: tuple[weakref.ref[Session], SessionRef] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while it is captured, so that this is done once."""

    def lives_in(self, life: Incarnation) -> bool:
        return self.held is not None and self.held.life is life and not life.over

    @property
    def alive(self) -> bool:
        """Whether it lives in any worker as a session."""
        return self.held is not None and not self.held.life.over

    def put(self, arena: SharedStore, point: SharedPoint) -> None:
        """It is in the arena from now on, as the first tokens of `point`."""
        self.kept = self.kept.add(arena.store, point.kept)
        self.stored = StoredPoint(arena, arena.at(point, self.at if self.at < point.num_tokens else None))
        self.captured = point

    def forget_stored(self) -> None:
        """What was stored of it is of no use any more; for a `plain` one, whose tokens can be prefilled again."""
        self.stored, self.captured, self.kept = None, None, KeptIn()
