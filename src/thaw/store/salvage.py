"""What a damaged database still says: only rows that match their checksum or hash, whatever the others hold."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from thaw.core.errors import Busy, StorageFailed, ThawError
from thaw.core.ids import digest
from thaw.store import backup, leases
from thaw.store.db import connect, translate
from thaw.store.leases import Lease
from thaw.store.objects import pack_row
from thaw.store.refs import Ref, ReflogEntry
from thaw.store.schema import checksum
from thaw.store.upgrade import read_moves_1


@dataclass
class Salvage:
    """Rows that can be trusted. `sequence` is -1 unless it and all refs could be read."""

    sequence: int = -1
    settings: dict[str, str] = field(default_factory=dict)
    refs: list[Ref] = field(default_factory=list)
    reflog: list[ReflogEntry] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    packs: set[str] = field(default_factory=set)
    leases: list[Lease] = field(default_factory=list)
    """Those of processes that run."""

    def held(self) -> set[str]:
        """Packs that somebody is writing: nothing needs them yet, and they may go again."""
        return {name for lease in self.leases if lease.kind == "write" for name in lease.packs} - self.packs

    def as_backup(self) -> backup.Backup:
        user = {key: value for key, value in self.settings.items() if key.startswith("user.")}
        return backup.Backup(
            digest="", sequence=max(self.sequence, 0), uuid=self.settings.get("uuid", ""),
            head=self.settings.get("head", ""), refs=tuple(self.refs), reflog=tuple(self.reflog), settings=user,
        )  # fmt: skip


def salvage(path: Path) -> Salvage:
    """What can be read; a database that cannot gives an empty `Salvage`. Raises `Busy` and `StorageFailed` where that
    is not because of damage."""
    found = Salvage()
    if path.is_file():
        _try(path, lambda: _read(path, found))
    return found


def _read(path: Path, found: Salvage) -> None:
    with contextlib.closing(connect(path)) as connection:
        connection.text_factory = _text
        _try(path, lambda: _settings(connection, found))
        whole = _try(path, lambda: _refs(connection, found))
        for step in (_reflog, _objects, _packs, _leases):
            _try(path, partial(step, connection, found))
    sequence = found.settings.get("sequence", "")
    if whole and sequence.isascii() and sequence.isdigit() and len(sequence) < 19:
        found.sequence = int(sequence)


def _text(data: bytes) -> str | bytes:
    """Text that is none stays bytes, and fails its checksum."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _try(path: Path, step: Callable[[], bool | None]) -> bool:
    """Whether all rows of a table could be read."""
    try:
        return step() is not False
    except sqlite3.Error as error:
        failed = translate(error, path)
        if isinstance(failed, Busy | StorageFailed):
            raise failed from error
    except (Busy, StorageFailed):
        raise
    except (ThawError, ValueError, TypeError, OverflowError):
        pass
    return False


def _settings(connection: sqlite3.Connection, found: Salvage) -> None:
    for key, value, said in connection.execute("SELECT key, value, checksum FROM settings").fetchall():
        if said == checksum("settings", key, value) and isinstance(key, str) and isinstance(value, str):
            found.settings[key] = value


def _refs(connection: sqlite3.Connection, found: Salvage) -> bool:
    rows = connection.execute("SELECT name, kind, target, checksum FROM refs NOT INDEXED").fetchall()
    for *row, said in rows:
        if said == checksum("refs", *row):
            found.refs += _typed(Ref, *row)
    counted = found.settings.get("refs", len(rows) if found.settings.get("format") == "1" else -1)
    return len(found.refs) == len(rows) == int(counted)


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


def _packs(connection: sqlite3.Connection, found: Salvage) -> None:
    for row in connection.execute('SELECT name, nbytes, doomed_ns, "check" FROM packs NOT INDEXED'):
        with contextlib.suppress(ThawError):
            found.packs.add(pack_row(row).name)


def _leases(connection: sqlite3.Connection, found: Salvage) -> None:
    now = time.time_ns()
    for row in connection.execute("SELECT * FROM leases NOT INDEXED"):
        with contextlib.suppress(ThawError):
            lease = leases.from_row(row)
            found.leases += _typed(Lease, *msgspec.structs.astuple(lease)) if leases.is_live(lease, now) else []
