"""The file in which checkpoints are kept: one SQLite database in the repository's folder, `langgraph.db`.

A channel's value is kept once, by the hash of its bytes, however many checkpoints and threads have it. `points` says
which commits a checkpoint's values and writes name; no KV is here. Rows of a namespace are its own. The file is 0600,
and each write is on disk when it returns (WAL, synchronous=FULL).

`writing()` is also the lock of the tags that keep those commits: it is held while one is made or dropped.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec

from thaw.core.ids import digest
from thaw.data.files import storage_errors
from thaw.store.db import BUSY_S, database_errors

FILE = "langgraph.db"
Typed: TypeAlias = tuple[str, bytes]
"""What a LangGraph serialiser makes of a value: its kind, and bytes."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS checkpoints (
    space TEXT NOT NULL, thread TEXT NOT NULL, ns TEXT NOT NULL, id TEXT NOT NULL, parent TEXT, run TEXT,
    kind TEXT NOT NULL, data BLOB NOT NULL, about_kind TEXT NOT NULL, about BLOB NOT NULL,
    PRIMARY KEY (space, thread, ns, id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS checkpoints_by_run ON checkpoints (space, run) WHERE run IS NOT NULL;
CREATE TABLE IF NOT EXISTS channels (
    space TEXT NOT NULL, thread TEXT NOT NULL, ns TEXT NOT NULL, id TEXT NOT NULL, channel TEXT NOT NULL,
    blob TEXT NOT NULL, PRIMARY KEY (space, thread, ns, id, channel)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS channels_by_blob ON channels (blob);
CREATE TABLE IF NOT EXISTS blobs (hash TEXT NOT NULL PRIMARY KEY, kind TEXT NOT NULL, data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS writes (
    space TEXT NOT NULL, thread TEXT NOT NULL, ns TEXT NOT NULL, id TEXT NOT NULL, task TEXT NOT NULL,
    idx INTEGER NOT NULL, channel TEXT NOT NULL, path TEXT NOT NULL, kind TEXT NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (space, thread, ns, id, task, idx)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS points (
    space TEXT NOT NULL, thread TEXT NOT NULL, ns TEXT NOT NULL, id TEXT NOT NULL, point TEXT NOT NULL,
    PRIMARY KEY (space, thread, ns, id, point)
) WITHOUT ROWID;
"""
TABLES = {
    "checkpoints": "parent, run, kind, data, about_kind, about",
    "channels": "channel, blob",
    "writes": "task, idx, channel, path, kind, data",
    "points": "point",
}
"""What rows of a checkpoint say, besides which one it is."""


class CheckpointKey(msgspec.Struct, frozen=True):
    thread: str
    ns: str
    id: str


class CheckpointRow(msgspec.Struct, frozen=True, kw_only=True):
    """`data`: the checkpoint without its channels' values; `about`: its metadata."""

    key: CheckpointKey
    parent: str | None
    data: Typed
    about: Typed
    run: str | None = None


class WriteRow(msgspec.Struct, frozen=True, kw_only=True):
    task: str
    idx: int
    channel: str
    path: str
    value: Typed


class CheckpointFile:
    """Safe from any thread and beside other processes. Raises `StorageFailed`, `Busy`, `CorruptDatabase`."""

    def __init__(self, folder: Path, space: str) -> None:
        """`space`: the namespace, "" for the default one."""
        self._path = path = folder / FILE
        self._space = space
        with storage_errors(path, "write"):
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        self._lock = threading.RLock()
        with database_errors(path):
            self._connection = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.executescript(_SCHEMA)

    def close(self) -> None:
        with self._lock, database_errors(self._path):
            self._connection.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """The only writer, of all processes, for the length of the block; all of it is kept, or nothing."""
        with self._lock, database_errors(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """One view for the length of the block."""
        with self._lock, database_errors(self._path):
            began = not self._connection.in_transaction
            if began:
                self._connection.execute("BEGIN")
            try:
                yield
            finally:
                if began:
                    self._connection.execute("ROLLBACK")

    # -- writing, inside `writing()`

    def put(self, row: CheckpointRow, channels: dict[str, Typed], points: Iterable[str]) -> None:
        at = self._at(row.key)
        self._many("DELETE FROM channels WHERE space = ? AND thread = ? AND ns = ? AND id = ?", [at])
        self._insert("checkpoints", [(*at, row.parent, row.run, *row.data, *row.about)])
        hashes = {name: _hash(value) for name, value in channels.items()}
        self._many("INSERT OR IGNORE INTO blobs VALUES (?, ?, ?)", [(hashes[n], *v) for n, v in channels.items()])
        self._insert("channels", [(*at, name, found) for name, found in hashes.items()])
        self.name_points(row.key, points)

    def put_writes(self, key: CheckpointKey, rows: Iterable[WriteRow], points: Iterable[str]) -> None:
        """What a task wrote before stays; only writes of LangGraph's own (with an index below 0) are replaced."""
        for row in rows:
            how = "IGNORE" if row.idx >= 0 else "REPLACE"
            self._many(
                f"INSERT OR {how} INTO writes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [(*self._at(key), row.task, row.idx, row.channel, row.path, *row.value)],
            )
        self.name_points(key, points)

    def name_points(self, key: CheckpointKey, points: Iterable[str]) -> None:
        self._many("INSERT OR IGNORE INTO points VALUES (?, ?, ?, ?, ?)", [(*self._at(key), one) for one in points])

    def copy(self, source: str, target: str) -> None:
        """All of a thread's rows, as another thread's."""
        for table, columns in TABLES.items():
            self._connection.execute(
                f"INSERT OR REPLACE INTO {table} (space, thread, ns, id, {columns}) "
                f"SELECT space, ?, ns, id, {columns} FROM {table} WHERE space = ? AND thread = ?",
                (target, self._space, source),
            )

    def delete(self, keys: Sequence[CheckpointKey]) -> None:
        """Checkpoints, with their writes; values that no other one has go too."""
        for table in TABLES:
            where = "space = ? AND thread = ? AND ns = ? AND id = ?"
            self._many(f"DELETE FROM {table} WHERE {where}", [self._at(key) for key in keys])
        self._drop_blobs()

    def delete_thread(self, thread: str) -> None:
        """Also writes of checkpoints that were never put."""
        for table in TABLES:
            self._connection.execute(f"DELETE FROM {table} WHERE space = ? AND thread = ?", (self._space, thread))
        self._drop_blobs()

    def _drop_blobs(self) -> None:
        self._connection.execute("DELETE FROM blobs WHERE NOT EXISTS (SELECT 1 FROM channels WHERE blob = hash)")

    # -- reading

    def newest(self, thread: str, ns: str) -> CheckpointKey | None:
        found = self._rows("SELECT max(id) FROM checkpoints WHERE space = ? AND thread = ? AND ns = ?", thread, ns)
        return CheckpointKey(thread, ns, found[0][0]) if found[0][0] is not None else None

    def get(self, key: CheckpointKey) -> CheckpointRow | None:
        found = self._rows(
            "SELECT parent, run, kind, data, about_kind, about FROM checkpoints "
            "WHERE space = ? AND thread = ? AND ns = ? AND id = ?", key.thread, key.ns, key.id,
        )  # fmt: skip
        if not found:
            return None
        parent, run, kind, data, about_kind, about = found[0]
        return CheckpointRow(key=key, parent=parent, run=run, data=(kind, data), about=(about_kind, about))

    def values(self, key: CheckpointKey) -> dict[str, Typed]:
        rows = self._rows(
            "SELECT channel, blobs.kind, blobs.data FROM channels JOIN blobs ON blobs.hash = channels.blob "
            "WHERE space = ? AND thread = ? AND ns = ? AND id = ?", key.thread, key.ns, key.id,
        )  # fmt: skip
        return {channel: (kind, data) for channel, kind, data in rows}

    def channels(self, key: CheckpointKey) -> set[str]:
        """The names of those that have a value."""
        where = "space = ? AND thread = ? AND ns = ? AND id = ?"
        return {
            name for (name,) in self._rows(f"SELECT channel FROM channels WHERE {where}", key.thread, key.ns, key.id)
        }

    def writes(self, key: CheckpointKey) -> list[WriteRow]:
        """In the order in which a live run applies them."""
        rows = self._rows(
            "SELECT task, idx, channel, path, kind, data FROM writes "
            "WHERE space = ? AND thread = ? AND ns = ? AND id = ? ORDER BY path, task, idx", key.thread, key.ns, key.id,
        )  # fmt: skip
        return [
            WriteRow(task=task, idx=idx, channel=channel, path=path, value=(kind, data))
            for task, idx, channel, path, kind, data in rows
        ]

    def keys(
        self, *, thread: str | None = None, ns: str | None = None, id: str | None = None, before: str | None = None
    ) -> list[CheckpointKey]:
        """Of the checkpoints that fit, thread by thread and namespace by namespace, the newest first."""
        asked = {"thread = ?": thread, "ns = ?": ns, "id = ?": id, "id < ?": before}
        given = {term: value for term, value in asked.items() if value is not None}
        where = "".join(f" AND {term}" for term in given)
        rows = self._rows(
            f"SELECT thread, ns, id FROM checkpoints WHERE space = ?{where} ORDER BY thread, ns, id DESC",
            *given.values(),
        )
        return [CheckpointKey(*row) for row in rows]

    def keys_of_runs(self, runs: Iterable[str]) -> list[CheckpointKey]:
        query = "SELECT thread, ns, id FROM checkpoints WHERE space = ? AND run = ?"
        return [CheckpointKey(*row) for run in runs for row in self._rows(query, run)]

    def points(self, thread: str) -> set[str]:
        """Those that the thread's checkpoints name."""
        return {
            one for (one,) in self._rows("SELECT DISTINCT point FROM points WHERE space = ? AND thread = ?", thread)
        }

    def all_points(self) -> set[tuple[str, str]]:
        """(thread, point) of all checkpoints."""
        return set(self._rows("SELECT DISTINCT thread, point FROM points WHERE space = ?"))

    # -- SQLite

    def _at(self, key: CheckpointKey) -> tuple[str, str, str, str]:
        return self._space, key.thread, key.ns, key.id

    def _insert(self, table: str, rows: Sequence[tuple[object, ...]]) -> None:
        if rows:
            marks = ", ".join("?" * len(rows[0]))
            self._many(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", rows)

    def _many(self, query: str, rows: Iterable[tuple[object, ...]]) -> None:
        self._connection.executemany(query, list(rows))

    def _rows(self, query: str, *values: object) -> list[tuple]:  # type: ignore[type-arg]
        with self._lock, database_errors(self._path):
            return self._connection.execute(query, (self._space, *values)).fetchall()


def _hash(value: Typed) -> str:
    return digest(value[0].encode() + b"\0" + value[1])
