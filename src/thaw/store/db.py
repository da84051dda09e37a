"""The repository's SQLite file: connections, transactions, and what its errors mean.

WAL, synchronous=FULL: a transaction that returned is on disk. Any thread may use it: connections come from a pool,
one user at a time. A process that was forked off drops its parent's connections and opens its own. A file that
`fsck --rebuild` replaced is noticed by its inode.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from thaw.core.errors import Busy, CorruptDatabase, NewerFormat, StorageFailed, ThawError
from thaw.data.files import storage_errors, sync_folder
from thaw.store.schema import COUNTS, DATABASE, FORMAT, TABLES, checksum

BUSY_S = 60.0
REBUILD = "Run `thaw fsck --rebuild` to make it again from the packs."
_ABANDONED: list[sqlite3.Connection] = []
"""Connections inherited through fork: closing them here would disturb the parent's locks."""


class CommitUnsure(StorageFailed):
    """COMMIT itself failed for a reason other than a full disk: the rows may or may not come back after a crash."""


def translate(error: sqlite3.Error, path: Path) -> ThawError:
    """The thaw error that says what `error` means for the database `path`."""
    text = str(error)
    if "locked" in text or "busy" in text:
        return Busy(f"another process has been writing to {path} for {BUSY_S:.0f} s. Try again when it is done.")
    if "full" in text:
        return StorageFailed(
            f"cannot write {path}: the disk is full. Free some space (`thaw gc` drops what no branch or tag needs), "
            "then try again."
        )
    if "readonly" in text or "unable to open" in text or "disk I/O" in text or "not authorized" in text:
        return StorageFailed(
            f"cannot use {path}: {text}. Check that the folder is writable for this user, that the disk has space and "
            "that the file system is not mounted read-only; then try again."
        )
    return CorruptDatabase(f"{path}: {text}. {REBUILD}")


@contextlib.contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Turns an `sqlite3.Error` (or undecodable text) inside into thaw's own."""
    try:
        yield
    except sqlite3.Error as error:
        raise translate(error, path) from error
    except (UnicodeDecodeError, OverflowError) as error:
        raise CorruptDatabase(f"{path}: {error}. {REBUILD}") from error


class Database:
    """A pool of connections to one file. `read` and `write` are its only doors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._idle: list[sqlite3.Connection] = []
        self._busy: set[sqlite3.Connection] = set()
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._inode = -1
        self._closed = False

    @contextlib.contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """One consistent view of the database for the length of the block."""
        with self._connection() as connection:
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")

    @contextlib.contextmanager
    def write(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """The only writer for the length of the block; all of it is kept, or (on any exception) nothing.

        On return it is on disk; with `durable=False` only a power cut may undo it (leases need no more).
        """
        with self._connection() as connection:
            connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise
            self._commit(connection)

    def _commit(self, connection: sqlite3.Connection) -> None:
        try:
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            failed = translate(error, self.path)
            if isinstance(failed, StorageFailed) and "full" not in str(error):
                raise CommitUnsure(str(failed)) from error
            raise failed from error

    def close(self) -> None:
        """Closes idle connections; busy ones close when their block ends. Idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        if self._pid == os.getpid():
            for connection in idle:
                connection.close()

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with database_errors(self.path):
            connection, inode = self._take()
            try:
                yield connection
            finally:
                self._give_back(connection, inode)

    def _take(self) -> tuple[sqlite3.Connection, int]:
        if self._pid != os.getpid():
            self._after_fork()
        inode = self._current_inode()
        with self._lock:
            if self._closed:
                raise Busy(f"{self.path.parent} was closed in this process. Open the repository again.")
            stale = self._idle if inode != self._inode else []
            if stale or inode != self._inode:
                self._idle, self._inode = [], inode
            connection = self._idle.pop() if self._idle else None
        for old in stale:
            old.close()
        if connection is None:
            connection = connect(self.path)
        with self._lock:
            self._busy.add(connection)
        return connection, inode

    def _give_back(self, connection: sqlite3.Connection, inode: int) -> None:
        with self._lock:
            self._busy.discard(connection)
            keep = not self._closed and inode == self._inode and not connection.in_transaction
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.close()

    def _current_inode(self) -> int:
        try:
            return os.stat(self.path).st_ino
        except FileNotFoundError:
            raise CorruptDatabase(f"{self.path} is gone. {REBUILD}") from None
        except OSError as error:
            raise StorageFailed(f"cannot reach {self.path}: {error.strerror}.") from error

    def _after_fork(self) -> None:
        _ABANDONED.extend([*self._idle, *self._busy])
        self._idle, self._busy = [], set()
        self._lock = threading.Lock()
        self._pid = os.getpid()


def is_read_only(path: Path) -> bool:
    """Whether the file system of `path` is mounted read-only, so that nobody writes there."""
    return bool(os.statvfs(path.parent).f_flag & os.ST_RDONLY)


def connect(path: Path) -> sqlite3.Connection:
    """A connection to an existing database; transactions are explicit.

    On a read-only file system it only reads, provided that no write-ahead log waits to be taken in, and a database of
    an older format is brought up in memory.
    """
    mode = "mode=rw"
    if is_read_only(path):
        wal = path.with_name(path.name + "-wal")
        if wal.exists() and wal.stat().st_size:
            raise StorageFailed(
                f"{path} was not closed cleanly and its file system is read-only. Mount it for writing once, so that "
                "the last commits can be taken in."
            )
        mode = "mode=ro&immutable=1"
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?{mode}", uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False
    )
    try:
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("PRAGMA cell_size_check=ON")
        connection.execute("PRAGMA wal_autocheckpoint=1000")
        if mode == "mode=rw" or connection.execute("PRAGMA user_version").fetchone()[0] >= FORMAT:
            return connection
        from thaw.store.upgrade import upgraded_copy  # it stands on this module

        copy = upgraded_copy(connection, path)
    except BaseException:
        connection.close()
        raise
    connection.close()
    return copy


@contextlib.contextmanager
def creating(folder: Path, uuid: str) -> Iterator[sqlite3.Connection]:
    """A new database, filled by the block in one transaction; then it takes the name `thaw.db`, whole and on disk.

    What had that name before is kept as `thaw.db.damaged-…`.
    """
    path, new = folder / DATABASE, folder / (DATABASE + ".new")
    _remove(new)
    with storage_errors(new, "create"):
        os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
    try:
        with database_errors(new), contextlib.closing(connect(new)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("BEGIN IMMEDIATE")
            for statement in TABLES:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version={FORMAT}")
            set_setting(connection, "format", str(FORMAT))
            set_setting(connection, "uuid", uuid)
            set_setting(connection, "head", "main")
            for key in COUNTS:
                set_setting(connection, key, "0")
            yield connection
            connection.execute("COMMIT")
        with storage_errors(path, "create"):
            _set_aside(path)
            os.rename(new, path)
            sync_folder(folder)
    finally:
        _remove(new)


def _set_aside(path: Path) -> None:
    """Renames a database that is to be replaced; its WAL must not meet the new one."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.rename(str(path) + suffix, f"{path}.damaged-{stamp}{suffix}")


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm", "-journal"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(str(path) + suffix)


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


def check_format(connection: sqlite3.Connection, path: Path) -> int:
    """The format of the database: ours, or an older one.

    Raises `NewerFormat` for a database of a later thaw, `CorruptDatabase` for one that is none of ours.
    """
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    said = setting(connection, "format")
    if said is None or str(version) != said or version < 1:
        raise CorruptDatabase(f"{path} does not say its format twice alike ({version}, {said}). {REBUILD}")
    if version > FORMAT:
        raise NewerFormat(
            f"{path} has format {version}: written by a newer thaw. This one reads up to {FORMAT}; upgrade thaw."
        )
    return version
