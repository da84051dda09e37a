"""The repository's SQLite file: connections, transactions, and what its errors mean.

WAL, synchronous=FULL: a transaction that returned is on disk. Any thread may use it: connections come from a pool,
one user at a time. A process that was forked off drops its parent's connections and opens its own.

`fsck --rebuild` puts another file in the place of this one. Each write, once it is the only one, and each opening of a
connection shares the lock on the repository's folder, which the rebuild holds alone: what returned is in the file that
it reads, and who had begun to wait begins again in the new one, which is told by its inode.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from thaw.core.errors import Busy, Conflict, CorruptDatabase, StorageFailed, ThawError
from thaw.data.files import aside, make_way, storage_errors, sync_folder
from thaw.store.locks import locked
from thaw.store.schema import COUNTS, DATABASE, FORMAT, TABLES
from thaw.store.settings import REBUILD, set_setting

BUSY_S = 60.0
IDLE = 16
"""Connections that are kept open for later, each with up to 2 MB of SQLite's pages. More are open while more are in
use."""
SIDE_FILES = ("-wal", "-shm", "-journal")
"""What SQLite has beside a database, by what is added to its name."""
_BUSY = ("database is locked", "database table is locked", "database schema is locked", "locking protocol")
_FULL = "database or disk is full"
_DENIED = (
    "attempt to write a readonly database", "unable to open database", "disk I/O error", "not authorized",
    "access permission denied",
)  # fmt: skip
_ABANDONED: list[sqlite3.Connection] = []
"""Connections inherited through fork: closing them here would disturb the parent's locks."""


class CommitUnsure(StorageFailed):
    """COMMIT itself failed for a reason other than a full disk: the rows may or may not come back after a crash."""


def translate(error: sqlite3.Error, path: Path) -> ThawError:
    """The thaw error that says what `error` means for the database `path`."""
    text = str(error) if isinstance(error, sqlite3.OperationalError) else ""
    if text.startswith(_BUSY):
        return Busy(f"another process has been writing to {path} for {BUSY_S:.0f} s. Try again when it is done.")
    if text.startswith(_FULL):
        return StorageFailed(
            f"cannot write {path}: the disk is full. Free some space (`thaw gc` drops what no branch or tag needs), "
            "then try again."
        )
    if text.startswith(_DENIED):
        return StorageFailed(
            f"cannot use {path}: {text}. Check that the folder is writable for this user, that the disk has space and "
            "that the file system is not mounted read-only; then try again."
        )
    return CorruptDatabase(f"{path}: {error}. {REBUILD}")


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
        with self._connection() as (connection, _):
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
        while True:
            with self._connection() as (connection, inode):
                connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                connection.execute("BEGIN IMMEDIATE")
                try:
                    with self._in_place():
                        if self._current_inode() == inode:
                            yield connection
                            self._commit(connection, inode)
                            return
                finally:
                    if connection.in_transaction:
                        with contextlib.suppress(sqlite3.Error):
                            connection.execute("ROLLBACK")

    def _in_place(self) -> contextlib.AbstractContextManager[None]:
        """While the block runs, no rebuild puts another file in the place of this one."""
        busy = f"`thaw fsck --rebuild` is making {self.path} again. Try again when it is done."
        return locked(self.path.parent, shared=True, wait_s=BUSY_S, busy=busy)

    def _commit(self, connection: sqlite3.Connection, inode: int) -> None:
        if self._current_inode() != inode:
            raise Conflict(f"{self.path} was replaced by another file meanwhile. Nothing was changed in it; try again.")
        try:
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            failed = translate(error, self.path)
            if isinstance(failed, StorageFailed) and not str(error).startswith(_FULL):
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
    def _connection(self) -> Iterator[tuple[sqlite3.Connection, int]]:
        """A connection for this block alone, and the inode of the file that it is to."""
        with database_errors(self.path):
            connection, inode = self._take()
            try:
                yield connection, inode
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
            with self._in_place():
                inode = self._current_inode()
                connection = connect(self.path)
        with self._lock:
            self._busy.add(connection)
        return connection, inode

    def _give_back(self, connection: sqlite3.Connection, inode: int) -> None:
        with self._lock:
            self._busy.discard(connection)
            keep = not self._closed and inode == self._inode and not connection.in_transaction
            keep = keep and len(self._idle) < IDLE
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.close()

    def _current_inode(self) -> int:
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            raise CorruptDatabase(f"{self.path} is gone. {REBUILD}") from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise CorruptDatabase(f"{self.path} is a symbolic link that leads nowhere. {REBUILD}") from None
            raise StorageFailed(f"cannot reach {self.path}: {error.strerror}.") from error
        _require_file(self.path, status)
        return status.st_ino

    def _after_fork(self) -> None:
        _ABANDONED.extend([*self._idle, *self._busy])
        self._idle, self._busy = [], set()
        self._lock = threading.Lock()
        self._pid = os.getpid()


def is_read_only(path: Path) -> bool:
    """Whether the file system of `path` is mounted read-only, so that nobody writes there."""
    return bool(os.statvfs(path.parent).f_flag & os.ST_RDONLY)


def _require_file(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise CorruptDatabase(f"{path} is no file but a folder, a pipe, a link or a device. {REBUILD}")


def connect(path: Path) -> sqlite3.Connection:
    """A connection to an existing database, with its write-ahead log; transactions are explicit.

    On a read-only file system it only reads, provided that no write-ahead log waits to be taken in, and a database of
    an older format is brought up in memory. What has the name of one of its files and is none is never opened.
    """
    for suffix in SIDE_FILES:
        side = path.with_name(path.name + suffix)
        with contextlib.suppress(FileNotFoundError):
            _require_file(side, side.lstat())
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
        version = connection.execute("PRAGMA user_version").fetchone()[0]  # from here on it has the log open, too
        if mode == "mode=rw" or version >= FORMAT:
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

    What had that name before is kept as `thaw.db.damaged-…`. Where there may be one, its place is `locked`.
    """
    path, new = folder / DATABASE, folder / (DATABASE + ".new")
    with storage_errors(new, "create"):
        _remove(new)
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
        with storage_errors(new, "remove"):
            _remove(new)


def _set_aside(path: Path) -> None:
    """Keeps a database that is to be replaced by another name; its write-ahead log must not meet the new one."""
    quietly = contextlib.suppress(ThawError, FileNotFoundError)
    with quietly, database_errors(path), contextlib.closing(connect(path)) as old:
        old.execute("PRAGMA wal_checkpoint(PASSIVE)")
    name = aside(path)
    for suffix in SIDE_FILES:
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{name}{suffix}")
    with contextlib.suppress(FileNotFoundError):
        try:
            os.link(path, name, follow_symlinks=False)
        except OSError:
            os.rename(path, name)  # a folder, or no links on this file system


def _remove(path: Path) -> None:
    """Removes a database that is only being made. Raises `OSError`."""
    for suffix in ("", *SIDE_FILES):
        make_way(f"{path}{suffix}")


def remove_strangers(path: Path) -> None:
    """Makes way for SQLite's files beside a database where what has their names is none. Raises `StorageFailed`."""
    for suffix in SIDE_FILES:
        side = path.with_name(path.name + suffix)
        with storage_errors(side, "remove"):
            if os.path.lexists(side) and not stat.S_ISREG(side.lstat().st_mode):
                make_way(side)
