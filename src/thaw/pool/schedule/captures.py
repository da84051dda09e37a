"""Captures: points that only a worker has put into the arena. Points are values: what changes about them is here.

A capture runs beside a batch while chunks of the same round wait in their queue, run in another worker, or are rescued
by a drain. Each of them asks here when it needs to know (`now`), and works with the version that it got.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace

from thaw.engines.base import SessionRef
from thaw.pool.schedule.fork_point import ForkPoint
from thaw.pool.shm.shared_store import SharedPoint, SharedStore
from thaw.pool.stores import StoredPoint
from thaw.pool.workers.worker import OwnedSession
from thaw.repo.session import Session

MAX_PROMPTS = 128
"""Prompts (points that are plain tokens) whose snapshots the arena keeps, the latest ones."""


class Captures:
    """Puts points into the arena, and knows which are there. Safe from any thread; its own lock is taken last, and
    nothing is waited for under it. What it knows of a point lasts as long as some version of the point, of a session as
    long as the session. `token_nbytes`: of one token's KV."""

    def __init__(self, arena: SharedStore, token_nbytes: int) -> None:
        self._arena, self._token_nbytes = arena, token_nbytes
        self._lock = threading.Lock()
        self._sessions: weakref.WeakKeyDictionary[Session, tuple[SessionRef, SharedPoint]] = weakref.WeakKeyDictionary()
        self._prompts: OrderedDict[Hashable, SharedPoint] = OrderedDict()

    def now(self, point: ForkPoint) -> ForkPoint:
        """The version of this moment: with what is in the arena of the point by now, and without its private fork where
        the worker of that has ended."""
        # No lock: each of the two changes once, in one step, and a version that is late by that step is good as well.
        # Capturing looks again, and an engine that has just ended says so.
        stored, held = point.stored or point.origin.stored, point.held
        if held is not None and held.life.over:
            held = None
        unchanged = stored is point.stored and held is point.held
        return point if unchanged else replace(point, stored=stored, held=held)

    def capture(self, point: ForkPoint, session: OwnedSession | None = None) -> ForkPoint:
        """Put a point into the arena, once; its version there. It is taken from its private fork, or, where that is
        none or has ended, from `session`, which is at the point too; with neither the point stays as it is. Raises what
        a commit raises."""
        with point.origin.capturing:  # a batch, a drain and a snapshot may all want it: the first captures, others wait
            now = self.now(point)
            source = now.held or session
            if now.stored is not None or source is None:
                return now
            life, store = source.life, self._arena.store
            captured = self._arena.capture(
                life.contexts[store.uuid], source.ref, source.kept.of(store), self._token_nbytes * point.at
            )
            source.kept = source.kept.add(store, captured.kept)
            point.origin.stored = stored = StoredPoint(self._arena, captured.point, captured)
            self._remember(point, captured)
            if life.links is not None:
                life.holds(stored)
            return replace(now, stored=stored)

    def _remember(self, point: ForkPoint, captured: SharedPoint) -> None:
        """For later rounds from the session or the prompt that the point came from."""
        source = point.source[0]() if point.source is not None else None
        with self._lock:
            if source is not None and point.source is not None:
                self._sessions[source] = point.source[1], captured
            elif point.plain:
                self._prompts[point.key] = captured
                while len(self._prompts) > MAX_PROMPTS:
                    self._prompts.popitem(last=False)

    def known(self, point: ForkPoint, captured: SharedPoint) -> ForkPoint:
        """The point is the first tokens of what was captured for an earlier round: its version there."""
        at = point.at if point.at < captured.point.num_tokens else None
        point.origin.stored = stored = StoredPoint(self._arena, self._arena.at(captured, at), captured)
        return replace(point, stored=stored)

    def forget(self, point: ForkPoint) -> None:
        """What was captured of plain tokens is of no use any more: they can be prefilled again."""
        with point.origin.capturing:  # a capture of the old KV that is under way is forgotten with the rest
            point.origin.stored = None
            with self._lock:
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
