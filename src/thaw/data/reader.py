"""Reading blobs: straight into the caller's memory, verified, the hash of one overlapped with the read of the next.

Extents are sorted by pack and offset, large blobs read in pieces, small neighbours together, as the tier is read best
(`tiers.base.Requests`); a tier that takes several requests at a time gets them ahead of the hashing, which goes in
order. A blob that was returned has been hashed after it entered memory (`disk-verified`).
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

from blake3 import blake3

from thaw.core.errors import CorruptBlob, InvalidRequest
from thaw.data.files import storage_errors
from thaw.data.header import PackHeader, header_length, parse
from thaw.data.locations import BlobLocation
from thaw.data.tiers.base import OpenPack, ReadExtents, Requests
from thaw.data.tiers.folder import Folder, open_file
from thaw.data.writer import check_pack_name

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

IN_FLIGHT = 16
"""Batches read but not yet hashed, at most."""
BATCH = 256
"""Pieces that are read by one request, at most: the kernel takes 1,024 at a time, pads among them."""
MAX_THREADS = 64
"""Requests under way at a time, at most."""
Wanted: TypeAlias = "tuple[BlobLocation, memoryview | None]"


@dataclass(frozen=True)
class ReadStats:
    """What a read took. `hash_seconds` is thread time, most of it behind the reads."""

    nbytes: int
    seconds: float
    hash_seconds: float


@dataclass(frozen=True)
class _Piece:
    """Bytes [begin, begin + len(view)) of a blob, to be read into `view`."""

    location: BlobLocation
    begin: int
    view: memoryview

    @property
    def offset(self) -> int:
        return self.location.offset + self.begin

    @property
    def is_last(self) -> bool:
        return self.begin + len(self.view) == self.location.nbytes


def read_header(path: Path, *, short: bool = False) -> PackHeader:
    """The checked header of a pack (`short`: the file may end before its data does).

    Raises `CorruptBlob`, `MissingPack`, `NewerFormat`, `StorageFailed`.
    """
    fd = open_file(path)
    try:
        with storage_errors(path, "read"):
            nbytes = os.fstat(fd).st_size
            length = header_length(os.pread(fd, 8, 0), nbytes, f"pack {path.name}")
            whole = os.pread(fd, length, 0)
    finally:
        os.close(fd)
    return parse(whole, nbytes, f"pack {path.name}", short=short)


def read_blobs(packs: Path | ReadExtents, wanted: Sequence[Wanted]) -> ReadStats:
    """Reads each blob into its writable memoryview of exactly `nbytes` (None: only verify it). Any order, any packs of
    a folder, a tier or a mount.

    On return every blob has the hash that names it. On an error the memory holds anything. Raises `CorruptBlob`
    naming pack and blob, `MissingPack`, `StorageFailed`.
    """
    began = time.perf_counter()
    tier = Folder(packs) if isinstance(packs, Path) else packs
    targets = [(location, _checked(location, target)) for location, target in wanted]
    targets.sort(key=lambda pair: (pair[0].pack, pair[0].offset))
    hashed = _Hashing()
    try:
        with _Reading(hashed) as reading:
            for name, group in groupby(targets, key=lambda pair: pair[0].pack):
                reading.read(tier.open_pack(check_pack_name(name)), name, list(group))
        hashed.finish()
    finally:
        hashed.close()
    nbytes = sum(location.nbytes for location, _ in targets)
    return ReadStats(nbytes=nbytes, seconds=time.perf_counter() - began, hash_seconds=hashed.seconds)


def read_blob(packs: Path | ReadExtents, location: BlobLocation) -> bytes:
    """One blob's verified bytes. Errors as `read_blobs`."""
    tier = Folder(packs) if isinstance(packs, Path) else packs
    _check_fits(tier, location)
    data = bytearray(location.nbytes)
    read_blobs(tier, [(location, memoryview(data))])
    return bytes(data)


def check_place(location: BlobLocation) -> None:
    """Raises `CorruptBlob` unless it could lie in some pack."""
    if location.nbytes <= 0 or location.offset < 0:
        raise CorruptBlob(f"blob {location.blob}: {location.nbytes} bytes at {location.offset} is no place in a pack")


def _checked(location: BlobLocation, target: memoryview | None) -> memoryview | None:
    check_place(location)
    if target is None:
        return None
    target = target.cast("B")
    if target.readonly or len(target) != location.nbytes:
        kind = "read-only" if target.readonly else "writable"
        raise InvalidRequest(
            f"blob {location.blob} has {location.nbytes} bytes; the target is {kind}, {len(target)} bytes"
        )
    return target


def _check_fits(tier: ReadExtents, location: BlobLocation) -> None:
    """Before memory is taken for it."""
    pack = tier.open_pack(check_pack_name(location.pack))
    try:
        check_extent(location, pack.nbytes)
    finally:
        pack.close()


def check_extent(location: BlobLocation, nbytes: int) -> None:
    """Raises `CorruptBlob` where the blob would end behind its pack's `nbytes`."""
    if location.offset + location.nbytes > nbytes:
        raise CorruptBlob(
            f"pack {location.pack} has {nbytes} bytes, but blob {location.blob} should end at byte "
            f"{location.offset + location.nbytes}; the pack was cut off. Run `thaw fsck`."
        )


class _Reading:
    """Batches are read and handed on to be hashed, in order. Nothing is read any more when the block has ended."""

    def __init__(self, hashed: _Hashing) -> None:
        self._hashed = hashed
        self._under_way: deque[tuple[list[_Piece], Future[None]]] = deque()
        self._threads: ThreadPoolExecutor | None = None
        self._open: list[OpenPack] = []

    def read(self, pack: OpenPack, name: str, targets: list[Wanted]) -> None:
        """All targets of one pack; where it takes several requests at a time, some are under way on return."""
        self._open.append(pack)
        for location, _ in targets:
            check_extent(location, pack.nbytes)
        ahead = max(1, min(pack.requests.num_parallel, MAX_THREADS))
        for batch in _batches(targets, pack.requests):
            self._land(ahead - 1)
            if ahead > 1:
                self._under_way.append((batch, self._started().submit(_read_batch, pack, batch)))
            else:
                _read_batch(pack, batch)
                self._hashed.submit(batch)
        if not self._under_way:
            self._open.pop().close()

    def _land(self, left: int) -> None:
        """Wait until at most `left` requests are under way."""
        while len(self._under_way) > left:
            batch, done = self._under_way.popleft()
            try:
                done.result()
            finally:
                del done  # its error's frames would hold it, and it the error: memory for the collector
            self._hashed.submit(batch)

    def _started(self) -> ThreadPoolExecutor:
        if self._threads is None:
            from concurrent.futures import ThreadPoolExecutor  # brings logging along: only where it is needed

            self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="thaw-read")
        return self._threads

    def __enter__(self) -> _Reading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._land(0)
        finally:
            if self._threads is not None:
                self._threads.shutdown(cancel_futures=True)
            while self._open:
                self._open.pop().close()


def _pieces(targets: list[Wanted], most: int) -> Iterator[_Piece]:
    """The targets cut into pieces of `most` bytes, in file order. Those that are only verified get memory for one piece
    at a time."""
    for location, target in targets:
        for begin in range(0, location.nbytes, most):
            nbytes = min(most, location.nbytes - begin)
            view = memoryview(bytearray(nbytes)) if target is None else target[begin : begin + nbytes]
            yield _Piece(location, begin, view)


def _batches(targets: list[Wanted], requests: Requests) -> Iterator[list[_Piece]]:
    """Runs of pieces that lie near each other, `requests.nbytes` in all and `BATCH` in number."""
    batch: list[_Piece] = []
    end = 0
    for piece in _pieces(targets, requests.nbytes):
        near, stop = 0 <= piece.offset - end <= requests.gap_nbytes, piece.offset + len(piece.view)
        if batch and not (near and stop - batch[0].offset <= requests.nbytes and len(batch) < BATCH):
            yield batch
            batch = []
        batch.append(piece)
        end = stop
    if batch:
        yield batch


def _read_batch(pack: OpenPack, batch: list[_Piece]) -> None:
    read_run(pack, [(piece.offset, piece.view) for piece in batch])


def read_run(pack: OpenPack, run: Sequence[tuple[int, memoryview]]) -> None:
    """Fills views that begin at these growing offsets by one request; what lies between goes into scratch memory."""
    views: list[memoryview] = []
    cursor = run[0][0]
    for offset, view in run:
        if offset > cursor:
            views.append(memoryview(bytearray(offset - cursor)))
        views.append(view)
        cursor = offset + len(view)
    pack.read_into(views, run[0][0])


class _Hashing:
    """Hashes pieces in order on a thread of its own, at most `IN_FLIGHT` behind; the first failure is raised."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._hasher = blake3()
        self._error: BaseException | None = None
        self._room = threading.Semaphore(IN_FLIGHT)
        self._queue: queue.SimpleQueue[list[_Piece] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="thaw-verify", daemon=True)
        self._thread.start()

    def submit(self, batch: list[_Piece]) -> None:
        self._room.acquire()
        if self._error is not None:
            raise self._error
        self._queue.put(batch)

    def finish(self) -> None:
        """Waits for everything submitted; raises what went wrong."""
        self.close()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._verify(batch)
            except BaseException as error:  # noqa: BLE001 - raised again on the caller's thread
                self._error = error
            del batch
            self._room.release()

    def _verify(self, batch: list[_Piece]) -> None:
        began = time.perf_counter()
        for piece in batch:
            if piece.begin == 0:
                self._hasher = blake3()
            self._hasher.update(piece.view)
            if piece.is_last:
                compare(piece.location, "b3:" + self._hasher.hexdigest())
        self.seconds += time.perf_counter() - began


def compare(location: BlobLocation, found: str) -> None:
    """Raises `CorruptBlob` unless `found` is the blob's name."""
    if found != location.blob:
        raise CorruptBlob(
            f"pack {location.pack}: blob {location.blob} at byte {location.offset} hashes to {found}; its bytes "
            "were changed after they were written. Run `thaw fsck` to see which snapshots need it."
        )
