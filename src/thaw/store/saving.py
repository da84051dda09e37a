"""Keeping refs.json and refs.log up to the database: after each change of refs, HEAD or settings, before it returns.

Under a lock, always from what the database says at that moment; so they are never newer than the database, unless the
database lost something. Usually a line is added to the log. Where that cannot be, or the log has grown as large as
refs.json, refs.json is rewritten, and the log goes. Whoever waited for the lock may find its change saved already.
"""

from __future__ import annotations

import contextlib
import os
import stat
import warnings
from pathlib import Path

from thaw.core.errors import ThawError
from thaw.data.files import make_way, pwrite_all, storage_errors, sync_folder
from thaw.store import backup, refslog, reserve
from thaw.store.db import Database
from thaw.store.locks import locked
from thaw.store.refslog import End

LOG_BYTES = 64 << 10
"""A log may have this, or as much as refs.json has where that is more."""


class Saver:
    """Of one open store. Any thread may use it; others may save the same repository."""

    def __init__(self, folder: Path, database: Database) -> None:
        self._folder, self._database = folder, database
        self._end: End | None = None
        self._size = 0
        self._added = False

    def save(self, *, with_reserve: bool = False, anew: bool = False) -> None:
        """Whatever goes wrong is a warning, because the change itself is on disk. `anew`: as `write`."""
        work = self.write if anew else self._save
        try:
            if with_reserve:
                reserve.with_room(self._folder, work)
            else:
                work()
        except ThawError as error:
            warnings.warn(f"refs.json could not be brought up to date: {error}", RuntimeWarning, stacklevel=3)

    def write(self) -> None:
        """Writes refs.json. Raises `StorageFailed`; then the old one is still there, with its log."""
        with locked(self._folder / "refs.lock"):
            self._write()

    def fold(self) -> None:
        """Writes refs.json where this store added to the log; nothing is lost where that fails."""
        if self._added:
            with contextlib.suppress(ThawError):
                self.write()

    def _save(self) -> None:
        with locked(self._folder / "refs.lock"):
            end = self._find_end()
            if end is None:
                self._write()
                return
            with self._database.read() as connection:
                if end == refslog.end_of(connection, end.base):
                    return
                line = refslog.change(connection, end)
            data = b"" if line is None else refslog.encode(line)
            if line is None or len(data) > refslog.LINE_BYTES or self._size + len(data) > self._limit():
                self._write()
                return
            self._add(data)
            self._end = refslog.end_after(line)

    def _write(self) -> None:
        self._end = None
        with self._database.read() as connection:
            data = backup.encode(backup.collect(connection))
            end = refslog.end_of(connection, backup.digest_of(data))
        backup.write_bytes(self._folder, data)
        with contextlib.suppress(OSError):
            make_way(self._folder / refslog.NAME)
        self._end, self._size, self._added = end, 0, False

    def _find_end(self) -> End | None:
        """Where the next line goes; None where refs.json must be written: nothing is known of it, or of its log."""
        base = backup.read_digest(self._folder)
        end = self._end if self._end is not None and self._end.base == base else None
        size = self._log_size()
        if end is not None and size == self._size:
            return end
        data = refslog.read_bytes(self._folder)
        lines, whole = refslog.parse(data, base) if data and base else ([], False)
        if not lines or not whole or data is None:
            return None
        self._size, self._end = len(data), refslog.end_after(lines[-1])
        return self._end

    def _log_size(self) -> int:
        """0 where there is none, -1 for what is no file."""
        with storage_errors(self._folder / refslog.NAME, "look at"):
            try:
                status = os.lstat(self._folder / refslog.NAME)
            except FileNotFoundError:
                return 0
        return status.st_size if stat.S_ISREG(status.st_mode) else -1

    def _limit(self) -> int:
        with storage_errors(self._folder / backup.NAME, "look at"):
            return max(LOG_BYTES, os.stat(self._folder / backup.NAME).st_size)

    def _add(self, data: bytes) -> None:
        """Adds a line, which is on disk on return. Raises `StorageFailed`; then the log is as it was, or is left."""
        path, size, end = self._folder / refslog.NAME, self._size, self._end
        self._end = None
        with storage_errors(path, "write"):
            flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            fd = os.open(path, flags if size else flags | os.O_CREAT, 0o600)
            try:
                pwrite_all(fd, memoryview(data), size)
                os.fsync(fd)
            except OSError:
                os.ftruncate(fd, size)
                self._end = end
                raise
            finally:
                os.close(fd)
            if not size:
                sync_folder(self._folder)
        self._size, self._added = size + len(data), True
