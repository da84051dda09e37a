"""The ledger: which response is which commit, and what its reply said; conversations; in one SQLite file.

A response is known by its id before there is a commit, so the two are joined here. A row is written when a stored
response begins, and again after its commit and before its last event: what was acknowledged is found again after
`kill -9`. A row that a dead gateway left under way reads as `incomplete`. Rows of a namespace are its own.

No KV, and no key; the file is 0600 in the repository's folder.
"""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from thaw.core.errors import CorruptDatabase
from thaw.data.files import storage_errors
from thaw.store.db import SIDE_FILES, database_errors

FILE = "gateway.db"
UNDER_WAY = ("queued", "in_progress")
GONE = "deleted"
"""The kind of a row that was deleted, and whose KV may be there still."""
_BY_ID = "WHERE namespace = ? AND kind = ? AND id = ?"
_SIZE = "nbytes + length(record)"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
    namespace TEXT NOT NULL, kind TEXT NOT NULL, id TEXT NOT NULL, status TEXT NOT NULL, point TEXT, parent TEXT,
    nbytes INTEGER NOT NULL, created REAL NOT NULL, record BLOB NOT NULL, PRIMARY KEY (namespace, kind, id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS rows_by_age ON rows (created);
CREATE INDEX IF NOT EXISTS rows_by_status ON rows (status) WHERE status IN ('queued', 'in_progress', 'parked');
"""


@contextlib.contextmanager
def _ledger_errors(path: Path) -> Iterator[None]:
    """As `database_errors`, but a rebuild of the repository does not make this file again."""
    try:
        with database_errors(path):
            yield
    except CorruptDatabase as error:
        raise CorruptDatabase(
            f"{path} is damaged ({error.__cause__}). It says which response is which commit, and `thaw fsck` does not "
            f"make it again. Move it away, with {' and '.join(FILE + more for more in SIDE_FILES[:2])} where they are, "
            "and start the gateway again: responses and conversations that it knew are not found then, but commits, "
            "branches and what chats share are in the repository still."
        ) from error.__cause__


class LedgerRow(msgspec.Struct, kw_only=True):
    """`point`: the commit, once there is one, made after `created`; `parent`: where it began. `record`: what a dialect
    keeps of it."""

    kind: str
    id: str
    namespace: str
    status: str
    record: dict[str, Any]
    point: str | None = None
    parent: str | None = None
    nbytes: int = 0
    created: float = msgspec.field(default_factory=time.time)


class PendingRow:
    """A row that is to be written. `over`: it is, or `error` says why not."""

    def __init__(self, row: LedgerRow) -> None:
        self.row = row
        self.record = msgspec.json.encode(row.record)
        self.over = False
        self.error: BaseException | None = None


_COLUMNS = "kind, id, namespace, status, record, point, parent, nbytes, created"


class Ledger:
    """Safe from any thread. Each write is on disk when it returns, but for `count`."""

    def __init__(self, folder: Path) -> None:
        """Raises `StorageFailed` and others."""
        self._path = path = folder / FILE
        with storage_errors(path, "write"):
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        self._lock = threading.Lock()
        self._joining = threading.Lock()
        self._waiting: list[PendingRow] = []
        self._stored: Counter[str] = Counter()
        with _ledger_errors(path):
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.executescript(_SCHEMA)
            self._count()

    def put(self, row: LedgerRow) -> None:
        """Rows that come at once are on disk together, with one sync: whoever is first to write takes those that wait.

        Raises `StorageFailed` and others: then none of them is written."""
        mine = PendingRow(row)
        with self._joining:
            self._waiting.append(mine)
        with self._lock:
            if not mine.over:
                self._put_waiting()
        if mine.error is not None:
            raise mine.error

    def _put_waiting(self) -> None:
        with self._joining:
            together, self._waiting = self._waiting, []
        failed: BaseException | None = None
        try:
            with _ledger_errors(self._path), self._transaction():
                for one in together:
                    self._put(one)
        except BaseException as error:  # noqa: BLE001 - raised by each of them
            failed = error
        for one in together:
            one.over, one.error = True, failed

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        stored = self._stored.copy()
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            self._stored = stored
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def count(self, row: LedgerRow) -> None:
        """As `put`, for a row that nobody is told of: it outlives the process, and may be lost with the power."""
        with self._lock, _ledger_errors(self._path):
            self._connection.execute("PRAGMA synchronous=NORMAL")
            try:
                self._put(PendingRow(row))
            finally:
                self._connection.execute("PRAGMA synchronous=FULL")

    def change(self, namespace: str, kind: str, id: str, change: Callable[[LedgerRow], object]) -> LedgerRow | None:
        """Change a row as it stands now, with nobody between; None, and nothing is done, where there is none."""
        with self._lock, _ledger_errors(self._path):
            found = self._rows(_BY_ID, (namespace, kind, id))
            for row in found:
                change(row)
                self._put(PendingRow(row))
        return found[0] if found else None

    def _put(self, pending: PendingRow) -> None:
        row, record = pending.row, pending.record
        before = self._size(row.namespace, row.kind, row.id)
        self._connection.execute(
            f"INSERT OR REPLACE INTO rows ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (row.kind, row.id, row.namespace, row.status, record, row.point, row.parent, row.nbytes, row.created),
        )
        self._stored[row.namespace] += row.nbytes + len(record) - before

    def get(self, namespace: str, kind: str, id: str) -> LedgerRow | None:
        with self._lock, _ledger_errors(self._path):
            found = self._rows(_BY_ID, (namespace, kind, id))
        return found[0] if found else None

    def delete(self, namespace: str, kind: str, id: str) -> bool:
        """It is not found any more. What it counted, its KV, counts until gc can have removed that (`expire`)."""
        with self._lock, _ledger_errors(self._path):
            before = self._size(namespace, kind, id) + self._size(namespace, GONE, id)
            where, values = _BY_ID, (namespace, kind, id)
            gone = self._connection.execute(f"DELETE FROM rows {where} AND nbytes = 0", values)
            left = self._connection.execute(
                f"UPDATE OR REPLACE rows SET kind = '{GONE}', status = 'completed', record = x'7b7d' {where}", values
            )
            self._stored[namespace] += self._size(namespace, GONE, id) - before
        return bool(gone.rowcount or left.rowcount)

    def _size(self, namespace: str, kind: str, id: str) -> int:
        found = self._connection.execute(f"SELECT {_SIZE} FROM rows {_BY_ID}", (namespace, kind, id)).fetchone()
        return 0 if found is None else int(found[0])

    def _count(self) -> None:
        rows = self._connection.execute(f"SELECT namespace, sum({_SIZE}) FROM rows GROUP BY namespace")
        self._stored = Counter(dict(rows.fetchall()))

    def with_status(self, *statuses: str) -> list[LedgerRow]:
        marks = ", ".join("?" * len(statuses))
        with self._lock, _ledger_errors(self._path):
            return self._rows(f"WHERE status IN ({marks}) ORDER BY created", statuses)

    def interrupt(self) -> int:
        """Rows that a gateway which is gone left under way; how many."""
        with self._lock, _ledger_errors(self._path):
            done = self._connection.execute("UPDATE rows SET status = 'incomplete' WHERE status IN (?, ?)", UNDER_WAY)
        return done.rowcount

    def nbytes(self, namespace: str) -> int:
        """Of the KV and the records of a namespace's rows."""
        return self._stored[namespace]

    def expire(
        self,
        *,
        before: float,
        max_nbytes: int,
        held: Collection[str] = (),
        sooner: Mapping[str, float] = MappingProxyType({}),
    ) -> tuple[int, float | None]:
        """Drop rows from before a time and, oldest first, those beyond `max_nbytes` of KV in all; never one under way,
        nor one whose point is `held`. `sooner`: later times for some namespaces, whose rows are then deleted ones. A
        deleted row goes when all that is older has gone.

        Returns how many were deleted or went, and the time of the oldest that is left, if any is."""
        kept, cut = 0, before
        with self._lock, _ledger_errors(self._path):
            newest_first = self._connection.execute("SELECT created, nbytes FROM rows ORDER BY created DESC")
            for created, nbytes in newest_first:
                kept += nbytes
                if kept > max_nbytes:
                    cut = max(cut, created)
                    break
            marks = ", ".join("?" * len(held))
            over = (
                "created <= ? AND kind <> 'conversation' AND status NOT IN (?, ?) AND "
                f"(point IS NULL OR point NOT IN ({marks}))"
            )
            done = self._connection.execute(f"DELETE FROM rows WHERE {over}", (cut, *UNDER_WAY, *held))
            num_sooner = 0
            for namespace, its_own in sooner.items():
                left = self._connection.execute(
                    f"UPDATE OR REPLACE rows SET kind = '{GONE}', status = 'completed', record = x'7b7d' "
                    f"WHERE kind <> '{GONE}' AND namespace = ? AND {over}", (namespace, its_own, *UNDER_WAY, *held),
                )  # fmt: skip
                num_sooner += left.rowcount
            (oldest,) = self._connection.execute(
                "SELECT min(created) FROM rows WHERE kind NOT IN ('conversation', ?)", (GONE,)
            ).fetchone()
            freed = self._connection.execute(
                "DELETE FROM rows WHERE kind = ? AND created < ?", (GONE, math.inf if oldest is None else oldest)
            )
            self._count()
        return done.rowcount + num_sooner + freed.rowcount, oldest

    def close(self) -> None:
        with self._lock, _ledger_errors(self._path):
            self._connection.close()

    def points(self, namespace: str) -> list[tuple[str, str, str]]:
        """(kind, id, commit) of all rows of a namespace that name a commit, oldest first."""
        with self._lock, _ledger_errors(self._path):
            return self._connection.execute(
                "SELECT kind, id, point FROM rows WHERE namespace = ? AND point IS NOT NULL AND kind <> 'deleted' "
                "ORDER BY created, id",
                (namespace,),
            ).fetchall()

    def _rows(self, where: str, values: Iterable[object]) -> list[LedgerRow]:
        found = self._connection.execute(f"SELECT {_COLUMNS} FROM rows {where}", tuple(values)).fetchall()
        return [
            LedgerRow(
                kind=kind, id=id, namespace=namespace, status=status, record=msgspec.json.decode(record), point=point,
                parent=parent, nbytes=nbytes, created=created,
            )
            for kind, id, namespace, status, record, point, parent, nbytes, created in found
        ]  # fmt: skip
