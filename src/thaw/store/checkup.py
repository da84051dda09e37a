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
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from thaw.core.errors import CorruptDatabase, NewerFormat, NotFound, ThawError
from thaw.data.files import storage_errors
from thaw.store import backup, leases, rebuild
from thaw.store.db import Database, check_format
from thaw.store.report import FsckReport, Problem
from thaw.store.scan import PackScan, list_packs, look_at, scan_packs
from thaw.store.schema import DATABASE, FORMAT, PACKS
from thaw.store.tables import Index, check_tables, load
from thaw.store.upgrade import bring_up

__all__ = ["FsckReport", "Problem", "fsck"]


def fsck(path: Path, *, rebuild: bool = False, deep: bool = True) -> FsckReport:
    """Checks the repository in `path`. Damage is reported, not raised.

    `deep` (the default) reads and hashes everything. Without it the database's own structure, refs and reflog are
    checked, and that each pack is there in its length; objects are read only to name what a damaged one belongs to.

    Raises `NotFound` when there is no repository, `NewerFormat`, and with `rebuild` also `Busy` and `StorageFailed`.
    """
    path = Path(path)
    with storage_errors(path, "open"):
        there = set(os.listdir(path)) if path.is_dir() else set()
    if not there & {DATABASE, PACKS, backup.NAME}:
        raise NotFound(f"{path} is not a repository (no {DATABASE}). Make one with `thaw init {path}`.")
    began = time.perf_counter()
    report, scans = _check(path, deep)
    if rebuild:
        report = _repair(path, report, scans, deep)
    report.seconds = time.perf_counter() - began
    return report


def _repair(path: Path, report: FsckReport, scans: dict[str, PackScan], deep: bool) -> FsckReport:
    files = {problem.file for problem in report.problems}
    if DATABASE in files:
        if not deep:
            scans = scan_packs(path / PACKS, list_packs(path / PACKS), deep=False)
        notes = rebuild.rebuild(path, scans)
    elif backup.NAME in files:
        with contextlib.closing(Database(path / DATABASE)) as database:
            backup.write(path, database)
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
    database = Database(path / DATABASE)
    with contextlib.closing(database):
        lease = _lease(database)
        index = _index(path, database, report)
        names = list_packs(path / PACKS)
        if deep:
            scans = scan_packs(path / PACKS, sorted({*names} | index.packs.keys()), deep=True)
        else:
            scans = {name: look_at(path / PACKS, name, nbytes) for name, nbytes in index.packs.items()}
            if report.problems or any(scan.problems for scan in scans.values()):
                _reading(database, report, lambda connection: load(connection, index, report))
        _check_packs(index, scans, names, report)
        _check_backup(path, report)
        _check_links(index, report)
        _reading(database, report, lambda connection: _count(connection, report))
        if lease is not None:
            with contextlib.suppress(ThawError), database.write(durable=False) as connection:
                leases.release(connection, lease)
    report.problems = _with_commits(report.problems, index)
    report.num_packs = len(index.packs)
    report.nbytes = sum(scan.nbytes for scan in scans.values())
    return report, scans


def _lease(database: Database) -> str | None:
    """A reader's lease, so that gc unlinks nothing meanwhile; None when the database cannot be written."""
    try:
        with database.write(durable=False) as connection:
            return leases.take(connection, "read")
    except ThawError:
        return None


def _index(path: Path, database: Database, report: FsckReport) -> Index:
    try:
        with database.read() as connection:
            old = check_format(connection, database.path) < FORMAT
        if old:
            bring_up(database)
    except NewerFormat:
        raise
    except ThawError as error:
        report.add(DATABASE, str(error))
    found = Index()

    def check(connection: sqlite3.Connection) -> None:
        nonlocal found
        found = check_tables(connection, path, report)

    _reading(database, report, check)
    return found


def _reading(database: Database, report: FsckReport, step: Callable[[sqlite3.Connection], None]) -> None:
    """Runs `step` in a view of the database; that it cannot be read is a problem of it."""
    try:
        with database.read() as connection:
            step(connection)
    except NewerFormat:
        raise
    except ThawError as error:
        if str(error) not in {problem.what for problem in report.problems}:
            report.add(DATABASE, str(error))


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


def _check_backup(path: Path, report: FsckReport) -> None:
    try:
        if backup.read(path) is None:
            report.add(backup.NAME, f"{backup.NAME} is missing; `thaw fsck --rebuild` writes it again")
    except CorruptDatabase as error:
        report.add(backup.NAME, str(error))


def _check_links(index: Index, report: FsckReport) -> None:
    """Everything that an object points to is stored."""
    for identifier, of in index.links.items():
        missing = [o for o in of.objects if o not in index.links and o not in index.bad]
        missing += [blob for blob in of.blobs if blob not in index.blobs]
        if missing:
            report.add(DATABASE, f"{of.kind} {identifier} needs {missing[0]}, which is not stored", tuple(missing))


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
