"""gc: removes what no ref, no reflog entry within the limit and no live lease needs. Ids never change.

    mark     in one view of the database, while others commit
    doom     short transactions, each with marks brought up to date: surviving segments are found through surviving
             states; dead rows are deleted, what needs before what it needs, and a dead segment is found no more before
             the states go that it was found through; in the last, packs without a live byte are doomed. A commit under
             way that builds on what is gone gets `Conflict`; what is there still, it makes found again.
    unlink   doomed packs that no older reader's lease holds
    sweep    temporary and unindexed files that no live lease names
    rewrite  packs that are mostly dead, and many small ones, are copied into a new pack, doomed and unlinked

Killed at any point it leaves a repository as good as before; the next gc finishes. One gc runs at a time. On a full
disk it runs on the reserve (see `thaw.store.reserve`): no transaction is large, and what frees space comes first.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from thaw.core.errors import CorruptDatabase, StorageFailed
from thaw.data.files import storage_errors, sync_folder
from thaw.store import boundary, leases, objects, reserve, windows
from thaw.store.home import StoreHome
from thaw.store.locks import locked
from thaw.store.mark import UPKEEP, Reachable, catch_up, mark_all
from thaw.store.repack import choose, copy_packs
from thaw.store.schema import COLLECTING, KEEP_REFLOG_S
from thaw.store.settings import drop_setting, set_setting
from thaw.store.windows import Windows

T = TypeVar("T")
Found = tuple[str, bytes, str, str]
"""window, key, segment, state: by which a segment is found, and through which state."""


@dataclass
class GcReport:
    """What gc did, or with `dry_run` would do. `nbytes_freed` counts file sizes on disk.

    `packs_waiting`: doomed, but a reader's lease still holds them; the next gc unlinks them. `damaged`: packs that
    could not be copied because their bytes are not what was written; they were left as they are. `strangers`: folders
    in packs/, which nobody but their owner removes. `packs_without_room`: those that a full disk left as they were.
    """

    dry_run: bool
    commits_removed: int = 0
    objects_removed: int = 0
    blobs_removed: int = 0
    packs_removed: int = 0
    packs_rewritten: int = 0
    packs_waiting: int = 0
    packs_without_room: int = 0
    orphans_removed: int = 0
    nbytes_freed: int = 0
    nbytes_kept: int = 0
    seconds: float = 0.0
    damaged: tuple[str, ...] = ()
    strangers: tuple[str, ...] = ()


def collect_garbage(
    store: StoreHome, *, dry_run: bool = False, keep_reflog_s: float = KEEP_REFLOG_S, now: float | None = None
) -> GcReport:
    """Runs gc; safe beside commits and readers in any process. Raises `Busy` when another gc runs, `Damaged`.

    On a full disk, and only there, it takes the reserve's space, and gives it back.
    """
    began = time.perf_counter()
    since_ns = max(0, int(((time.time() if now is None else now) - keep_reflog_s) * 1e9))
    report = GcReport(dry_run=dry_run)
    busy = f"another gc is running in {store.path}. Try again when it is done."

    def collect() -> None:
        with locked(store.path / "gc.lock", wait_s=0, busy=busy):
            if dry_run:
                with store.database.read() as connection:
                    _predict(store, connection, mark_all(connection, since_ns), report)
            else:
                _collect(store, since_ns, report)

    if dry_run:
        collect()
    else:
        reserve.with_room(store.path, collect)
    report.seconds = time.perf_counter() - began
    return report


def _collect(store: StoreHome, since_ns: int, report: GcReport) -> None:
    with store.database.read() as connection:
        marks = mark_all(connection, since_ns)
        dead = _dead(connection, marks)
        stale = _stale(connection, marks)
    commits, others = _parted(dead, lambda row: row[0] == "commit")
    homeless, unused = _parted(stale, lambda row: row[2] in marks.objects)
    for rows in _batches(homeless):
        _find_anew(store, marks, since_ns, rows)
    for some in _batches(commits):
        _delete(store, marks, since_ns, some, report)
    for rows in _batches(unused):
        _find_anew(store, marks, since_ns, rows)
    for some in _batches(others):
        _delete(store, marks, since_ns, some, report)
    with store.database.write() as connection:
        catch_up(connection, marks, since_ns)
        _rehome(connection, marks)
        drop_setting(connection, COLLECTING)
        boundary.prune(connection)
        _doom_empty(connection)
        for lease in leases.split(connection)[1]:
            leases.release(connection, lease.id)
    _unlink(store, report)
    _sweep(store, report)
    _rewrite(store, report)
    report.nbytes_kept = _pack_bytes(store)


def _parted(rows: list[T], belongs: Callable[[T], bool]) -> tuple[list[T], list[T]]:
    return [row for row in rows if belongs(row)], [row for row in rows if not belongs(row)]


def _batches(rows: list[T]) -> Iterator[list[T]]:
    for begin in range(0, len(rows), BATCH):
        yield rows[begin : begin + BATCH]


BATCH = 1000
"""Rows deleted in one transaction: with their entries in indexes a few MiB of write-ahead log."""
_ORDER = ("commit", "state", "segments", "turns", "segment", "turn", "model", "blob")
"""Kinds, each before what it may need, so that what is left between two transactions is whole."""


def _delete(store: StoreHome, marks: Reachable, since_ns: int, some: list[tuple[str, str]], report: GcReport) -> None:
    """Deletes those of `some` that are dead still. What a power cut brings back, the next gc deletes."""
    with store.database.write(durable=False) as connection:
        catch_up(connection, marks, since_ns)
        dead = [(kind, one) for kind, one in some if one not in marks.objects and one not in marks.blobs]
        blobs = [(one,) for kind, one in dead if kind == "blob"]
        connection.executemany("DELETE FROM objects WHERE id = ?", [(one,) for kind, one in dead if kind != "blob"])
        connection.executemany("DELETE FROM blobs WHERE id = ?", blobs)
    report.commits_removed += sum(kind == "commit" for kind, _ in dead)
    report.objects_removed += len(dead) - len(blobs)
    report.blobs_removed += len(blobs)


def _dead(connection: sqlite3.Connection, marks: Reachable) -> list[tuple[str, str]]:
    """(kind, id) of what is stored but not marked, in the order in which it may go: of a kind, newest first.

    Raises `CorruptDatabase` where what is marked has no row: the row of what seems dead may have been its.
    """
    alive = marks.objects | marks.blobs
    found: dict[str, list[str]] = {kind: [] for kind in _ORDER}
    num_alive = 0
    for kind, one, _ in objects.read_places(connection):
        if one in alive:
            num_alive += 1
        else:
            found.setdefault(kind, []).append(one)
    if num_alive != len(alive):
        raise CorruptDatabase(f"{len(alive)} objects and blobs are needed, {num_alive} of them are stored. {UPKEEP}")
    return [(kind, one) for kind, of_kind in found.items() for one in of_kind]


def _stale(connection: sqlite3.Connection, marks: Reachable) -> list[Found]:
    """Rows by which a dead segment is found, or a segment through a dead state."""
    rows = connection.execute('SELECT "window", "key", segment, state FROM segments').fetchall()
    return [row for row in rows if row[2] not in marks.objects or row[3] not in marks.objects]


def _find_anew(store: StoreHome, marks: Reachable, since_ns: int, rows: list[Found]) -> None:
    """Live segments of `rows` are found through live states, those that are dead still no more."""
    with store.database.write(durable=False) as connection:
        set_setting(connection, COLLECTING, "1")
        catch_up(connection, marks, since_ns)
        _lose(connection, rows)
        _home(connection, marks, {row[2] for row in rows})


def _rehome(connection: sqlite3.Connection, marks: Reachable) -> None:
    """What a commit meanwhile has made live again is found through a live state, too."""
    _lose(connection, _stale(connection, marks))
    found = {segment for (segment,) in connection.execute("SELECT segment FROM segments")}
    _home(connection, marks, marks.homes.keys() - found)


def _lose(connection: sqlite3.Connection, rows: list[Found]) -> None:
    query = 'DELETE FROM segments WHERE "window" = ? AND "key" = ? AND segment = ?'
    connection.executemany(query, [row[:3] for row in rows])


def _home(connection: sqlite3.Connection, marks: Reachable, segments: Collection[str]) -> None:
    homes = (home for home in marks.homed() if home[0] in segments)
    windows.insert(connection, Windows(lambda one: objects.read_bytes(connection, one)).rows(homes))


def _doom_empty(connection: sqlite3.Connection) -> None:
    """Dooms packs that no row points into."""
    used = {pack for _, _, pack in objects.read_places(connection)}
    there = objects.read_packs(connection, "doomed_ns IS NULL")
    empty = [pack for pack in there if pack.name not in used]
    objects.doom_packs(connection, empty, time.time_ns())


def _rewrite(store: StoreHome, report: GcReport) -> None:
    """Each group's old packs go before the next is copied; where a new pack has no room, the others wait for it."""
    with store.database.read() as connection:
        groups = choose(connection, store.packs)
    damaged: list[str] = []
    for group in groups:
        try:
            report.packs_rewritten += copy_packs(store, group, damaged)
        except StorageFailed as error:
            if not reserve.is_full(error, store.path):
                raise
            report.packs_without_room += len(group)
        _unlink(store, report)
    report.damaged = tuple(damaged)


def _unlink(store: StoreHome, report: GcReport) -> None:
    removed, report.packs_waiting, freed = unlink_doomed(store)
    report.packs_removed += removed
    report.nbytes_freed += freed


def unlink_doomed(store: StoreHome) -> tuple[int, int, int]:
    """Unlinks doomed packs; (how many, how many wait for a reader, bytes of files).

    They go when no lease of a reader is older than their doom. File first, row after: a crash between them leaves a row
    that the next gc finds without a file. Raises `CorruptDatabase` when rows point into a doomed pack.
    """
    with store.database.read() as connection:
        readers = [lease.taken_ns for lease in leases.split(connection)[0] if lease.kind == "read"]
        oldest = min(readers, default=1 << 63)
        doomed = objects.read_packs(connection, "doomed_ns IS NOT NULL")
        gone = [pack.name for pack in doomed if pack.doomed_ns is not None and pack.doomed_ns < oldest]
        used = [name for name in gone if objects.is_used(connection, name)]
    if used:
        raise CorruptDatabase(f"pack {used[0]} is doomed, yet rows point into it; it stays. Run `thaw fsck`.")
    if not gone:
        return 0, len(doomed), 0
    freed, _ = _unlink_files(store.packs, gone)
    with store.database.write() as connection:
        connection.executemany("DELETE FROM packs WHERE name = ?", [(name,) for name in gone])
    return len(gone), len(doomed) - len(gone), freed


def _unlink_files(folder: Path, names: Iterable[str]) -> tuple[int, list[str]]:
    """Unlinks for good; returns the bytes of the files that were there, and what is no file and stays."""
    freed, left = 0, []
    with storage_errors(folder, "remove packs from"):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(folder / name)
                if stat.S_ISDIR(status.st_mode):
                    left.append(name)
                    continue
                os.unlink(folder / name)
                freed += status.st_size
        sync_folder(folder)
    return freed, left


def _sweep(store: StoreHome, report: GcReport) -> None:
    gone = orphans(store)
    if gone:
        freed, left = _unlink_files(store.packs, gone)
        report.nbytes_freed += freed
        report.orphans_removed = len(gone) - len(left)
        report.strangers = tuple(left)


def orphans(store: StoreHome) -> list[str]:
    """What belongs to nobody: neither indexed nor named by a live lease.

    The folder is listed first: a lease is taken before its file is made, and given back in the transaction that
    indexes it, so a listed file that is neither leased nor indexed afterwards has no owner.
    """
    with storage_errors(store.packs, "list"):
        listed = sorted(os.listdir(store.packs))
    with store.database.read() as connection:
        known = {pack.name for pack in objects.read_packs(connection)}
        for lease in leases.split(connection)[0]:
            known.update(name for pack in lease.packs for name in (pack, f"{pack}.tmp"))
    return [name for name in listed if name not in known]


def _pack_bytes(store: StoreHome) -> int:
    with store.database.read() as connection:
        return sum(pack.nbytes for pack in objects.read_packs(connection, "doomed_ns IS NULL"))


def _predict(store: StoreHome, connection: sqlite3.Connection, marks: Reachable, report: GcReport) -> None:
    """What gc would remove, from one view: whole packs and orphans (rewriting may free more)."""
    dead = _dead(connection, marks)
    report.blobs_removed = sum(kind == "blob" for kind, _ in dead)
    report.commits_removed = sum(kind == "commit" for kind, _ in dead)
    report.objects_removed = len(dead) - report.blobs_removed
    gone = {one for _, one in dead}
    used = {pack for _, one, pack in objects.read_places(connection) if one not in gone}
    for pack in objects.read_packs(connection):
        if pack.name in used:
            report.nbytes_kept += pack.nbytes
        else:
            report.packs_removed += 1
            report.nbytes_freed += pack.nbytes
    for name in orphans(store):
        with contextlib.suppress(OSError):
            status = os.lstat(store.packs / name)
            if stat.S_ISDIR(status.st_mode):
                report.strangers += (name,)
            else:
                report.orphans_removed += 1
                report.nbytes_freed += status.st_size
