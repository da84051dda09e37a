"""Durable file operations, and what their failures mean.

Every path that thaw writes goes through here: temporary name, mode 0600, fsync, rename, fsync of the folder. An
operating system error becomes `StorageFailed` with the path, the reason and what to do; nothing else escapes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from thaw.core.errors import CorruptBlob, InvalidRequest, StorageFailed

_ADVICE = {
    errno.ENOSPC: "the disk is full. Free some space (`thaw gc` drops what no branch or tag needs), then try again",
    errno.EDQUOT: "the disk quota is used up. Free some space (`thaw gc`), then try again",
    errno.EFBIG: "the file would be larger than the limit (ulimit -f, or the file system's). Raise it, then try again",
    errno.EROFS: "the file system is read-only. Mount it for writing, or use a repository elsewhere",
    errno.EACCES: "permission denied. Give this user the right to write there, or use a repository elsewhere",
    errno.EPERM: "operation not permitted. Give this user the right to write there, or use a repository elsewhere",
    errno.EIO: "the device reported an I/O error. Check the disk, then run `thaw fsck`",
    errno.ENOENT: "it does not exist",
    errno.EMFILE: "too many open files. Raise the limit (ulimit -n), then try again",
}


def cache_dir() -> Path:
    """Where thaw keeps what it can build again: `$THAW_CACHE_DIR`, `$XDG_CACHE_HOME/thaw` or `~/.cache/thaw`."""
    if own := os.environ.get("THAW_CACHE_DIR"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "thaw"
    return Path.home() / ".cache" / "thaw"


def storage_failed(error: OSError, path: Path | str, doing: str) -> StorageFailed:
    """The `StorageFailed` that says what `error` means for `path`."""
    reason = _ADVICE.get(error.errno or 0, error.strerror or str(error))
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    return StorageFailed(f"cannot {doing} {path}: {reason} ({name})")


@contextlib.contextmanager
def storage_errors(path: Path | str, doing: str) -> Iterator[None]:
    """Turns an `OSError` inside into `StorageFailed` naming `path`."""
    try:
        yield
    except OSError as error:
        raise storage_failed(error, path, doing) from error


def stamp(path: Path) -> tuple[int, int, int]:
    """Size and times of a file: another once it was written, also where its mtime was put back, as archives and copies
    do. Raises `OSError`."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_at_most(file: BinaryIO, limit: int, name: str) -> bytes:
    """All of an open file, which may be a pipe, or a device that never ends: no more than `limit` bytes are taken in.

    Raises `InvalidRequest` when there are more, `OSError`.
    """
    data = file.read(limit + 1)
    if len(data) > limit:
        raise InvalidRequest(f"{name} has more than {limit:,} bytes, the most that is read here. Give a smaller one.")
    return data


def read_tail(path: Path, nbytes: int) -> bytes:
    """The last bytes of a file that may be long, as a log is. Raises `OSError`."""
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - nbytes))
        return file.read(nbytes)


def read_own(path: Path, limit: int) -> bytes:
    """A file of thaw's own, which whoever may write there may have made anything: no pipe is waited for.

    Raises `CorruptBlob` when it is no file or longer than `limit`, `OSError`.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise CorruptBlob(f"{path.name} is no file but a folder, a pipe or a device")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise CorruptBlob(f"{path.name} has more than {limit:,} bytes")
    return data


def pwrite_all(fd: int, data: memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`; short writes are continued."""
    while len(data):
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def start_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Asks the kernel to begin writing these bytes to the device now, so that a later fsync has less to wait for.

    A hint: nothing happens where it is not supported, and nothing is promised about when the bytes are on disk.
    """
    call = _sync_file_range()
    if call is not None:
        call(fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


_SYNC_FILE_RANGE_WRITE = 2


@functools.cache
def _sync_file_range() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    import ctypes  # only for those who write

    call: Callable[..., int] | None = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)  # type: ignore[attr-defined]
    return call


def sync_folder(folder: Path) -> None:
    """fsync of the folder itself: what makes a created, renamed or removed name last."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def aside(path: Path | str) -> str:
    """The name that what is in the place of a file, or is replaced as damaged, gets instead."""
    return f"{path}.damaged-{datetime.now():%Y%m%d-%H%M%S-%f}"


def make_way(path: Path | str) -> None:
    """Removes a file that is left over, or what is none; a folder is only given another name. Raises `OSError`."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):
        os.rename(path, aside(path))


@contextlib.contextmanager
def replacing(path: Path, *, overwrite: bool = True) -> Iterator[int]:
    """A file descriptor to write; at the end of the block it becomes `path`, whole and on disk, or nothing is left.

    The temporary name is `<path>.tmp` (whoever holds the repository's lease on the name owns it too).
    Without `overwrite` an existing `path` is an error. Raises `StorageFailed`.
    """
    temporary = path.with_name(path.name + ".tmp")
    with storage_errors(path, "write"):
        make_way(temporary)
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    finished = False
    try:
        yield fd
        with storage_errors(path, "write"):
            os.fsync(fd)
            if not overwrite and path.exists():
                raise FileExistsError(errno.EEXIST, "a file of that name exists already", str(path))
            os.rename(temporary, path)
            finished = True
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)
        if not finished:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def write_atomic(path: Path, data: bytes) -> None:
    """`path` holds the old bytes or these, after a crash too; on return it holds these. Raises `StorageFailed`."""
    with replacing(path) as fd, storage_errors(path, "write"):
        pwrite_all(fd, memoryview(data), 0)


def drop_cache(path: Path) -> None:
    """Asks the kernel to forget the file's cached pages (measurements of a cold read)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
