"""The reserve: a file beside the database whose space is given up when the disk is full, so that there is a way out.

Deleting refs and gc need a little space before they free any: the write-ahead log, a lease, refs.json. They try
without; where the disk says no, a part of the reserve is given up and they are run again, then with a larger part.
Opening the database takes a small part in the same way. Afterwards, and when the repository is closed, the reserve is
made as large again as there is room. Nobody else spends it: who is about to write checks first that it is there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from thaw.core.errors import StorageFailed
from thaw.data.files import pwrite_all, storage_errors

NAME = "reserve"
NBYTES = 8 << 20
OPENING = 64 << 10
"""The part that opening gives up first: what SQLite needs to read is less."""
FIRST = 1 << 20
"""The part that deleting refs and gc give up first."""
_BLOCK = 4 << 10
T = TypeVar("T")


def free_bytes(folder: Path) -> int:
    """What this user may still write on the file system of `folder`."""
    with storage_errors(folder, "look at"):
        status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def keep(folder: Path) -> None:
    """Makes the reserve where it is missing, or what it has lost.

    Raises `StorageFailed` where it is not whole then; on a full disk it is as large as there was room.
    """
    path = folder / NAME
    with storage_errors(path, "look at"):
        there = _size(path)
    with storage_errors(path, "reserve space in"):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            _allocate(fd, NBYTES)
        except OSError:
            _allocate_most(fd, there)
            raise
        finally:
            os.close(fd)


def refill(folder: Path) -> None:
    """`keep` for a reserve that somebody took a part of, as far as it can be done."""
    with contextlib.suppress(StorageFailed, OSError):
        if _size(folder / NAME) not in (0, NBYTES):
            keep(folder)


def _size(path: Path) -> int:
    """0 where there is none. Raises `StorageFailed` for what is no file, `OSError`."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return 0
    if not stat.S_ISREG(status.st_mode):
        raise StorageFailed(
            f"{path} is no file but a folder, a pipe, a link or a device, so no space can be kept in it. Remove it, "
            "then try again."
        )
    return status.st_size


def _allocate_most(fd: int, nbytes: int) -> None:
    """As much as there is room for, `nbytes` of which are there."""
    more = NBYTES // 2
    while more >= _BLOCK:
        try:
            _allocate(fd, min(nbytes + more, NBYTES))
            nbytes = min(nbytes + more, NBYTES)
        except OSError:
            more //= 2
    os.ftruncate(fd, nbytes)


def _allocate(fd: int, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, nbytes)
    elif (there := os.fstat(fd).st_size) < nbytes:
        pwrite_all(fd, memoryview(bytes(nbytes - there)), there)


def with_room(folder: Path, work: Callable[[], T], first: int = FIRST) -> T:
    """What `work` returns; run again without a part of the reserve where the disk was full, of `first` bytes and then
    of more. `work` undoes what it began."""
    try:
        return work()
    except StorageFailed as error:
        full = error
    part, given = first, False
    try:
        while is_full(full, folder) and _give_up(folder / NAME, part):
            part, given = 4 * part, True
            try:
                return work()
            except StorageFailed as error:
                full = error
        raise full
    finally:
        if given:
            with contextlib.suppress(StorageFailed):
                keep(folder)


def _give_up(path: Path, nbytes: int) -> bool:
    """Whether there was something to give up: that much of the reserve, or all that is left."""
    try:
        there = _size(path)
        if there:
            os.truncate(path, max(0, there - nbytes))
    except (StorageFailed, OSError):
        return False
    return there > 0


def is_full(error: StorageFailed, folder: Path) -> bool:
    """Whether there was no space: SQLite may call that an I/O error."""
    cause = error.__cause__
    if isinstance(cause, OSError):
        return cause.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(cause, sqlite3.Error) and ("full" in str(cause) or free_bytes(folder) < NBYTES)
