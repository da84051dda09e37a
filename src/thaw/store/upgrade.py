"""Bringing the database of an older thaw up to this format: in place, in one transaction, all of it or nothing.

    1 -> 2   the reflog is a chain that its numbers are part of; every row has a check;
             segments are found by their tokens; objects say what state a commit recorded; more indexes

Rows that carry a checksum of the older format are verified by it first. On a read-only file system a copy in memory is
brought up instead.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from thaw.core.errors import CorruptBlob, CorruptDatabase
from thaw.core.ids import CommitId
from thaw.store import refs, windows
from thaw.store.links import links
from thaw.store.objects import read_bytes
from thaw.store.refs import ReflogEntry
from thaw.store.schema import FORMAT, TABLES, check, checksum
from thaw.store.settings import REBUILD, check_format, set_setting
from thaw.store.windows import Windows

if TYPE_CHECKING:
    from thaw.store.db import Database


def bring_up(database: Database) -> None:
    """Does nothing where another process did it meanwhile. Raises `CorruptDatabase`, `StorageFailed`, `NewerFormat`."""
    with database.write() as connection:
        if check_format(connection, database.path) < FORMAT:
            upgrade(connection)


def upgraded_copy(connection: sqlite3.Connection, path: Path) -> sqlite3.Connection:
    """A copy of an older database in memory, of this format. It refuses to be written to: nothing would be kept."""
    copy = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    try:
        connection.backup(copy)
        if check_format(copy, path) < FORMAT:
            copy.execute("BEGIN")
            upgrade(copy)
            copy.execute("COMMIT")
        copy.execute("PRAGMA query_only=ON")
    except BaseException:
        copy.close()
        raise
    return copy


def upgrade(connection: sqlite3.Connection) -> None:
    """From format 1, in the running transaction."""
    num_refs = _check_refs(connection)
    moves = list(read_moves_1(connection))
    connection.create_function("check_of", -1, check, deterministic=True)
    connection.create_function("state_of", 1, _state_of, deterministic=True)
    homes = connection.execute("SELECT segment, state FROM segments ORDER BY state").fetchall()
    connection.execute("DROP TABLE reflog")
    connection.execute("DROP TABLE segments")
    for table in ("packs", "blobs"):
        connection.execute(f"ALTER TABLE {table} RENAME TO {table}_1")
    connection.execute("ALTER TABLE objects ADD COLUMN state TEXT")
    connection.execute('ALTER TABLE objects ADD COLUMN "check" INTEGER')
    connection.execute("UPDATE objects SET state = state_of(data) WHERE kind = 'commit'")
    connection.execute("UPDATE objects SET \"check\" = check_of('objects', id, kind, pack, start, state)")
    there = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema")}
    for statement in TABLES:
        if statement.split()[2] not in there:
            connection.execute(statement)
    for table, columns in (("packs", "name, nbytes, doomed_ns"), ("blobs", "id, pack, start, nbytes")):
        connection.execute(f"INSERT INTO {table} SELECT {columns}, check_of('{table}', {columns}) FROM {table}_1")
        connection.execute(f"DROP TABLE {table}_1")
    windows.insert(connection, Windows(lambda identifier: read_bytes(connection, identifier)).rows(homes, whole=False))
    set_setting(connection, "refs", str(num_refs))
    set_setting(connection, "moves", "0")
    refs.log_moves(connection, moves)
    set_setting(connection, "format", str(FORMAT))
    connection.execute(f"PRAGMA user_version={FORMAT}")


def _state_of(data: object) -> str | None:
    try:
        return links(data).state if isinstance(data, bytes) else None
    except CorruptBlob:
        return None


def _check_refs(connection: sqlite3.Connection) -> int:
    rows = connection.execute("SELECT name, kind, target, checksum FROM refs").fetchall()
    for row in rows:
        if row[3] != checksum("refs", *row[:3]):
            raise CorruptDatabase(f"the row of {str(row[0])[:80]!r} in refs does not match its checksum. {REBUILD}")
    return len(rows)


def read_moves_1(connection: sqlite3.Connection, *, whole: bool = True) -> Iterator[ReflogEntry]:
    """The reflog of a database of format 1, oldest first. A damaged row raises `CorruptDatabase`; unless `whole`, it is
    left out."""
    query = "SELECT name, kind, old, new, reason, time_ns, moved, checksum FROM reflog ORDER BY seq"
    for row in connection.execute(query):
        if row[7] == checksum("reflog", *row[:7]):
            old, new = (None if value is None else CommitId(value) for value in row[2:4])
            yield ReflogEntry(row[0], old, new, row[4], row[5], row[1], bool(row[6]))
        elif whole:
            raise CorruptDatabase(f"a row of {str(row[0])[:80]!r} in reflog does not match its checksum. {REBUILD}")
