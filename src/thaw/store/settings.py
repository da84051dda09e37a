"""The rows of `settings`, and the format that one of them says. A row has a checksum; what is not whole raises."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from thaw.core.errors import CorruptDatabase, NewerFormat
from thaw.store.schema import NAMESPACED, SHALLOW, checksum

REBUILD = "Run `thaw fsck --rebuild` to make it again from the packs."


def setting(connection: sqlite3.Connection, key: str) -> str | None:
    """A row of `settings`, its checksum verified; what the index does not find is looked for in the table itself."""
    row = connection.execute("SELECT value, checksum FROM settings WHERE key = ?", (key,)).fetchone()
    if row is None:
        if connection.execute("SELECT 1 FROM settings NOT INDEXED WHERE key = ?", (key,)).fetchone() is not None:
            raise CorruptDatabase(f"the index of settings does not find the row {key!r}. {REBUILD}")
        return None
    if row[1] != checksum("settings", key, row[0]):
        raise CorruptDatabase(f"the row {key!r} of settings does not match its checksum. {REBUILD}")
    return str(row[0])


def required(connection: sqlite3.Connection, key: str) -> str:
    """A setting that every repository has. Raises `CorruptDatabase` where it is missing."""
    value = setting(connection, key)
    if value is None:
        raise CorruptDatabase(f"the row {key!r} of settings is missing. {REBUILD}")
    return value


def number(connection: sqlite3.Connection, key: str) -> int:
    """A setting that every repository has, and that counts something."""
    value = required(connection, key)
    if not (value.isascii() and value.isdigit() and len(value) < 19):
        raise CorruptDatabase(f"the row {key!r} of settings says {value[:40]!r}, which is no count. {REBUILD}")
    return int(value)


def set_setting(connection: sqlite3.Connection, key: str, value: str) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO settings (key, value, checksum) VALUES (?, ?, ?)",
        (key, value, checksum("settings", key, value)),
    )


def drop_setting(connection: sqlite3.Connection, key: str) -> None:
    connection.execute("DELETE FROM settings WHERE key = ?", (key,))


def check_format(connection: sqlite3.Connection, path: Path) -> int:
    """The format of the database: ours, that of one with namespaces or without all its history, or an older one.

    Raises `NewerFormat` for a database of a later thaw, `CorruptDatabase` for one that is none of ours.
    """
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    said = setting(connection, "format")
    if said is None or str(version) != said or version < 1:
        raise CorruptDatabase(f"{path} does not say its format twice alike ({version}, {said}). {REBUILD}")
    if version > SHALLOW:
        raise NewerFormat(
            f"{path} has format {version}: written by a newer thaw. This one reads up to {SHALLOW}; upgrade thaw."
        )
    return version


def has_namespaces(connection: sqlite3.Connection) -> bool:
    return number(connection, "format") >= NAMESPACED


def admit_namespaces(connection: sqlite3.Connection) -> None:
    """From this transaction on the database has namespaces, and a thaw that knows none refuses to open it."""
    admit(connection, NAMESPACED)


def admit(connection: sqlite3.Connection, version: int) -> None:
    """From this transaction on the database has at least this format."""
    if number(connection, "format") < version:
        set_setting(connection, "format", str(version))
        connection.execute(f"PRAGMA user_version={version}")
