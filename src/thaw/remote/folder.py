"""A bucket in a folder of this host, or of one that is mounted here.

An object is a file. It is written under `.tmp/` first, synced, and renamed to its name; its folder is synced after
that. Compare-and-swap happens under a lock on the file `.lock`, and is that same rename. A process that is killed
leaves at most a file in `.tmp/`: its lock is gone with it, and the next to write removes it.

The version of an object is a hash of its content, so values that are swapped hold a nonce (`thaw.remote.bucket`). Files
are for this user alone (0600, 0700).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from blake3 import blake3

from thaw.core.errors import RemoteMissing
from thaw.data.files import pwrite_all, storage_errors, sync_folder
from thaw.remote.bucket import CLOCK, FoundObject, ListedObject, Version, check_key, is_key
from thaw.remote.errors import REPAIR
from thaw.store.locks import locked

LOCK = ".lock"
TEMPORARY = ".tmp"
LOCK_WAIT_S = 60.0


class FolderBucket:
    """A `Bucket` in `root`, which the first write makes. Reading takes no lock and needs no right to write."""

    def __init__(self, root: Path) -> None:
        self._root, self._swept = root, False

    @property
    def url(self) -> str:
        return self._root.as_uri()

    def read(self, key: str) -> FoundObject | None:
        path = self._path(key)
        with storage_errors(path, "read"):
            try:
                data = path.read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None
        return FoundObject(data, _version(data))

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        if any(start < 0 or length < 0 for start, length in ranges):
            raise ValueError(f"negative start or length: {ranges}")
        path = self._path(key)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise RemoteMissing(f"{key} is not at {self.url}. {REPAIR}") from None
        try:
            with storage_errors(path, "read"):
                return [self._range(fd, key, start, length) for start, length in ranges]
        finally:
            os.close(fd)

    def size(self, key: str) -> int | None:
        path = self._path(key)
        with storage_errors(path, "read"):
            try:
                return path.stat().st_size if path.is_file() else None
            except FileNotFoundError:
                return None

    def put(self, key: str, data: bytes | memoryview) -> None:
        path = self._path(key)
        with storage_errors(path, "write"), self._written(data) as temporary:
            self._place(temporary, path)

    def create(self, key: str, data: bytes) -> Version | None:
        return self._conditional(key, data, None)

    def swap(self, key: str, data: bytes, expected: Version) -> Version | None:
        return self._conditional(key, data, expected)

    def delete(self, keys: Sequence[str]) -> None:
        paths = [self._path(key) for key in keys]
        if not self._root.is_dir():
            return
        with self._locked():
            for path in paths:
                with storage_errors(path, "delete"), contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    path.unlink()
            for folder in {path.parent for path in paths}:
                with storage_errors(folder, "sync"), contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    sync_folder(folder)

    def entries(self, prefix: str) -> Iterator[ListedObject]:
        start = self._path(prefix) if prefix else self._root
        for folder, folders, files in os.walk(start):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                path = Path(folder, name)
                key = path.relative_to(self._root).as_posix()
                if not is_key(key) or key == CLOCK:
                    continue
                with storage_errors(path, "look at"), contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    yield ListedObject(key, status.st_size, status.st_mtime)

    def now(self) -> float:
        """By the file system's own clock, which is a server's where the folder is mounted."""
        path = self._path(CLOCK)
        with storage_errors(path, "write"), self._written(b"thaw reads the folder's clock here\n") as temporary:
            at = temporary.stat().st_mtime
            self._place(temporary, path)
        return at

    # Files.

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _range(self, fd: int, key: str, start: int, length: int) -> memoryview:
        size = os.fstat(fd).st_size
        if start + length > size:
            raise RemoteMissing(
                f"{key} at {self.url} ends at byte {size}, but bytes up to {start + length} were written: it was cut "
                f"or replaced. {REPAIR}"
            )
        parts: list[bytes] = []
        at, end = start, start + length
        while at < end:
            part = os.pread(fd, end - at, at)
            if not part:
                raise RemoteMissing(f"{key} at {self.url} was cut at byte {at} while it was read")
            parts.append(part)
            at += len(part)
        return memoryview(parts[0] if len(parts) == 1 else b"".join(parts))

    def _conditional(self, key: str, data: bytes, expected: Version | None) -> Version | None:
        path = self._path(key)
        with self._locked(), storage_errors(path, "write"), self._written(data) as temporary:
            found = self.read(key)
            if (found.version if found else None) != expected:
                return found.version if found is not None and found.data == data else None
            self._place(temporary, path)
        return _version(data)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._make(self._root)
        busy = f"{self.url} is locked by another process for {LOCK_WAIT_S:.0f} seconds; try again when it has ended"
        with locked(self._root / LOCK, wait_s=LOCK_WAIT_S, busy=busy):
            yield

    @contextlib.contextmanager
    def _written(self, data: bytes | memoryview) -> Iterator[Path]:
        """A file under `.tmp/` that holds `data` on disk, locked as long as this process lives and needs it."""
        folder = self._root / TEMPORARY
        self._make(folder)
        if not self._swept:
            _sweep(folder)
            self._swept = True
        path, fd = _own_file(folder)
        try:
            pwrite_all(fd, memoryview(data).cast("B") if len(data) else memoryview(b""), 0)
            os.fsync(fd)
            yield path
        finally:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            os.close(fd)

    def _place(self, temporary: Path, path: Path) -> None:
        self._make(path.parent)
        os.rename(temporary, path)
        sync_folder(path.parent)

    def _make(self, folder: Path) -> None:
        """The folder and its parents, each one that was missing synced into its own parent."""
        if folder.is_dir():
            return
        self._make(folder.parent)
        with storage_errors(folder, "make"):
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            sync_folder(folder.parent)


def _own_file(folder: Path) -> tuple[Path, int]:
    """A new file and its descriptor, locked. One that a sweep took between the two steps is made again."""
    while True:
        path = folder / secrets.token_hex(12)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return path, fd
        os.close(fd)


def _sweep(folder: Path) -> None:
    """Removes what killed writers left: files that nobody holds a lock on."""
    for path in list(folder.iterdir()):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _version(data: bytes) -> Version:
    return Version(f"blake3:{blake3(data).hexdigest()}")
