"""A worker: one engine after another under one name, and which points each has.

An `Incarnation` is one boot of the engine. Sessions, residents and contexts belong to it and are void with it; counts
and the name go on. Residents are points that rounds came from, least recently used first out. Their sessions belong to
whoever holds them (`OwnedSession`): one that is pushed out while a batch forks from it is closed after that batch.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

from thaw.core.errors import ThawError
from thaw.core.objects import Turn
from thaw.core.proof import Proof
from thaw.engines.base import Engine, HydratePlan, SessionRef
from thaw.pool.backends.base import LinkedHandle, WorkerHandle
from thaw.pool.stores import KeptIn, StoredPoint, Stores
from thaw.pool.workers.reaper import Reaper
from thaw.repo.context import Context

State = Literal["booting", "ready", "draining", "gone"]


class OwnedSession:
    """A session at a point, for rounds to fork from. It belongs to whoever holds this object, and is closed when nobody
    does.

    `kept`: what of it the pool's stores have; changed under the point's `capturing`. `restore`: the proof of its
    hydration, None where it was forked or prefilled. `turns`: of a point that is plain tokens, as the engine made them.
    """

    def __init__(
        self, life: Incarnation, ref: SessionRef, kept: KeptIn | None = None, restore: Proof | None = None
    ) -> None:
        self.life, self.ref, self.kept, self.restore = life, ref, kept or KeptIn(), restore
        self.turns: tuple[Turn, ...] = ()
        # By a weak reference: a finalizer is held until it runs, and one that held the life, which holds its residents,
        # would keep all of them for ever.
        weakref.finalize(self, _forget, weakref.ref(life), ref).atexit = False


@dataclass(eq=False)
class ResidentPoint:
    """A point's place in a worker. `making` is held while the point is brought there, so that of two batches one brings
    it and the other finds it; `session` is set under it, and there from then on."""

    making: threading.Lock = field(default_factory=threading.Lock)
    session: OwnedSession | None = None


class Incarnation:
    """One engine, from its boot to its end."""

    def __init__(self, name: str, host: WorkerHandle, stores: Stores, limit: int, reaper: Reaper) -> None:
        self.name = name
        self.host = host
        self.engine: Engine = host.engine
        self.links = host if isinstance(host, LinkedHandle) else None
        """Where KV may come from other nodes; None on one host."""
        self.has_history = stores.durable is not None
        self.contexts = {where.store.uuid: Context(where.store, host.engine) for where in stores.all}
        """Of this engine and each of the pool's stores, by the store's UUID."""
        self.context = self.contexts[(stores.durable or stores.arena).store.uuid]
        """Where its sessions commit: the pool's repository, else the arena."""
        self.over = False
        self.captures = 0
        """Under way beside its batches; only the fleet changes it, under its lock."""
        self._limit = limit
        self._reaper = reaper
        self._lock = threading.Lock()
        self._residents: OrderedDict[Hashable, ResidentPoint] = OrderedDict()

    def link(self, stored: StoredPoint | None) -> str:
        """Over which link the point would come here: "" on one host, and where it lies beside the engine."""
        return "" if self.links is None or stored is None else self.links.link(stored.point.state)

    def came_over(self, plan: HydratePlan) -> str:
        return "" if self.links is None else self.links.came_over(plan)

    def holds(self, stored: StoredPoint | None) -> None:
        """The point's KV was written or read here."""
        if self.links is not None and stored is not None:
            self.links.holds(stored.point.state)

    def resident(self, key: Hashable) -> ResidentPoint:
        """The point's place here, made if need be. Those that were not asked for for longest make room for it."""
        with self._lock:
            found = self._residents.get(key)
            if found is None:
                # A place to which a point is being brought stays: whoever wants that point is to find it there. The
                # session of one that goes is closed when the batches that fork from it just now let go of it.
                idle = [other for other, place in self._residents.items() if not place.making.locked()]
                for other in itertools.islice(idle, max(0, len(self._residents) + 1 - self._limit)):
                    del self._residents[other]
                found = self._residents[key] = ResidentPoint()
            self._residents.move_to_end(key)
            return found

    def has(self, key: Hashable) -> bool:
        with self._lock:
            found = self._residents.get(key)
            return found is not None and found.session is not None

    def drop(self, key: Hashable) -> None:
        """What is brought to the place at this moment is for its own batch alone: the next one makes another place."""
        with self._lock:
            self._residents.pop(key, None)

    def drop_all(self) -> None:
        with self._lock:
            self._residents.clear()

    def num_residents(self) -> int:
        with self._lock:
            return sum(place.session is not None for place in self._residents.values())

    def forget(self, ref: SessionRef) -> None:
        """Close a session, later and on another thread. May be called from a finalizer."""
        if not self.over:
            self._reaper.soon(functools.partial(self._close_session, ref))

    def _close_session(self, ref: SessionRef) -> None:
        with contextlib.suppress(ThawError):
            self.engine.close_session(ref)


@dataclass(eq=False)
class Worker:
    """What the scheduler knows of one worker; only it changes this, under its lock."""

    name: str
    index: int
    state: State = "booting"
    life: Incarnation | None = None
    running: int = 0
    incarnation: int = 0
    failures_in_row: int = 0
    num_branches: int = 0
    num_failures: int = 0
    boot_s: float = 0.0
    last_error: str = ""


def _forget(life: weakref.ref[Incarnation], ref: SessionRef) -> None:
    """Of a life that nobody holds any more the engine has ended, or is not the pool's to use."""
    held = life()
    if held is not None:
        held.forget(ref)
