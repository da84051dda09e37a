"""Checking the database for `fsck`: that SQLite finds it whole, that rows match their checksums, objects their
hashes, and that what should agree does: index and packs, objects and what they point to, refs and refs.json.

Rows may hold anything that SQLite can: what is not as it was written is reported, and never raises.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thaw.core import objects as core_objects
from thaw.core.errors import Busy, CorruptDatabase, Damaged, NewerFormat, StorageFailed, ThawError
from thaw.store import backup, leases, objects, refs, shallow
from thaw.store.db import database_errors, translate
from thaw.store.links import Links, links
from thaw.store.report import FsckReport
from thaw.store.schema import COUNTS, DATABASE, TABLES, check, checksum
from thaw.store.settings import REBUILD, check_format, number, required, setting
from thaw.store.windows import Windows


@dataclass
class Index:
    """The database's rows, as far as they could be read. A quick check reads `packs` alone."""

    packs: dict[str, int] = field(default_factory=dict)
    blobs: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    objects: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    links: dict[str, Links] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)
    """Objects whose row is damaged."""
    absent: set[str] = field(default_factory=set)
    """Commits that were not fetched, though a stored one comes from them."""


def check_tables(connection: sqlite3.Connection, path: Path, saved: backup.Backup | None, report: FsckReport) -> Index:
    """Adds what is wrong inside the database `path` to `report`, under `thaw.db`; looks as far as `report.deep` says.

    `saved`: refs.json as it was read before this view of the database began. Raises `NewerFormat`, and `Busy` and
    `StorageFailed` where something cannot be read that may be sound.
    """
    index = Index()
    steps: list[Callable[[], None]] = [
        lambda: _format(connection, path),
        lambda: _sqlite(connection, report),
        lambda: _settings(connection),
        lambda: index.absent.update(shallow.read(connection)),
        lambda: _refs(connection, report),
        lambda: _reflog(connection, report),
        lambda: _leases(connection),
        lambda: _packs(connection, index, report),
        lambda: _against_backup(connection, saved, report),
    ]
    if report.deep:
        steps += [
            lambda: load(connection, index, report),
            lambda: _segments(connection, index, report),
        ]
    for step in steps:
        _reported(step, path, report)
    return index


def _reported(step: Callable[[], None], path: Path, report: FsckReport) -> None:
    try:
        with database_errors(path):
            step()
    except (NewerFormat, Busy, StorageFailed):
        raise
    except (ThawError, ValueError, TypeError) as error:
        report.add(DATABASE, str(error))


def _format(connection: sqlite3.Connection, path: Path) -> None:
    check_format(connection, path)


def _sqlite(connection: sqlite3.Connection, report: FsckReport) -> None:
    for (line,) in connection.execute(f"PRAGMA {'integrity' if report.deep else 'quick'}_check(20)"):
        if line != "ok":
            report.add(DATABASE, f"SQLite: {line}")
    found = {row[0] for row in connection.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")}
    if found - {"CREATE TABLE sqlite_sequence(name,seq)"} != set(TABLES):
        report.add(DATABASE, "its tables are not those of this format")


def _settings(connection: sqlite3.Connection) -> None:
    for (key,) in connection.execute("SELECT key FROM settings").fetchall():
        if not isinstance(key, str):
            raise CorruptDatabase(f"settings has a row of {str(key)[:40]!r}, which is no key. {REBUILD}")
        setting(connection, key)
    for key in ("uuid", "head"):
        required(connection, key)
    for key in COUNTS:
        number(connection, key)


def _refs(connection: sqlite3.Connection, report: FsckReport) -> None:
    for ref in refs.read_refs(connection):
        if connection.execute("SELECT kind FROM objects WHERE id = ?", (ref.target,)).fetchone() != ("commit",):
            what = f"{ref.kind} {ref.name!r} names {ref.target}, which is no stored commit"
            report.add(DATABASE, what, (ref.target,))


def _reflog(connection: sqlite3.Connection, report: FsckReport) -> None:
    """Every row, and that each name's chain is whole from its end to its beginning."""
    refs.read_whole_reflog(connection)
    ends: dict[str, int] = {}
    for seq, before, name in connection.execute("SELECT seq, before, name FROM reflog ORDER BY seq"):
        if before != ends.get(name, 0):
            report.add(DATABASE, f"row {seq} of reflog does not follow the one of {name[:80]!r} before it")
        ends[name] = seq
    rows = {(name, end, checksum("reflog_ends", name, end)) for name, end in ends.items()}
    if rows != set(connection.execute("SELECT name, seq, checksum FROM reflog_ends").fetchall()):
        report.add(DATABASE, "reflog_ends does not name the last rows of reflog")


def _leases(connection: sqlite3.Connection) -> None:
    leases.split(connection)


def _each(rows: sqlite3.Cursor, report: FsckReport) -> Iterator[Any]:
    """Rows one by one, and those that cannot be read reported."""
    while True:
        try:
            row = rows.fetchone()
        except sqlite3.OperationalError as error:
            if not isinstance(translate(error, Path(DATABASE)), Damaged):
                raise
            report.add(DATABASE, f"a row cannot be read: {error}")
            return
        if row is None:
            return
        yield row


def _packs(connection: sqlite3.Connection, index: Index, report: FsckReport) -> None:
    for row in _each(connection.execute('SELECT name, nbytes, doomed_ns, "check" FROM packs'), report):
        try:
            pack = objects.pack_row(row)
        except ThawError as error:
            report.add(DATABASE, str(error))
            continue
        if pack.doomed_ns is None:
            index.packs[pack.name] = pack.nbytes
        elif objects.is_used(connection, pack.name):
            report.add(DATABASE, f"pack {pack.name} is doomed, yet rows point into it")


def load(connection: sqlite3.Connection, index: Index, report: FsckReport) -> None:
    """Reads places and objects, each checked. Raises `NewerFormat`."""
    for row in _each(connection.execute('SELECT id, pack, start, nbytes, "check" FROM blobs'), report):
        try:
            place = objects.blob_place(row)
            index.blobs[place.blob] = (place.pack, place.offset, place.nbytes)
        except ThawError as error:
            report.add(DATABASE, str(error), (str(row[0]),))
    columns = 'SELECT id, kind, data, pack, start, state, "check" FROM objects'
    for identifier, kind, data, pack, start, state, said in _each(connection.execute(columns), report):
        try:
            core_objects.decode(objects.stored_bytes(data, str(identifier)[:80]), identifier)
            of = links(data)
            agrees = (kind, state) == (of.kind, of.state) and isinstance(pack, str) and isinstance(start, int)
            if not agrees or said != check("objects", identifier, kind, pack, start, state):
                raise CorruptDatabase(f"the row of {identifier} in objects does not say what its object does")
            index.links[identifier] = of
            index.objects[identifier] = (pack, start, len(data))
        except NewerFormat:
            raise
        except ThawError as error:
            index.bad.add(str(identifier))
            report.add(DATABASE, str(error), (str(identifier),))


def _segments(connection: sqlite3.Connection, index: Index, report: FsckReport) -> None:
    """Each segment that a recorded state uses is found by its window and through a state that has it."""
    rows: set[object] = set()
    last, of_last = None, set[str]()
    made = Windows(lambda identifier: objects.read_bytes(connection, identifier))
    columns = 'SELECT "window", "key", segment, state, "check" FROM segments ORDER BY state'
    for row in _each(connection.execute(columns), report):
        _, _, segment, state, _ = row
        if state != last:
            last, of_last = state, _segments_of(index, [state])
        rows.add(segment)
        try:
            agrees = segment in of_last and row == next(made.rows([(segment, state)]))
        except ThawError:
            agrees = False
        if not agrees:
            report.add(DATABASE, f"the row of {str(segment)[:80]} in segments does not match the objects")
    used = _segments_of(index, [of.state for of in index.links.values() if of.state is not None])
    missing = (used & index.links.keys()) - rows
    if missing:
        what = f"segments lacks {len(missing)} rows, that of {min(missing)} among them"
        report.add(DATABASE, what, tuple(sorted(missing)))


def _segments_of(index: Index, states: Iterable[str]) -> set[str]:
    """All segments that these states use."""
    used = {node for state in states if state in index.links for node in index.links[state].objects}
    nodes = (index.links[node] for node in used if node in index.links)
    return {segment for node in nodes if node.kind == "segments" for segment in node.objects}


def _against_backup(connection: sqlite3.Connection, saved: backup.Backup | None, report: FsckReport) -> None:
    """The database is never older than refs.json was before, and says the same when it is as old."""
    if saved is None:
        return
    now = backup.collect(connection)
    if saved.sequence > now.sequence:
        report.add(DATABASE, f"it has seen {now.sequence} changes of refs, refs.json {saved.sequence}: it lost some")
    elif saved.sequence == now.sequence and backup.encode(now) != backup.encode(saved):
        report.add(DATABASE, "its refs, reflog or settings differ from refs.json of the same age")
