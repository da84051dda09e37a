"""The fork point of a round: what a caller gave, found once and fixed, whatever happens to it afterwards. A value.

From a live session a private fork is taken at once (no KV is copied), so that the caller may go on with the session,
or close it. From a repository or the arena it is a stored point; from plain tokens it is only these. What is captured
of it later is no part of it: `Captures` knows that, and gives another version of the point.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field, replace

from thaw.core.ids import CommitId
from thaw.core.objects import Turn
from thaw.engines.base import SessionRef
from thaw.pool.shm.shared_store import SharedPoint
from thaw.pool.stores import KeptIn, StoredPoint
from thaw.pool.workers.worker import Incarnation
from thaw.repo.session import Session


class OwnedSession:
    """A session that belongs to whoever holds this object; it is closed when nobody does."""

    def __init__(self, life: Incarnation, ref: SessionRef) -> None:
        self.life, self.ref = life, ref
        weakref.finalize(self, life.forget, ref).atexit = False


class Origin:
    """What all versions of one point have in common. `capturing`: held while it is captured, so that this is done once
    however many batches, drains and snapshots need it."""

    def __init__(self) -> None:
        self.capturing = threading.Lock()


@dataclass(frozen=True, eq=False)
class ForkPoint:
    """`at`: number of tokens. `seed`: what children's seeds derive from. `policy`: the version its KV is of.

    `held`: the private fork, if it lives somewhere. `plain`: nothing but tokens, so prefilling it again is what was
    done before. `source`: the caller's session, as the engine named it then, to remember that it was captured.
    `stored`: where it lies in one of the pool's stores. `kept`: what of it they have. `captured`: keeps the arena's
    bytes of it. `parent`: the commit that sessions from here commit behind, if it is a point of the pool's repository.
    """

    key: Hashable
    at: int
    tokens: tuple[int, ...]
    turns: tuple[Turn, ...]
    seed: int
    policy: str
    held: OwnedSession | None = None
    plain: bool = False
    source: tuple[weakref.ref[Session], SessionRef] | None = None
    stored: StoredPoint | None = None
    kept: KeptIn = field(default_factory=KeptIn)
    captured: SharedPoint | None = None
    parent: CommitId | None = None
    origin: Origin = field(default_factory=Origin)

    def lives_in(self, life: Incarnation) -> bool:
        return self.held is not None and self.held.life is life and not life.over

    @property
    def alive(self) -> bool:
        """Whether it lives in any worker as a session."""
        return self.held is not None and not self.held.life.over

    def stored_as(self, stored: StoredPoint, captured: SharedPoint) -> ForkPoint:
        """This point, in the arena: the first tokens of `captured`."""
        kept = self.kept.add(stored.where.store, captured.kept)
        return replace(self, stored=stored, captured=captured, kept=kept)
