"""gc: removes what no ref, no reflog entry within the limit and no live lease needs. Ids never change.

    mark     in one view of the database, while others commit
    doom     one short transaction: marks brought up to date, dead rows deleted, segments given to surviving states,
             packs without a live byte doomed. A commit under way that builds on a dead blob gets `Conflict`.
    rewrite  packs that are mostly dead, and many small ones, are copied into a new pack, then doomed
    unlink   doomed packs that no older reader's lease holds
    sweep    temporary and unindexed files that no live lease names

Killed at any point it leaves a repository as good as before; the next gc finishes. One gc runs at a time.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from thaw.data.files import storage_errors, sync_folder
from thaw.store import leases, objects
from thaw.store.backup import locked
from thaw.store.db import Database
from thaw.store.mark import Marks, catch_up, mark_all
from thaw.store.repack import choose, copy_packs
from thaw.store.schema import KEEP_REFLOG_S


class Home(Protocol):
    """What gc needs of its store."""

    path: Path
    packs: Path
    uuid: str
    database: Database


@dataclass
class GcReport:
    """What gc did, or with `dry_run` would do. `nbytes_freed` counts file sizes on disk.

    `packs_waiting`: doomed, but a reader's lease still holds them; the next gc unlinks them. `damaged`: packs that
    could not be copied because their bytes are not what was written; they were left as they are.
    """

    dry_run: bool
    commits_removed: int = 0
    objects_removed: int = 0
    blobs_removed: int = 0
    packs_removed: int = 0
    packs_rewritten: int = 0
    packs_waiting: int = 0
    orphans_removed: int = 0
    nbytes_freed: int = 0
    nbytes_kept: int = 0
    seconds: float = 0.0
    damaged: tuple[str, ...] = ()


def collect_garbage(
    store: Home, *, dry_run: bool = False, keep_reflog_s: float = KEEP_REFLOG_S, now: float | None = None
) -> GcReport:
    """Runs gc; safe beside commits and readers in any process. Raises `Busy` when another gc runs, `Damaged`."""
    began = time.perf_counter()
    since_ns = max(0, int(((time.time() if now is None else now) - keep_reflog_s) * 1e9))
    report = GcReport(dry_run=dry_run)
    busy = f"another gc is running in {store.path}. Try again when it is done."
    with locked(store.path / "gc.lock", wait=False, busy=busy):
        with store.database.read() as connection:
            marks = mark_all(connection, since_ns)
            if dry_run:
                _predict(store, connection, marks, report)
        if not dry_run:
            _doom(store, marks, since_ns, report)
            _rewrite(store, report)
            _unlink(store, report)
            _sweep(store, report)
            report.nbytes_kept = _pack_bytes(store)
    report.seconds = time.perf_counter() - began
    return report


def _doom(store: Home, marks: Marks, since_ns: int, report: GcReport) -> None:
    with store.database.write() as connection:
        catch_up(connection, marks, since_ns)
        dead_objects, dead_blobs = dead(connection, marks)
        _count(connection, dead_objects, dead_blobs, report)
        connection.executemany("DELETE FROM objects WHERE id = ?", [(o,) for o in dead_objects])
        connection.executemany("DELETE FROM blobs WHERE id = ?", [(b,) for b in dead_blobs])
        _rehome(connection, marks)
        doom_empty(connection)
        for lease in leases.split(connection)[1]:
            leases.release(connection, lease.id)


def dead(connection: sqlite3.Connection, marks: Marks) -> tuple[list[str], list[str]]:
    """(objects, blobs) that are stored but not marked."""
    stored_objects = (row[0] for row in connection.execute("SELECT id FROM objects"))
    stored_blobs = (row[0] for row in connection.execute("SELECT id FROM blobs"))
    return [o for o in stored_objects if o not in marks.objects], [b for b in stored_blobs if b not in marks.blobs]


def _count(connection: sqlite3.Connection, dead_objects: list[str], dead_blobs: list[str], report: GcReport) -> None:
    report.objects_removed, report.blobs_removed = len(dead_objects), len(dead_blobs)
    commits = {row[0] for row in connection.execute("SELECT id FROM objects WHERE kind = 'commit'")}
    report.commits_removed = len(commits.intersection(dead_objects))


def _rehome(connection: sqlite3.Connection, marks: Marks) -> None:
    """Every live segment is found through a live state; dead segments are found no more."""
    rows = connection.execute("SELECT segment, state FROM segments").fetchall()
    gone = [(segment,) for segment, state in rows if segment not in marks.objects or state not in marks.objects]
    connection.executemany("DELETE FROM segments WHERE segment = ?", gone)
    objects.home_segments(connection, marks.homed())


def doom_empty(connection: sqlite3.Connection) -> None:
    """Dooms packs that no row points into."""
    connection.execute(
        "UPDATE packs SET doomed_ns = ? WHERE doomed_ns IS NULL AND name NOT IN (SELECT pack FROM blobs) "
        "AND name NOT IN (SELECT pack FROM objects)",
        (time.time_ns(),),
    )


def _rewrite(store: Home, report: GcReport) -> None:
    with store.database.read() as connection:
        groups = choose(connection)
    damaged: list[str] = []
    for group in groups:
        report.packs_rewritten += copy_packs(store, group, damaged)
    report.damaged = tuple(damaged)


def _unlink(store: Home, report: GcReport) -> None:
    """Doomed packs go when no lease of a reader is older than their doom. File first, row after: a crash between them
    leaves a row that the next gc finds without a file."""
    with store.database.read() as connection:
        readers = [lease.taken_ns for lease in leases.split(connection)[0] if lease.kind == "read"]
        doomed = connection.execute("SELECT name, doomed_ns FROM packs WHERE doomed_ns IS NOT NULL").fetchall()
    oldest = min(readers, default=1 << 63)
    gone = [name for name, doomed_ns in doomed if doomed_ns < oldest]
    report.packs_waiting = len(doomed) - len(gone)
    if gone:
        report.nbytes_freed += _unlink_files(store.packs, gone)
        with store.database.write() as connection:
            connection.executemany("DELETE FROM packs WHERE name = ?", [(name,) for name in gone])
        report.packs_removed += len(gone)


def _unlink_files(folder: Path, names: Iterable[str]) -> int:
    """Unlinks for good; returns the bytes of the files that were there."""
    freed = 0
    with storage_errors(folder, "remove packs from"):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                nbytes = os.stat(folder / name).st_size
                os.unlink(folder / name)
                freed += nbytes
        sync_folder(folder)
    return freed


def _sweep(store: Home, report: GcReport) -> None:
    gone = orphans(store)
    if gone:
        report.nbytes_freed += _unlink_files(store.packs, gone)
        report.orphans_removed = len(gone)


def orphans(store: Home) -> list[str]:
    """Files that belong to nobody: neither indexed nor named by a live lease.

    The folder is listed first: a lease is taken before its file is made, and given back in the transaction that
    indexes it, so a listed file that is neither leased nor indexed afterwards has no owner.
    """
    with storage_errors(store.packs, "list"):
        listed = sorted(os.listdir(store.packs))
    with store.database.read() as connection:
        known = {row[0] for row in connection.execute("SELECT name FROM packs")}
        for lease in leases.split(connection)[0]:
            known.update(name for pack in lease.packs for name in (pack, f"{pack}.tmp"))
    return [name for name in listed if name not in known]


def _pack_bytes(store: Home) -> int:
    with store.database.read() as connection:
        row = connection.execute("SELECT coalesce(sum(nbytes), 0) FROM packs WHERE doomed_ns IS NULL").fetchone()
    return int(row[0])


def _predict(store: Home, connection: sqlite3.Connection, marks: Marks, report: GcReport) -> None:
    """What gc would remove, from one view: whole packs and orphans (rewriting may free more)."""
    dead_objects, dead_blobs = dead(connection, marks)
    _count(connection, dead_objects, dead_blobs, report)
    used = {row[1] for row in connection.execute("SELECT id, pack FROM blobs") if row[0] in marks.blobs}
    used |= {row[1] for row in connection.execute("SELECT id, pack FROM objects") if row[0] in marks.objects}
    for name, nbytes in connection.execute("SELECT name, nbytes FROM packs"):
        if name in used:
            report.nbytes_kept += nbytes
        else:
            report.packs_removed += 1
            report.nbytes_freed += nbytes
    for name in orphans(store):
        report.orphans_removed += 1
        with contextlib.suppress(OSError):
            report.nbytes_freed += os.stat(store.packs / name).st_size
