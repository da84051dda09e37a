"""What a damaged database still says: only rows that match their checksum or hash."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from thaw.core.errors import ThawError
from thaw.core.ids import digest
from thaw.store import backup, refs
from thaw.store.db import connect, setting
from thaw.store.refs import Ref, ReflogEntry


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
    if not path.exists():
        return found
    with contextlib.suppress(sqlite3.Error, ValueError), contextlib.closing(connect(path)) as connection:
        whole = [_try(step) for step in (lambda: _settings(connection, found), lambda: _refs(connection, found))]
        _try(lambda: _reflog(connection, found))
        _try(lambda: _objects(connection, found))
        if all(whole):
            found.sequence = int(found.settings.get("sequence", "-1"))
    return found


def _try(step: Callable[[], None]) -> bool:
    try:
        step()
    except (sqlite3.Error, ThawError, ValueError, TypeError, OverflowError):
        return False
    return True


def _settings(connection: sqlite3.Connection, found: Salvage) -> None:
    for (key,) in connection.execute("SELECT key FROM settings").fetchall():
        value = setting(connection, key)
        if value is not None:
            found.settings[key] = value


def _refs(connection: sqlite3.Connection, found: Salvage) -> None:
    found.refs = refs.read_refs(connection)


def _reflog(connection: sqlite3.Connection, found: Salvage) -> None:
    for (name,) in connection.execute("SELECT DISTINCT name FROM reflog").fetchall():
        with contextlib.suppress(ThawError):
            found.reflog += refs.read_reflog(connection, name, kept=True)
    found.reflog.sort(key=lambda entry: -entry.time_ns)


def _objects(connection: sqlite3.Connection, found: Salvage) -> None:
    for identifier, data in _rows(connection):
        if isinstance(data, bytes) and digest(data) == identifier:
            found.objects[identifier] = data


def _rows(connection: sqlite3.Connection) -> Iterator[tuple[str, bytes]]:
    yield from connection.execute("SELECT id, data FROM objects")
