"""A folder of packs on this host, `file:///…`: the tier of every repository, on disk or in shared memory."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from thaw.core.errors import CorruptBlob, InvalidRequest
from thaw.data.files import pwrite_all, replacing, start_writeback, storage_errors
from thaw.data.header import PAGE
from thaw.data.locations import StoreMount, TierAddress
from thaw.data.tiers.base import MissingPack, Requests

SCHEME = "file://"
REQUESTS = Requests(nbytes=512 << 10, gap_nbytes=PAGE - 1)
"""What is read and hashed at a time is still in the processor's cache when it is hashed."""
WRITEBACK_BYTES = 8 << 20
"""The device is told to begin after so many bytes, and writes while the next are hashed and copied."""


def folder_mount(uuid: str, folder: Path) -> StoreMount:
    """A store whose packs lie in one folder of this host."""
    return StoreMount(uuid=uuid, tiers=(TierAddress(url=folder.absolute().as_uri()),))


def folder_of(address: TierAddress) -> Path:
    """Raises `InvalidRequest` for the address of no folder."""
    from urllib.parse import unquote_to_bytes

    path = os.fsdecode(unquote_to_bytes(address.url.removeprefix(SCHEME)))
    if not address.url.startswith(SCHEME) or not os.path.isabs(path) or address.options:
        raise InvalidRequest(f"{address.url[:200]!r} names no folder; write {SCHEME}/FOLDER, without options")
    return Path(path)


def open_folder(address: TierAddress) -> Folder:
    return Folder(folder_of(address))


class Folder:
    """Reads and writes packs in one folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def open_pack(self, name: str) -> FilePack:
        return FilePack(self._path / name)

    @contextlib.contextmanager
    def new_pack(self, name: str) -> Iterator[NewFile]:
        path = self._path / name
        with replacing(path, overwrite=False) as fd:
            yield NewFile(fd, path)


class FilePack:
    """An open file. See `OpenPack`."""

    requests = REQUESTS

    def __init__(self, path: Path) -> None:
        self._path, self._fd = path, open_file(path)
        self.nbytes = os.fstat(self._fd).st_size

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        rest = list(views)
        while rest:
            with storage_errors(self._path, "read"):
                got = os.preadv(self._fd, rest, offset)
            if got == 0:
                raise CorruptBlob(
                    f"pack {self._path.name} ended at byte {offset} while being read: cut off. Run `thaw fsck`."
                )
            offset += got
            while rest and got >= len(rest[0]):
                got -= len(rest.pop(0))
            if got:
                rest[0] = rest[0][got:]

    def close(self) -> None:
        os.close(self._fd)


def open_file(path: Path) -> int:
    """A file descriptor of a pack. Raises `MissingPack`, `StorageFailed`, and `CorruptBlob` for what is no file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        raise CorruptBlob(f"pack {path.name} is no file but a folder, a pipe or a device. Run `thaw fsck`.")
    except FileNotFoundError:
        text = f"pack {path.name} is missing from {path.parent}. Run `thaw fsck` to see what needs it."
        raise MissingPack(text) from None
    except OSError as error:
        with storage_errors(path, "read"):
            raise error
        raise AssertionError("unreachable") from error


class NewFile:
    """A file that is written under a temporary name. See `NewPack`."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd, self._path = fd, path
        self._started: int | None = None

    def write(self, data: memoryview, offset: int) -> None:
        with storage_errors(self._path, "write"):
            pwrite_all(self._fd, data, offset)
        end = offset + len(data)
        started = self._started = offset if self._started is None else self._started
        if end - started >= WRITEBACK_BYTES:
            start_writeback(self._fd, started, end - started)
            self._started = end

    def end(self, nbytes: int) -> None:
        with storage_errors(self._path, "write"):
            os.ftruncate(self._fd, nbytes)
