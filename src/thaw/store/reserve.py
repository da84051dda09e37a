"""The reserve: a file beside the database whose space is given up when the disk is full, so that there is a way out.

Deleting refs and gc need a little space before they free any: the write-ahead log, a lease, refs.json. They try
without; where the disk says no, the reserve is spent, they are run again, and it is made anew from what they freed.
Nobody else spends it, but for opening the database: who is about to write checks first that it is there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from thaw.core.errors import StorageFailed
from thaw.data.files import pwrite_all, storage_errors

NAME = "reserve"
NBYTES = 8 << 20
_LEAST = 256 << 10
T = TypeVar("T")


def free_bytes(folder: Path) -> int:
    """What this user may still write on the file system of `folder`."""
    with storage_errors(folder, "look at"):
        status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def keep(folder: Path) -> bool:
    """Makes the reserve where it is missing, a smaller one where there is no room for it; whether it is whole."""
    nbytes = NBYTES
    while nbytes >= _LEAST:
        with contextlib.suppress(StorageFailed):
            _allocate(folder / NAME, nbytes)
            return nbytes == NBYTES
        nbytes //= 2
    with contextlib.suppress(OSError):
        os.unlink(folder / NAME)
    return False


def _allocate(path: Path, nbytes: int) -> None:
    with storage_errors(path, "reserve space in"):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, nbytes)
            elif os.fstat(fd).st_size < nbytes:
                pwrite_all(fd, memoryview(bytes(nbytes)), 0)
        finally:
            os.close(fd)


def with_room(folder: Path, work: Callable[[], T]) -> T:
    """What `work` returns; run again without the reserve where the disk was full. `work` undoes what it began."""
    try:
        return work()
    except StorageFailed as error:
        if not is_full(error, folder) or not _spend(folder):
            raise
    try:
        return work()
    finally:
        keep(folder)


def _spend(folder: Path) -> bool:
    try:
        os.unlink(folder / NAME)
    except OSError:
        return False
    return True


def is_full(error: StorageFailed, folder: Path) -> bool:
    """Whether there was no space: SQLite may call that an I/O error."""
    cause = error.__cause__
    if isinstance(cause, OSError):
        return cause.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(cause, sqlite3.Error) and ("full" in str(cause) or free_bytes(folder) < NBYTES)
