"""KV on its way, for engines in other processes of this host: a tier that reads local packs while a fetch writes them.

A fetch keeps a *progress file* beside the packs. It first lists the blobs that will come, in the order of their
arrival, and then, a line each, where a blob lies as soon as it has been written. Whoever reads one that has not landed
waits for its line. To an engine it is one pack, with its blobs end to end; the bytes are those of the local packs, and
nothing is copied. As from every tier, they are verified by who reads them.

The process that writes it holds a lock on it. Reading ends with `StorageFailed` where the fetch failed, where that
process is gone, and where nothing has landed for `STALL_S` seconds: an engine's thread is not held by a slow network.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Annotated, NamedTuple
from urllib.parse import quote, unquote_to_bytes

import msgspec

from thaw.core.errors import CorruptBlob, StorageFailed
from thaw.data.files import pwrite_all, storage_errors
from thaw.data.locations import TierAddress, is_pack_name
from thaw.data.tiers.base import MissingPack, Requests
from thaw.data.tiers.folder import open_file

SCHEME = "landing"
PREFIX = "zz-arriving-"
"""Of a progress file's name as a pack. It sorts behind names of local packs: what is here already is read first."""
REQUESTS = Requests(nbytes=4 << 20, gap_nbytes=0)
STALL_S = 30.0
LOOK_S, ALIVE_S = 0.002, 0.5
"""How often a progress file is looked at, and how often whether its writer still lives."""
ENDED = "ended"
_Sizes = Annotated[list[Annotated[int, msgspec.Meta(gt=0)]], msgspec.Meta(min_length=1)]


class BlobPart(NamedTuple):
    """A part of one blob that is asked for: its number, the first byte inside it, and where it is to lie."""

    number: int
    begin: int
    view: memoryview


class EndToEnd:
    """Blobs of these sizes, one behind the other."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        *starts, self.nbytes = accumulate(self.sizes, initial=0)
        self.starts = tuple(starts)

    def parts(self, view: memoryview, offset: int) -> Iterator[BlobPart]:
        """What fills `view` from `offset` on."""
        while len(view):
            number = bisect_right(self.starts, offset) - 1
            begin = offset - self.starts[number]
            part = view[: self.sizes[number] - begin]
            yield BlobPart(number, begin, part)
            view, offset = view[len(part) :], offset + len(part)


def read_landed(file: int, view: memoryview, offset: int) -> None:
    """Fills `view` from a local pack that is being written. Raises `CorruptBlob`, `StorageFailed`."""
    while len(view):
        with storage_errors("a pack that is being fetched", "read"):
            got = os.preadv(file, [view], offset)
        if not got:
            raise CorruptBlob(f"a pack that is being fetched ends at byte {offset}: it was cut")
        view, offset = view[got:], offset + got


def folder_address(packs: Path) -> TierAddress:
    """Of all progress files in a folder of packs."""
    return TierAddress(url=f"{SCHEME}://{quote(os.fsencode(packs.absolute()))}")


class ProgressFile:
    """What a fetch writes. Not durable, and removed with `close`; a crash leaves an orphan to the local gc."""

    def __init__(self, packs: Path, pack: str, sizes: Sequence[int]) -> None:
        self._path = _path_of(packs, pack)
        with storage_errors(self._path, "write"):
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX)
        self._nbytes = 0
        self._add(msgspec.json.encode(list(sizes)).decode())

    def landed(self, number: int, pack: str, offset: int) -> None:
        """For one thread at a time."""
        self._add(f"{number} {offset} {pack}")

    def end(self) -> None:
        """What has not landed never will. Where this cannot be written, the lock that ends with `close` tells it."""
        with contextlib.suppress(StorageFailed):
            self._add(ENDED)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(self._file)

    def _add(self, line: str) -> None:
        data = f"{line}\n".encode()
        with storage_errors(self._path, "write"):
            pwrite_all(self._file, memoryview(data), self._nbytes)
        self._nbytes += len(data)


class LandingPack:
    """A progress file that is read. See `OpenPack`."""

    requests = REQUESTS

    def __init__(self, path: Path) -> None:
        self._folder, self._name = path.parent, path.name
        self._lock = threading.Lock()
        self._at, self._rest, self._ended = 0, b"", False
        self._landed = dict[int, tuple[int, int]]()
        self._packs = dict[str, int]()
        self._news = self._alive = time.monotonic()
        self._file = open_file(path)
        try:
            self._layout = EndToEnd(self._header())
        except BaseException:
            self.close()
            raise
        self.nbytes = self._layout.nbytes

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        for view in views:
            for part in self._layout.parts(view, offset):
                file, begin = self._wait_for(part.number)
                read_landed(file, part.view, begin + part.begin)
            offset += len(view)

    def close(self) -> None:
        for file in (self._file, *self._packs.values()):
            os.close(file)

    # -- its lines

    def _header(self) -> list[int]:
        """Its first line, which is written at once."""
        for line in self._lines():
            with contextlib.suppress(msgspec.MsgspecError, UnicodeError):
                return msgspec.json.decode(line, type=_Sizes)
            break
        raise _not_one(self._name)

    def _lines(self) -> Iterator[str]:
        """Those that were added since the last call, up to the last whole one that is taken."""
        with storage_errors(self._folder / self._name, "read"):
            while data := os.pread(self._file, 1 << 16, self._at):
                self._at += len(data)
                self._rest += data
        while b"\n" in self._rest:
            line, _, self._rest = self._rest.partition(b"\n")
            yield line.decode("ascii", "replace")

    def _wait_for(self, number: int) -> tuple[int, int]:
        while True:
            with self._lock:
                if number in self._landed:
                    return self._landed[number]
                self._look()
                if number in self._landed:
                    return self._landed[number]
                self._check()
            time.sleep(LOOK_S)

    def _look(self) -> None:
        for line in self._lines():
            self._news = time.monotonic()
            if line == ENDED:
                self._ended = True
                continue
            number, offset, pack = self._parsed(line)
            self._landed[number] = self._opened(pack), offset

    def _parsed(self, line: str) -> tuple[int, int, str]:
        words = line.split(" ")
        if len(words) == 3 and words[0].isdecimal() and words[1].isdecimal() and is_pack_name(words[2]):
            return int(words[0]), int(words[1]), words[2]
        raise _not_one(self._name)

    def _opened(self, pack: str) -> int:
        """It may get its last name at any time."""
        if pack not in self._packs:
            try:
                self._packs[pack] = open_file(self._folder / f"{pack}.tmp")
            except MissingPack:
                self._packs[pack] = open_file(self._folder / pack)
        return self._packs[pack]

    def _check(self) -> None:
        """Raises where nothing more is to be expected."""
        now = time.monotonic()
        if self._ended:
            raise StorageFailed("what was to be read did not arrive: the fetch that was to bring it ended before")
        if now - self._news > STALL_S:
            raise StorageFailed(f"what is to be read has not arrived: nothing has for {STALL_S:g} s")
        if now - self._alive > ALIVE_S:
            self._alive = now
            if _is_free(self._file):
                self._ended = True
                self._look()


def _not_one(name: str) -> CorruptBlob:
    return CorruptBlob(f"{name} is not what a fetch writes about what it brings")


def _is_free(file: int) -> bool:
    """Whether nobody writes it any more."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return True


class LandingFolder:
    """All progress files of one folder. See `ReadExtents`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def open_pack(self, name: str) -> LandingPack:
        if not name.startswith(PREFIX):
            raise MissingPack(f"pack {name} is none that is being fetched")
        return LandingPack(_path_of(self._path, name))


def open_landing(address: TierAddress) -> LandingFolder:
    return LandingFolder(Path(os.fsdecode(unquote_to_bytes(address.url.partition("://")[2]))))


def _path_of(packs: Path, pack: str) -> Path:
    """Named as what a writer of packs leaves behind, for it is no pack."""
    return packs / f"{pack}.tmp"
