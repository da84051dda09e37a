"""The arena: a repository of the pool's own in shared memory, where rounds live unless they are committed.

It has the packs, objects and index of any repository, so engines capture into it and hydrate from it by the way they
know, and whatever is read is hashed. Packs that were not used for longest are *spilled* when it grows over its limit:
moved to a folder on disk, with a link in their place, so nothing that names them changes. All of it goes with the pool.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import ClassVar

from thaw.core.errors import NotFound, RefConflict, StorageFailed
from thaw.data.files import storage_errors
from thaw.engines.base import HydratePlan, SessionRef
from thaw.pool.values import ArenaStats, Tier
from thaw.repo import commit as commits
from thaw.repo import resolve
from thaw.repo.context import Context
from thaw.repo.kept import Kept
from thaw.repo.resolve import ResolvedPoint
from thaw.store import RefUpdate, Store

GC_AFTER = 64
"""Points let go of before their bytes are reclaimed, unless the arena is full sooner."""


@dataclass(eq=False)
class SharedPoint:
    """A session in the arena; its bytes are kept as long as this object lives. `point`: its end. `kept`: what a child
    need not write."""

    point: ResolvedPoint
    kept: Kept
    seconds: float
    nbytes: int


class SharedStore:
    """Safe from any thread. `limit_nbytes` is of packs in shared memory; captures under way may exceed it."""

    tier: ClassVar[Tier] = "arena"

    def __init__(self, folder: Path, spill: Path, limit_nbytes: int) -> None:
        self.store = Store.init(folder)
        self.limit_nbytes = limit_nbytes
        self._spill = spill
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._gc_lock = threading.Lock()
        self._used: dict[str, float] = {}
        self._dropped: SimpleQueue[str] = SimpleQueue()
        """Names of points that nobody holds. A finalizer puts them there, which may run anywhere: it takes no lock."""
        self._reclaimed = self._captures = self._spills = self._loads = 0
        """Under the lock. How many points there are follows from them, so that no finalizer has to count."""
        self._closed = False

    def capture(self, context: Context, session: SessionRef, kept: Kept, nbytes: int = 0) -> SharedPoint:
        """The session as it stands, in the arena. `context` is of this store and the session's engine. `nbytes`: what
        it is expected to take, for which room is made first."""
        if nbytes:
            self.make_room(nbytes)
        began = time.perf_counter()
        name = f"p/{next(self._numbers)}"
        request = commits.Request(session=session, parent=None, message="", branch=name, meta={}, expect=None)
        done = commits.write(context, request, kept)
        if done.conflict is not None:
            raise done.conflict
        with self._lock:
            self._captures += 1
            self._used.update((pack.name, time.monotonic()) for pack in done.captured.packs)
        end = resolve.at(self.store, done.result.commit)
        point = SharedPoint(end, done.kept, time.perf_counter() - began, done.result.nbytes_written)
        weakref.finalize(point, self._dropped.put, name).atexit = False
        self.make_room(0)
        return point

    def at(self, point: SharedPoint, token: int | None) -> ResolvedPoint:
        return point.point if token is None else resolve.at(self.store, point.point.commit, token=token)

    def loaded(self, plan: HydratePlan) -> Tier:
        """Note a load, and say where its bytes were: on disk when any of its packs is spilled."""
        named = [*(piece.blobs for piece in plan.slices), *(point.blobs for point in plan.points)]
        packs = {location.pack for one in named for places in one.values() for location in places}
        with self._lock:
            self._loads += 1
            self._used.update(dict.fromkeys(packs, time.monotonic()))
        return "disk" if any((self.store.packs / pack).is_symlink() for pack in packs) else "arena"

    def make_room(self, nbytes: int) -> None:
        """Reclaim and spill until `nbytes` more fit, or nothing is left to spill."""
        dropped, over = self._dropped.qsize(), sum(self._resident().values()) + nbytes - self.limit_nbytes
        if dropped >= GC_AFTER or (dropped and over > 0):
            self.reclaim()
            over = sum(self._resident().values()) + nbytes - self.limit_nbytes
        for path, size in self._oldest() if over > 0 else ():
            if over <= 0:
                break
            over -= size if self._move_out(path) else 0

    def reclaim(self) -> None:
        """Remove the bytes of points that nobody holds."""
        with self._gc_lock:
            if self._closed:
                return
            names = list(self._take_dropped())
            for name in names:
                with contextlib.suppress(NotFound, RefConflict):
                    self.store.update_refs(
                        RefUpdate(name=name, kind="branch", target=None, expect="any", reason="released")
                    )
            self.store.gc(keep_reflog_s=0.0)
            self._sweep_spill()
            left = {path.name for path in self.store.packs.iterdir()}
            with self._lock:
                self._used = {name: used for name, used in self._used.items() if name in left}

    def _take_dropped(self) -> Iterator[str]:
        with contextlib.suppress(Empty):
            while True:
                name = self._dropped.get_nowait()
                with self._lock:
                    self._reclaimed += 1
                yield name

    def stats(self) -> ArenaStats:
        spilled, nbytes = sum(_size(entry) for entry in os.scandir(self._spill)), sum(self._resident().values())
        with self._lock:
            points = max(0, self._captures - self._reclaimed - self._dropped.qsize())
            return ArenaStats(
                path=str(self.store.path), nbytes=nbytes, limit_nbytes=self.limit_nbytes, spilled_nbytes=spilled,
                num_points=points, num_captures=self._captures, num_spills=self._spills, num_loads=self._loads,
            )  # fmt: skip

    def close(self) -> None:
        self._closed = True
        self.store.close()

    def _resident(self) -> dict[Path, int]:
        """Packs that are in shared memory, with their sizes."""
        found = {}
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self.store.packs):
                with contextlib.suppress(FileNotFoundError):
                    if not entry.is_symlink():
                        found[Path(entry.path)] = entry.stat(follow_symlinks=False).st_size
        return found

    def _oldest(self) -> list[tuple[Path, int]]:
        done = [(path, size) for path, size in self._resident().items() if path.suffix == ".safetensors"]
        with self._lock:
            return sorted(done, key=lambda pair: self._used.get(pair[0].name, 0.0))

    def _move_out(self, path: Path) -> bool:
        """Copy the pack to disk and put a link in its place, atomically for readers. False: it was gone meanwhile."""
        target, link = self._spill / path.name, path.with_name(path.name + ".link")
        with self._gc_lock, storage_errors(target, "spill a pack to"):
            # Two captures that need room have listed the same packs. What is copied now would be the other's copy.
            if path.is_symlink():
                return False
            try:
                shutil.copyfile(path, target)
                target.chmod(0o600)
                os.symlink(target, link)
                os.rename(link, path)
            except FileNotFoundError:
                return False
            except OSError as error:
                for leftover in (link, target):
                    leftover.unlink(missing_ok=True)
                raise StorageFailed(f"the arena is over its limit and {target} cannot be written: {error}") from error
        with self._lock:
            self._spills += 1
        return True

    def _sweep_spill(self) -> None:
        """Files on disk that no link names any more."""
        for entry in os.scandir(self._spill):
            if not (self.store.packs / entry.name).is_symlink():
                os.unlink(entry.path)


def _size(entry: os.DirEntry[str]) -> int:
    """0 for a file that was removed since it was listed."""
    with contextlib.suppress(FileNotFoundError):
        return entry.stat().st_size
    return 0
