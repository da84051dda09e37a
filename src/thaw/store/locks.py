"""Locks between processes and threads, by `flock`: they end with the process that holds them.

refs.lock     while refs.json or refs.log is written
gc.lock       while gc or a rebuild runs
the folder    shared by each write to the database, and while a connection to it is opened; a rebuild holds it alone
              while it reads the old database and puts the new one in its place
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from thaw.core.errors import Busy
from thaw.data.files import storage_errors

_POLL_S = 0.01


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, wait_s: float | None = None, busy: str = "") -> Iterator[None]:
    """Holds a lock on a folder, or on a file, which is made where it is missing.

    `wait_s`: how long to wait for it, None for as long as it takes; then `Busy` is raised, with the text `busy`. Raises
    `StorageFailed`.
    """
    with storage_errors(path, "lock"):
        flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        with storage_errors(path, "lock"):
            held = _flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, wait_s)
        if not held:
            raise Busy(busy)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)  # a process forked off meanwhile has this file open as well
        os.close(fd)


def _flock(fd: int, how: int, wait_s: float | None) -> bool:
    if wait_s is None:
        fcntl.flock(fd, how)
        return True
    until = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
        time.sleep(_POLL_S)
