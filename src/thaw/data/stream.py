"""Reading many blobs on many threads: each is read into scratch memory, hashed there and handed on, still in cache.

For readers that rearrange the bytes (an engine's arena): no blob is ever held whole beside its destination, and
scratch is one request for each thread (a blob, or small neighbours). `read_blobs` is for those whose memory the bytes
go into as they are.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from thaw.core.ids import digest
from thaw.data.locations import BlobLocation
from thaw.data.reader import BATCH, MAX_THREADS, ReadStats, check_extent, check_place, compare, read_run
from thaw.data.tiers.base import OpenPack, ReadExtents, Requests
from thaw.data.tiers.folder import Folder
from thaw.data.writer import check_pack_name

Use = Callable[[int, memoryview], None]
"""Blob number i of those asked for, and its verified bytes: valid during the call, which is made on any thread."""


def stream_blobs(packs: Path | ReadExtents, locations: Sequence[BlobLocation], use: Use, *, threads: int) -> ReadStats:
    """Calls `use` once for each blob, in about the order they lie in their packs, on up to `threads` threads at a time:
    more where the tier takes more requests than that.

    Nothing is handed on that does not hash to its name. Raises `CorruptBlob` naming pack and blob, `MissingPack`,
    `StorageFailed`, and what `use` raises; then some were handed on and the others never are.
    """
    from concurrent.futures import ThreadPoolExecutor  # brings logging along: only for those who read

    began = time.perf_counter()
    with _Packs(Folder(packs) if isinstance(packs, Path) else packs, locations) as opened:
        order = _Shared(_runs(locations, opened))
        count = max(1, min(max(threads, opened.num_parallel), len(order)))
        with ThreadPoolExecutor(count, thread_name_prefix="thaw-read") as pool:
            # By `map`, for it releases each future: one that is still in a frame that its own error went through
            # would hold that frame, and the caller's memory with it, until Python's collector comes by.
            spent = list(pool.map(partial(_work, opened, locations, use), [order] * count))
    nbytes = sum(location.nbytes for location in locations)
    return ReadStats(nbytes=nbytes, seconds=time.perf_counter() - began, hash_seconds=sum(spent))


def _runs(locations: Sequence[BlobLocation], packs: _Packs) -> list[list[int]]:
    """Numbers of blobs in the order they lie in; those that lie near each other, and are small, together."""
    runs: list[list[int]] = []
    pack, begin, end = "", 0, 0
    for i in sorted(range(len(locations)), key=lambda i: (locations[i].pack, locations[i].offset)):
        one, requests = locations[i], packs.requests(locations[i].pack)
        near = one.pack == pack and 0 <= one.offset - end <= requests.gap_nbytes
        if not (near and one.offset + one.nbytes - begin <= requests.nbytes and len(runs[-1]) < BATCH):
            runs.append([])
            begin = one.offset
        runs[-1].append(i)
        pack, end = one.pack, one.offset + one.nbytes
    return runs


def _work(packs: _Packs, locations: Sequence[BlobLocation], use: Use, order: _Shared) -> float:
    """One thread's part; the seconds it hashed. Whoever fails ends the others too."""
    hashed, scratch = 0.0, bytearray()
    try:
        for run in order:
            nbytes = sum(locations[i].nbytes for i in run)
            if len(scratch) < nbytes:
                scratch = bytearray(nbytes)
            for i, view in packs.read(run, memoryview(scratch)):
                location = locations[i]
                began = time.perf_counter()
                compare(location, digest(view))
                hashed += time.perf_counter() - began
                use(i, view)
    except BaseException:
        order.stop()
        raise
    return hashed


class _Shared:
    """Runs that several threads take turns to draw, until one of them stops it."""

    def __init__(self, runs: Sequence[list[int]]) -> None:
        self._count, self._runs, self._lock = len(runs), iter(runs), threading.Lock()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        while (run := self._next()) is not None:
            yield run

    def _next(self) -> list[int] | None:
        with self._lock:
            return next(self._runs, None)

    def stop(self) -> None:
        with self._lock:
            self._runs = iter(())


class _Packs:
    """The blobs' packs, open and checked to be long enough."""

    def __init__(self, tier: ReadExtents, locations: Sequence[BlobLocation]) -> None:
        self._tier, self._locations, self._packs = tier, locations, dict[str, OpenPack]()
        try:
            for location in locations:
                check_place(location)
                check_extent(location, self._opened(location.pack).nbytes)
        except BaseException:
            self.close()
            raise

    def _opened(self, name: str) -> OpenPack:
        if name not in self._packs:
            self._packs[name] = self._tier.open_pack(check_pack_name(name))
        return self._packs[name]

    def requests(self, name: str) -> Requests:
        return self._packs[name].requests

    @property
    def num_parallel(self) -> int:
        """Requests that the tiers of these packs take at a time."""
        return min(MAX_THREADS, max((pack.requests.num_parallel for pack in self._packs.values()), default=1))

    def read(self, run: Sequence[int], scratch: memoryview) -> list[tuple[int, memoryview]]:
        """Each blob of a run, by its number, with its bytes, which are not verified yet."""
        views, at = list[memoryview](), 0
        for i in run:
            views.append(scratch[at : at + self._locations[i].nbytes])
            at += self._locations[i].nbytes
        places = [(self._locations[i].offset, view) for i, view in zip(run, views, strict=True)]
        read_run(self._packs[self._locations[run[0]].pack], places)
        return list(zip(run, views, strict=True))

    def close(self) -> None:
        while self._packs:
            self._packs.popitem()[1].close()

    def __enter__(self) -> _Packs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
