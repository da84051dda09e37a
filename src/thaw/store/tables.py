"""Checking the database for `fsck`: that SQLite finds it whole, that rows match their checksums, objects their
hashes, and that what should agree does: index and packs, objects and what they point to, refs and refs.json."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from thaw.core import objects as core_objects
from thaw.core.errors import NewerFormat, ThawError
from thaw.store import backup, refs
from thaw.store.db import check_format, setting, translate
from thaw.store.links import Links, links
from thaw.store.report import FsckReport
from thaw.store.schema import DATABASE, TABLES


@dataclass
class Index:
    """The database's rows, as far as they could be read."""

    packs: dict[str, int] = field(default_factory=dict)
    blobs: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    objects: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    links: dict[str, Links] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)
    """Objects whose row is damaged."""


def check_tables(connection: sqlite3.Connection, folder: Path, report: FsckReport) -> Index:
    """Adds what is wrong inside the database to `report`, under the file `thaw.db`."""
    index = Index()
    steps: list[Callable[[], None]] = [
        lambda: check_format(connection, folder / DATABASE),
        lambda: _sqlite(connection, report),
        lambda: _rows(connection),
        lambda: _load(connection, index, report),
        lambda: _segments(connection, index, report),
        lambda: _refs(connection, index, report),
        lambda: _against_backup(connection, folder, report),
    ]
    for step in steps:
        try:
            step()
        except sqlite3.Error as error:
            report.add(DATABASE, str(translate(error, folder / DATABASE)))
        except NewerFormat:
            raise
        except (ThawError, ValueError, TypeError, OverflowError) as error:
            report.add(DATABASE, str(error))
    return index


def _sqlite(connection: sqlite3.Connection, report: FsckReport) -> None:
    for (line,) in connection.execute("PRAGMA integrity_check(20)"):
        if line != "ok":
            report.add(DATABASE, f"SQLite: {line}")
    found = {row[0] for row in connection.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")}
    if found - {"CREATE TABLE sqlite_sequence(name,seq)"} != set(TABLES):
        report.add(DATABASE, "its tables are not those of this format")


def _rows(connection: sqlite3.Connection) -> None:
    """Every checksum of settings, refs and reflog."""
    for (key,) in connection.execute("SELECT key FROM settings").fetchall():
        setting(connection, key)
    for key in ("uuid", "head", "sequence"):
        if setting(connection, key) is None:
            raise ValueError(f"the row {key!r} of settings is missing")
    refs.read_refs(connection)
    refs.read_whole_reflog(connection)


def _load(connection: sqlite3.Connection, index: Index, report: FsckReport) -> None:
    for name, nbytes, doomed in connection.execute("SELECT name, nbytes, doomed_ns FROM packs"):
        if doomed is None:
            index.packs[name] = nbytes
    for blob, pack, start, nbytes in connection.execute("SELECT id, pack, start, nbytes FROM blobs"):
        index.blobs[blob] = (pack, start, nbytes)
    for identifier, kind, data, pack, start in connection.execute("SELECT id, kind, data, pack, start FROM objects"):
        try:
            core_objects.decode(bytes(data), identifier)
            of = links(bytes(data))
            if of.kind != kind:
                raise ValueError(f"object {identifier} is a {of.kind}, but its row says {kind}")
            index.links[identifier] = of
            index.objects[identifier] = (pack, start, len(data))
        except (ThawError, ValueError, TypeError) as error:
            index.bad.add(identifier)
            report.add(DATABASE, str(error), (str(identifier),))


def _segments(connection: sqlite3.Connection, index: Index, report: FsckReport) -> None:
    """Each segment that a state uses is found by its window and through a state that has it, and no others are."""
    used: set[str] = set()
    of_state: dict[str, set[str]] = {}
    for identifier, of in index.links.items():
        if of.kind == "state":
            nodes = [index.links[node] for node in of.objects if node in index.links]
            of_state[identifier] = {segment for node in nodes if node.kind == "segments" for segment in node.objects}
            used |= of_state[identifier]
    rows = connection.execute('SELECT segment, "window", state FROM segments').fetchall()
    for segment, window, state in rows:
        of_segment = index.links.get(segment)
        if of_segment is None or of_segment.window != window or segment not in of_state.get(state, ()):
            report.add(DATABASE, f"the row of {segment} in segments does not match the objects")
    missing = (used & index.links.keys()) - {row[0] for row in rows}
    if missing:
        what = f"segments lacks {len(missing)} rows, that of {min(missing)} among them"
        report.add(DATABASE, what, tuple(sorted(missing)))


def _refs(connection: sqlite3.Connection, index: Index, report: FsckReport) -> None:
    for ref in refs.read_refs(connection):
        of = index.links.get(ref.target)
        if of is None or of.kind != "commit":
            what = f"{ref.kind} {ref.name!r} names {ref.target}, which is no stored commit"
            report.add(DATABASE, what, (ref.target,))


def _against_backup(connection: sqlite3.Connection, folder: Path, report: FsckReport) -> None:
    """The database is never older than refs.json, and says the same when it is as old."""
    try:
        saved = backup.read(folder)
    except ThawError:
        return
    now = backup.collect(connection)
    if saved is None or saved.sequence < now.sequence:
        return
    if saved.sequence > now.sequence:
        report.add(DATABASE, f"it has seen {now.sequence} changes of refs, refs.json {saved.sequence}: it lost some")
    elif backup.encode(now) != backup.encode(saved):
        report.add(DATABASE, "its refs, reflog or settings differ from refs.json of the same age")
