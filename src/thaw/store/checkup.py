"""fsck: looks at every byte of a repository and names what is damaged: which file, which blob, which commits.

Works when the database is lost or unreadable. With `rebuild` a database that is not whole is made again from the packs
and refs.json (see `thaw.store.rebuild`), and a refs.json that is not is written again from the database.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from thaw.core.errors import CorruptDatabase, Damaged, NewerFormat, NotFound, StorageFailed, ThawError
from thaw.data.files import storage_errors
from thaw.store import backup, leases, rebuild, refslog, reserve
from thaw.store.db import Database
from thaw.store.locks import locked
from thaw.store.report import FsckReport, Problem
from thaw.store.saving import Saver
from thaw.store.scan import PackScan, list_packs, look_at, scan_packs
from thaw.store.schema import DATABASE, FORMAT, PACKS
from thaw.store.settings import check_format
from thaw.store.tables import Index, check_tables, load
from thaw.store.upgrade import bring_up

__all__ = ["FsckReport", "Problem", "fsck"]


def fsck(path: Path, *, rebuild: bool = False, deep: bool = True) -> FsckReport:
    """Checks the repository in `path`. Damage is reported, not raised.

    `deep` (the default) reads and hashes everything. Without it the database's own structure, refs and reflog are
    checked, and that each pack is there in its length; objects are read only to name what a damaged one belongs to.

    Others may go on: it sees the repository as it was at one moment. Raises `NotFound` when there is no repository,
    `NewerFormat`, and `Busy` and `StorageFailed` where it cannot look or repair: that is no damage.
    """
    path = Path(path)
    with storage_errors(path, "open"):
        there = set(os.listdir(path)) if path.is_dir() else set()
    if not there & {DATABASE, PACKS, backup.NAME}:
        raise NotFound(f"{path} is not a repository (no {DATABASE}). Make one with `thaw init {path}`.")
    began = time.perf_counter()
    report, scans = reserve.with_room(path, lambda: _check(path, deep), reserve.OPENING)
    if rebuild:
        report = _repair(path, report, scans, deep)
    report.seconds = time.perf_counter() - began
    return report


def _repair(path: Path, report: FsckReport, scans: dict[str, PackScan], deep: bool) -> FsckReport:
    files = {problem.file for problem in report.problems}
    if DATABASE in files:
        notes = rebuild.rebuild(path, scans if deep else {}, deep=deep)
    elif files & {backup.NAME, refslog.NAME}:
        with contextlib.closing(Database(path / DATABASE)) as database:
            Saver(path, database).write()
        notes = [f"{backup.NAME} was written again from the database"]
    else:
        return report
    after, _ = _check(path, deep)
    left = {(problem.file, problem.what) for problem in after.problems}
    after.repaired = [problem for problem in report.problems if (problem.file, problem.what) not in left]
    after.rebuilt = DATABASE in files
    after.notes = notes + after.notes
    return after


def _check(path: Path, deep: bool) -> tuple[FsckReport, dict[str, PackScan]]:
    report = FsckReport(deep=deep)
    with contextlib.closing(Database(path / DATABASE)) as database, _lease(database):
        saved = _check_backup(path, report)  # before the database is looked at, which is never older
        _bring_up(database, report)
        index, scans = _view(path, database, saved, report)
        names = list_packs(path / PACKS)
        if deep:
            scans = scan_packs(path / PACKS, sorted({*names} | index.packs.keys()), deep=True)
        _check_packs(index, scans, names, report)
        _check_links(index, report)
        _note_shallow(index, report)
    report.problems = _with_commits(report.problems, index)
    report.num_packs = len(index.packs)
    report.nbytes = sum(scan.nbytes for scan in scans.values())
    return report, scans


@contextlib.contextmanager
def _lease(database: Database) -> Iterator[None]:
    """A reader's lease, so that gc unlinks nothing meanwhile; none where the database cannot be written."""
    lease = None
    with contextlib.suppress(Damaged, StorageFailed), database.write(durable=False) as connection:
        lease = leases.take(connection, "read")
    try:
        yield
    finally:
        if lease is not None:
            with contextlib.suppress(ThawError), database.write(durable=False) as connection:
                leases.release(connection, lease)


def _bring_up(database: Database, report: FsckReport) -> None:
    try:
        with database.read() as connection:
            old = check_format(connection, database.path) < FORMAT
        if old:
            bring_up(database)
    except NewerFormat:
        raise
    except Damaged as error:
        report.add(DATABASE, str(error))


def _view(
    path: Path, database: Database, saved: backup.Backup | None, report: FsckReport
) -> tuple[Index, dict[str, PackScan]]:
    """The rows of one view of the database; without `deep` also how long their packs are, and objects only where
    something is wrong."""
    index, scans = Index(), dict[str, PackScan]()
    try:
        with database.read() as connection:
            index = check_tables(connection, database.path, saved, report)
            if not report.deep:
                scans = {name: look_at(path / PACKS, name, nbytes) for name, nbytes in index.packs.items()}
                if report.problems or any(scan.problems for scan in scans.values()):
                    load(connection, index, report)
            _count(connection, report)
    except NewerFormat:
        raise
    except Damaged as error:
        if str(error) not in {problem.what for problem in report.problems}:
            report.add(DATABASE, str(error))
    return index, scans


def _count(connection: sqlite3.Connection, report: FsckReport) -> None:
    report.num_blobs = connection.execute("SELECT count(*) FROM blobs").fetchone()[0]
    report.num_objects = connection.execute("SELECT count(*) FROM objects").fetchone()[0]
    report.num_commits = connection.execute("SELECT count(*) FROM objects WHERE kind = 'commit'").fetchone()[0]


def _check_packs(index: Index, scans: dict[str, PackScan], names: list[str], report: FsckReport) -> None:
    rows: dict[str, dict[tuple[str, int, int], bool]] = defaultdict(dict)
    for is_object, table in ((False, index.blobs), (True, index.objects)):
        for identifier, (pack, start, nbytes) in table.items():
            rows[pack][identifier, start, nbytes] = is_object
    for pack, wanted in rows.items():
        if pack not in index.packs:
            report.add(DATABASE, f"rows point into pack {pack}, which packs does not list", _ids(wanted))
    there = set(names)
    for pack, nbytes in index.packs.items():
        _check_pack(scans[pack], nbytes, rows[pack], pack in there, report)
    known = index.packs.keys()
    for name in names:
        if name not in known and index.packs:
            report.notes.append(f"{PACKS}/{name} is not indexed: a commit is running, or gc will reclaim it")


def _check_pack(
    scan: PackScan, nbytes: int, rows: dict[tuple[str, int, int], bool], there: bool, report: FsckReport
) -> None:
    file = f"{PACKS}/{scan.name}"
    if not there:
        report.add(file, f"pack {scan.name} is missing", _ids(rows))
        return
    bad = tuple(sorted({entry.id for entry in scan.bad if entry.id}))
    for what in scan.problems:
        named = tuple(i for i in bad if i in what) or (bad if scan.header else _ids(rows))
        report.add(file, what, named)
    if scan.header is None:
        return
    if scan.header.nbytes != nbytes:
        report.add(DATABASE, f"packs says {nbytes} bytes for {scan.name}; its header describes {scan.header.nbytes}")
    entries = {(e.id, e.offset, e.nbytes): e.is_object for e in scan.header.entries if not e.is_pad}
    wrong = [row for row, is_object in rows.items() if entries.get(row) is not is_object]
    if wrong:
        report.add(DATABASE, f"rows do not match the header of pack {scan.name}", _ids(wrong))


def _ids(rows: Iterable[tuple[str, int, int]]) -> tuple[str, ...]:
    return tuple(sorted({row[0] for row in rows}))


def _check_backup(path: Path, report: FsckReport) -> backup.Backup | None:
    """refs.json with its log; None where it is missing or damaged, which is reported."""
    try:
        saved, whole = refslog.read(path)
        if not whole:  # or somebody was writing it
            saved, whole = _read_alone(path)
    except CorruptDatabase as error:
        report.add(backup.NAME, str(error))
        return None
    if saved is None:
        report.add(backup.NAME, f"{backup.NAME} is missing; `thaw fsck --rebuild` writes it again")
    elif not whole:
        what = f"{refslog.NAME} ends in what does not verify: a write that was cut off, or a change from outside"
        report.add(refslog.NAME, f"{what}; `thaw fsck --rebuild` writes {backup.NAME} again")
    return saved


def _read_alone(path: Path) -> tuple[backup.Backup | None, bool]:
    """While nobody saves, where this user may hold the lock."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(StorageFailed):
            stack.enter_context(locked(path / "refs.lock"))
        return refslog.read(path)


def _check_links(index: Index, report: FsckReport) -> None:
    """Everything that an object points to is stored."""
    for identifier, of in index.links.items():
        missing = [o for o in of.without(index.absent) if o not in index.links and o not in index.bad]
        missing += [blob for blob in of.blobs if blob not in index.blobs]
        if missing:
            report.add(DATABASE, f"{of.kind} {identifier} needs {missing[0]}, which is not stored", tuple(missing))


def _note_shallow(index: Index, report: FsckReport) -> None:
    """A commit that was not fetched is no loss; one that is noted as not here and is, is wrong."""
    here = sorted(index.absent & index.links.keys())
    if here:
        report.add(DATABASE, f"{here[0]} is stored, and noted as not fetched", tuple(here))
    if index.absent:
        report.notes.append(
            f"the repository is shallow: parents of its commits that were not fetched: {len(index.absent)}; "
            "`thaw fetch --unshallow` brings them"
        )


def _with_commits(problems: list[Problem], index: Index) -> list[Problem]:
    """Each problem with the commits whose own state needs what is damaged (not those that only descend from it)."""
    users: dict[str, list[str]] = defaultdict(list)
    for identifier, of in index.links.items():
        linked = of.objects[:1] if of.kind == "commit" else of.objects
        for one in (*linked, *of.blobs):
            users[one].append(identifier)
    return [replace(problem, commits=_users(problem.ids, users, index)) for problem in problems]


def _users(ids: tuple[str, ...], users: dict[str, list[str]], index: Index) -> tuple[str, ...]:
    seen = set(ids)
    pending = list(ids)
    while pending:
        for user in users.get(pending.pop(), ()):
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return tuple(sorted(i for i in seen if i in index.links and index.links[i].kind == "commit"))
