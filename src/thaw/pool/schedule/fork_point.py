"""The fork point of a round: what a caller gave, found once and fixed, whatever happens to it afterwards. A value.

From a live session a private fork is taken at once (no KV is copied), so that the caller may continue with the session,
or close it. From a repository or the arena it is a stored point; from plain tokens it is only these. What becomes of it
later is no part of it: `Captures` gives another version of the point.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field

from thaw.core.ids import CommitId
from thaw.core.objects import Turn
from thaw.engines.base import SessionRef
from thaw.pool.stores import StoredPoint
from thaw.pool.workers.worker import Incarnation, OwnedSession
from thaw.repo.session import Session


class Origin:
    """What all versions of one point have in common. `capturing`: held while it is captured, so that this is done once
    however many batches, drains and snapshots need it. `stored`: where it is in the arena by now; `Captures` alone
    changes it, and gives it to others as part of a version."""

    def __init__(self) -> None:
        self.capturing = threading.Lock()
        self.stored: StoredPoint | None = None


@dataclass(frozen=True, eq=False)
class ForkPoint:
    """`at`: number of tokens. `seed`: what children's seeds derive from. `policy`: the version its KV is of.

    `held`: the private fork, if it lives somewhere. `plain`: nothing but tokens, so prefilling it again is what was
    done before. `source`: the caller's session, as the engine named it then, to remember that it was captured.
    `stored`: where it lies in one of the pool's stores. `parent`: the commit that sessions from here commit behind, if
    it is a point of the pool's repository.
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
    parent: CommitId | None = None
    origin: Origin = field(default_factory=Origin)

    def lives_in(self, life: Incarnation) -> bool:
        return self.held is not None and self.held.life is life and not life.over
