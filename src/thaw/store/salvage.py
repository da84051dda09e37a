"""What a damaged database still says: only rows that match their checksum or hash, whatever the others hold."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from thaw.core.errors import ThawError
from thaw.core.ids import digest
from thaw.store import backup
from thaw.store.db import connect
from thaw.store.refs import Ref, ReflogEntry
from thaw.store.schema import checksum
from thaw.store.upgrade import read_moves_1


@dataclass
class Salvage:
    """Rows that can be trusted. `sequence` is -1 unless all refs and settings could be read."""

    sequence: int = -1
    settings: dict[str, str] = field(default_factory=dict)
    refs: list[Ref] = field(default_factory=list)
    reflog: list[ReflogEntry] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)

    def as_backup(self) -> backup.Backup:
        user = {key: value for key, value in self.settings.items() if key.startswith("user.")}
        return backup.Backup(
            digest="", sequence=max(self.sequence, 0), uuid=self.settings.get("uuid", ""),
            head=self.settings.get("head", ""), refs=tuple(self.refs), reflog=tuple(self.reflog), settings=user,
        )  # fmt: skip


def salvage(path: Path) -> Salvage:
    """Never raises: a database that cannot be read gives an empty `Salvage`."""
    found = Salvage()
    if not path.is_file():
        return found
    with contextlib.suppress(sqlite3.Error, ThawError, ValueError), contextlib.closing(connect(path)) as connection:
        connection.text_factory = _text
        whole = [_try(step) for step in (lambda: _settings(connection, found), lambda: _refs(connection, found))]
        _try(lambda: _reflog(connection, found))
        _try(lambda: _objects(connection, found))
        sequence = found.settings.get("sequence", "")
        if all(whole) and sequence.isascii() and sequence.isdigit() and len(sequence) < 19:
            found.sequence = int(sequence)
    return found


def _text(data: bytes) -> str | bytes:
    """Text that is none stays bytes, and fails its checksum."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _try(step: Callable[[], bool | None]) -> bool:
    """Whether all rows of a table could be read."""
    try:
        return step() is not False
    except (sqlite3.Error, ThawError, ValueError, TypeError, OverflowError):
        return False


def _settings(connection: sqlite3.Connection, found: Salvage) -> bool:
    rows = connection.execute("SELECT key, value, checksum FROM settings").fetchall()
    for key, value, said in rows:
        if said == checksum("settings", key, value) and isinstance(key, str) and isinstance(value, str):
            found.settings[key] = value
    return len(found.settings) == len(rows)


def _refs(connection: sqlite3.Connection, found: Salvage) -> bool:
    rows = connection.execute("SELECT name, kind, target, checksum FROM refs NOT INDEXED").fetchall()
    for *row, said in rows:
        if said == checksum("refs", *row):
            found.refs += _typed(Ref, *row)
    return len(found.refs) == len(rows) == int(found.settings.get("refs", len(rows)))


def _typed(kind: type[Any], *values: object) -> list[Any]:
    """A value of the fields' types, or nothing."""
    try:
        return [msgspec.convert(msgspec.to_builtins(kind(*values)), kind)]
    except (msgspec.ValidationError, TypeError):
        return []


def _reflog(connection: sqlite3.Connection, found: Salvage) -> None:
    try:
        moves = list(_moves(connection))
    except sqlite3.OperationalError:
        moves = list(read_moves_1(connection, whole=False))
    for move in moves:
        found.reflog += _typed(
            ReflogEntry, move.name, move.old, move.new, move.reason, move.time_ns, move.kind, move.moved
        )
    found.reflog.sort(key=lambda entry: -entry.time_ns)


def _moves(connection: sqlite3.Connection) -> Iterator[ReflogEntry]:
    query = "SELECT seq, before, name, kind, old, new, reason, time_ns, moved, checksum FROM reflog ORDER BY seq"
    for row in connection.execute(query):
        if row[9] == checksum("reflog", *row[:9]):
            yield ReflogEntry(row[2], row[4], row[5], row[6], row[7], row[3], bool(row[8]))


def _objects(connection: sqlite3.Connection, found: Salvage) -> None:
    for identifier, data in connection.execute("SELECT id, data FROM objects NOT INDEXED"):
        if isinstance(data, bytes) and digest(data) == identifier:
            found.objects[identifier] = data
