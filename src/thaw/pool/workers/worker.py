"""A worker: one engine after another under one name, and which points each has.

An `Incarnation` is one boot of the engine. Sessions, residents and contexts belong to it and are void with it; counts
and the name go on. Residents are sessions at points that rounds came from, least recently used first out.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

from thaw.core.errors import EngineDied, ThawError
from thaw.core.objects import Turn
from thaw.core.proof import Proof
from thaw.engines.base import Engine, HydratePlan, SessionRef
from thaw.pool.backends.base import LinkedHandle, WorkerHandle
from thaw.pool.stores import KeptIn, StoredPoint, Stores
from thaw.pool.workers.reaper import Reaper
from thaw.repo.context import Context

LOCKS = 64
State = Literal["booting", "ready", "draining", "gone"]


@dataclass
class Resident:
    """A session at a point, kept for rounds to fork from. `kept`: what of it the pool's stores have.

    `restore`: the proof of its hydration, None where it was prefilled here. `turns`: of a point that is plain tokens,
    as the engine made them."""

    ref: SessionRef
    kept: KeptIn = field(default_factory=KeptIn)
    restore: Proof | None = None
    turns: tuple[Turn, ...] = ()


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
        self._residents: OrderedDict[Hashable, Resident] = OrderedDict()
        self._making = [threading.Lock() for _ in range(LOCKS)]

    def check(self) -> None:
        if self.over:
            raise EngineDied(f"worker {self.name}'s engine has ended, and with it the sessions that only it had")

    def link(self, stored: StoredPoint | None) -> str:
        """Over which link the point would come here: "" on one host, and where it lies beside the engine."""
        return "" if self.links is None or stored is None else self.links.link(stored.point.state)

    def came_over(self, plan: HydratePlan) -> str:
        return "" if self.links is None else self.links.came_over(plan)

    def holds(self, stored: StoredPoint | None) -> None:
        """The point's KV was written or read here."""
        if self.links is not None and stored is not None:
            self.links.holds(stored.point.state)

    def making(self, key: Hashable) -> threading.Lock:
        """Held while a point is brought here, so that two batches bring it once (and seldom another one with it)."""
        return self._making[hash(key) % LOCKS]

    def resident(self, key: Hashable) -> Resident | None:
        with self._lock:
            found = self._residents.get(key)
            if found is not None:
                self._residents.move_to_end(key)
            return found

    def has(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._residents

    def keep(self, key: Hashable, resident: Resident) -> None:
        with self._lock:
            self._residents[key] = resident
            over = len(self._residents) - self._limit
            gone = [self._residents.popitem(last=False) for _ in range(max(over, 0))]
        for _, found in gone:
            self.forget(found.ref)

    def drop(self, key: Hashable) -> None:
        with self._lock:
            found = self._residents.pop(key, None)
        if found is not None:
            self.forget(found.ref)

    def drop_all(self) -> None:
        with self._lock:
            found, self._residents = list(self._residents.values()), OrderedDict()
        for resident in found:
            self.forget(resident.ref)

    def num_residents(self) -> int:
        with self._lock:
            return len(self._residents)

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
