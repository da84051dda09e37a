"""Reading many blobs on many threads: each is read into scratch memory, hashed there and handed on, still in cache.

For readers that lay the bytes out anew (an engine's arena): no blob is ever held whole beside its destination, and
scratch is one blob for each thread. `read_blobs` is for those whose memory the bytes go into as they are.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from thaw.core.errors import CorruptBlob
from thaw.core.ids import digest
from thaw.data.files import storage_errors
from thaw.data.locations import BlobLocation
from thaw.data.reader import ReadStats, check_extent, check_place, compare, open_pack
from thaw.data.writer import check_pack_name

Use = Callable[[int, memoryview], None]
"""Blob number i of those asked for, and its verified bytes: valid during the call, which is made on any thread."""


def stream_blobs(folder: Path, locations: Sequence[BlobLocation], use: Use, *, threads: int) -> ReadStats:
    """Calls `use` once for each blob, in about the order they lie on disk, on up to `threads` threads at a time.

    Nothing is handed on that does not hash to its name. Raises `CorruptBlob` naming pack and blob, `MissingPack`,
    `StorageFailed`, and what `use` raises; then some were handed on and the others never are.
    """
    from concurrent.futures import ThreadPoolExecutor  # brings logging along: only for those who read

    began = time.perf_counter()
    with _Packs(folder, locations) as packs:
        order = _Shared(sorted(range(len(locations)), key=lambda i: (locations[i].pack, locations[i].offset)))
        count = max(1, min(threads, len(locations)))
        with ThreadPoolExecutor(count, thread_name_prefix="thaw-read") as pool:
            # By `map`, for it lets go of each future: one that is still in a frame that its own error went through
            # would hold that frame, and the caller's memory with it, until Python's collector comes by.
            spent = list(pool.map(partial(_work, packs, locations, use), [order] * count))
    nbytes = sum(location.nbytes for location in locations)
    return ReadStats(nbytes=nbytes, seconds=time.perf_counter() - began, hash_seconds=sum(spent))


def _work(packs: _Packs, locations: Sequence[BlobLocation], use: Use, order: _Shared) -> float:
    """One thread's part; the seconds it hashed. Whoever fails ends the others too."""
    hashed, scratch = 0.0, bytearray()
    try:
        for i in order:
            location = locations[i]
            if len(scratch) < location.nbytes:
                scratch = bytearray(location.nbytes)
            view = memoryview(scratch)[: location.nbytes]
            packs.read(location, view)
            began = time.perf_counter()
            compare(location, digest(view))
            hashed += time.perf_counter() - began
            use(i, view)
    except BaseException:
        order.stop()
        raise
    return hashed


class _Shared:
    """Numbers that several threads take turns to draw, until one of them stops it."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers, self._lock = iter(numbers), threading.Lock()

    def __iter__(self) -> Iterator[int]:
        while (number := self._next()) is not None:
            yield number

    def _next(self) -> int | None:
        with self._lock:
            return next(self._numbers, None)

    def stop(self) -> None:
        with self._lock:
            self._numbers = iter(())


class _Packs:
    """The packs' files, open and checked to be long enough."""

    def __init__(self, folder: Path, locations: Sequence[BlobLocation]) -> None:
        self._folder, self._fds = folder, dict[str, int]()
        try:
            for location in locations:
                check_place(location)
                check_extent(self._path(location.pack), location, os.fstat(self._fd(location.pack)).st_size)
        except BaseException:
            self.close()
            raise

    def _path(self, pack: str) -> Path:
        return self._folder / check_pack_name(pack)

    def _fd(self, pack: str) -> int:
        if pack not in self._fds:
            self._fds[pack] = open_pack(self._path(pack))
        return self._fds[pack]

    def read(self, location: BlobLocation, view: memoryview) -> None:
        path, at = self._path(location.pack), 0
        while at < len(view):
            with storage_errors(path, "read"):
                got = os.preadv(self._fds[location.pack], [view[at:]], location.offset + at)
            if got == 0:
                raise CorruptBlob(
                    f"pack {path.name} ended at byte {location.offset + at} while being read: cut off. Run `thaw fsck`."
                )
            at += got

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __enter__(self) -> _Packs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
