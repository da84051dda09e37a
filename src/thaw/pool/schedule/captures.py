"""What of points that only a worker had is in the arena by now. Points are values: what changes about them is here.

A capture runs beside a batch while chunks of the same round wait in their queue, run in another worker, or are rescued
by a drain. Each of them asks here when it needs to know (`now`), and works with the version that it got.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable

from thaw.engines.base import SessionRef
from thaw.pool.schedule.fork_point import ForkPoint, Origin
from thaw.pool.shm.shared_store import SharedPoint, SharedStore
from thaw.pool.stores import StoredPoint
from thaw.repo.session import Session

MAX_PROMPTS = 128
"""Prompts (points that are plain tokens) whose snapshots the arena keeps, the latest ones."""


class Captures:
    """Safe from any thread; its lock is taken last, and nothing is waited for under it. What it knows of a point lasts
    as long as some version of the point, of a session as long as the session."""

    def __init__(self, arena: SharedStore) -> None:
        self._arena = arena
        self._lock = threading.Lock()
        self._points: weakref.WeakKeyDictionary[Origin, tuple[StoredPoint, SharedPoint]] = weakref.WeakKeyDictionary()
        self._sessions: weakref.WeakKeyDictionary[Session, tuple[SessionRef, SharedPoint]] = weakref.WeakKeyDictionary()
        self._prompts: OrderedDict[Hashable, SharedPoint] = OrderedDict()

    def now(self, point: ForkPoint) -> ForkPoint:
        """The point with what is in the arena of it by now."""
        with self._lock:
            found = None if point.stored is not None else self._points.get(point.origin)
        return point if found is None else point.stored_as(*found)

    def add(self, point: ForkPoint, captured: SharedPoint) -> ForkPoint:
        """`point` is the first tokens of `captured`: its version from now on. So was, up to there, the session or the
        prompt that it came from."""
        source = point.source[0]() if point.source is not None else None
        with self._lock:
            if source is not None and point.source is not None:
                self._sessions[source] = point.source[1], captured
            elif point.plain:
                self._prompts[point.key] = captured
                while len(self._prompts) > MAX_PROMPTS:
                    self._prompts.popitem(last=False)
        return self.known(point, captured)

    def known(self, point: ForkPoint, captured: SharedPoint) -> ForkPoint:
        """As `add`, of a capture that was made for an earlier round."""
        at = point.at if point.at < captured.num_tokens else None
        stored = StoredPoint(self._arena, self._arena.at(captured, at))
        with self._lock:
            self._points[point.origin] = stored, captured
        return point.stored_as(stored, captured)

    def forget(self, point: ForkPoint) -> None:
        """What was captured of plain tokens is of no use any more: they can be prefilled again."""
        with self._lock:
            self._points.pop(point.origin, None)
            self._prompts.pop(point.key, None)

    def forget_prompts(self) -> None:
        with self._lock:
            self._prompts.clear()

    def of_session(self, session: Session) -> SharedPoint | None:
        """Unless a chat that dropped tokens has made it another session of the engine's since."""
        with self._lock:
            ref, point = self._sessions.get(session, (None, None))
        return point if ref == session.engine_ref else None

    def add_session(self, session: Session, ref: SessionRef, captured: SharedPoint) -> None:
        with self._lock:
            self._sessions[session] = ref, captured

    def if_prompt(self, point: ForkPoint) -> None:
        """Note what was captured of the same plain tokens earlier."""
        with self._lock:
            found = self._prompts.get(point.key)
            if found is not None:
                self._prompts.move_to_end(point.key)
        if found is not None:
            self.known(point, found)
