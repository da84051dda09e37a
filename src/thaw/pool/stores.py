"""The stores that a pool's points lie in, as one list: the arena, and the pool's repository where it has one.

Whatever looks a point up, loads it or remembers what of a session is stored goes over this list and asks no store which
one it is. A further store (a repository of another host, say) is one more `PointStore`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import msgspec

from thaw.engines.base import HydratePlan
from thaw.pool.values import Tier
from thaw.repo.kept import Kept
from thaw.repo.resolve import ResolvedPoint
from thaw.store import Store

if TYPE_CHECKING:
    from thaw.pool.shm.shared_store import SharedPoint, SharedStore


class PointStore(Protocol):
    """`tier`: where its bytes are expected, before a load says where they were."""

    store: Store
    tier: ClassVar[Tier]

    def loaded(self, plan: HydratePlan) -> Tier:
        """Note a load, and say where its bytes were."""


class Durable:
    """The pool's repository."""

    tier: ClassVar[Tier] = "disk"

    def __init__(self, store: Store) -> None:
        self.store = store

    def loaded(self, plan: HydratePlan) -> Tier:
        return "disk"


class Stores:
    """In the order in which they are looked through. `durable` is the one that sessions commit to, if there is one."""

    def __init__(self, arena: SharedStore, durable: Store | None) -> None:
        self.arena = arena
        self.durable = None if durable is None else Durable(durable)
        self.all: tuple[PointStore, ...] = (arena,) if self.durable is None else (arena, self.durable)


@dataclass(frozen=True)
class StoredPoint:
    """A point in one of the pool's stores. `shared`: of one in the arena, keeps its bytes there."""

    where: PointStore
    point: ResolvedPoint
    shared: SharedPoint | None = None


class KeptIn(msgspec.Struct, frozen=True):
    """What of one session each store has, by UUID. As `Kept`: immutable, and only ever a saving."""

    by_store: dict[str, Kept] = {}

    def of(self, store: Store) -> Kept:
        return self.by_store.get(store.uuid) or Kept()

    def add(self, store: Store, kept: Kept) -> KeptIn:
        """With `kept` for that store, in place of what was known."""
        return KeptIn({**self.by_store, store.uuid: kept})

    def cut(self, num_kv: int) -> KeptIn:
        return KeptIn({uuid: kept.cut(num_kv) for uuid, kept in self.by_store.items()})
