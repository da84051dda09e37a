"""Reading blobs: straight into the caller's memory, verified, the hash of one overlapped with the read of the next.

Extents are sorted by pack and offset, large blobs read in pieces, small neighbours (a pad between them at most)
together. A blob that was returned has been hashed after it entered memory (`disk-verified`).
"""

from __future__ import annotations

import os
import queue
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypeAlias

from blake3 import blake3

from thaw.core.errors import CorruptBlob, InvalidRequest
from thaw.data.files import storage_errors
from thaw.data.header import PAGE, PackHeader, header_length, parse
from thaw.data.locations import BlobLocation
from thaw.data.writer import check_pack_name

PIECE_BYTES = 512 << 10
"""What is read and hashed at a time: it is still in the processor's cache when it is hashed."""
IN_FLIGHT = 16
"""Pieces read but not yet hashed, at most."""
Wanted: TypeAlias = "tuple[BlobLocation, memoryview | None]"


class MissingPack(CorruptBlob):
    """The pack is gone: lost, or moved by gc. Look the blob up again; if it still lies there, it is lost."""

    kind = "missing-pack"


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
    fd = open_pack(path)
    try:
        with storage_errors(path, "read"):
            nbytes = os.fstat(fd).st_size
            length = header_length(os.pread(fd, 8, 0), nbytes, f"pack {path.name}")
            whole = os.pread(fd, length, 0)
    finally:
        os.close(fd)
    return parse(whole, nbytes, f"pack {path.name}", short=short)


def read_blobs(folder: Path, wanted: Sequence[Wanted]) -> ReadStats:
    """Reads each blob into its writable memoryview of exactly `nbytes` (None: only verify it). Any order, any packs.

    On return every blob has the hash that names it. On an error the memory holds anything. Raises `CorruptBlob`
    naming pack and blob, `MissingPack`, `StorageFailed`.
    """
    began = time.perf_counter()
    targets = [(location, _checked(location, target)) for location, target in wanted]
    targets.sort(key=lambda pair: (pair[0].pack, pair[0].offset))
    hashed = _Hashing()
    try:
        for pack, group in groupby(targets, key=lambda pair: pair[0].pack):
            _read_pack(folder / check_pack_name(pack), list(group), hashed)
        hashed.finish()
    finally:
        hashed.close()
    nbytes = sum(location.nbytes for location, _ in targets)
    return ReadStats(nbytes=nbytes, seconds=time.perf_counter() - began, hash_seconds=hashed.seconds)


def read_blob(folder: Path, location: BlobLocation) -> bytes:
    """One blob's verified bytes. Errors as `read_blobs`."""
    path = folder / check_pack_name(location.pack)
    _check_fits(path, location)
    data = bytearray(location.nbytes)
    read_blobs(folder, [(location, memoryview(data))])
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


def open_pack(path: Path) -> int:
    """A file descriptor. Raises `MissingPack`, `StorageFailed`, and `CorruptBlob` for what is no file."""
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


def _check_fits(path: Path, location: BlobLocation) -> None:
    fd = open_pack(path)
    try:
        check_extent(path, location, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def check_extent(path: Path, location: BlobLocation, nbytes: int) -> None:
    """Raises `CorruptBlob` where the blob would end behind the pack's `nbytes`."""
    if location.offset + location.nbytes > nbytes:
        raise CorruptBlob(
            f"pack {path.name} has {nbytes} bytes, but blob {location.blob} should end at byte "
            f"{location.offset + location.nbytes}; the pack was cut off. Run `thaw fsck`."
        )


def _read_pack(path: Path, targets: list[Wanted], hashed: _Hashing) -> None:
    fd = open_pack(path)
    try:
        size = os.fstat(fd).st_size
        for location, _ in targets:
            check_extent(path, location, size)
        for batch in _batches(targets):
            with storage_errors(path, "read"):
                _read_batch(fd, path, batch)
            hashed.submit(batch)
    finally:
        os.close(fd)


def _pieces(targets: list[Wanted]) -> Iterator[_Piece]:
    """The targets cut into pieces, in file order. Those that are only verified get memory for one piece at a time."""
    for location, target in targets:
        for begin in range(0, location.nbytes, PIECE_BYTES):
            nbytes = min(PIECE_BYTES, location.nbytes - begin)
            view = memoryview(bytearray(nbytes)) if target is None else target[begin : begin + nbytes]
            yield _Piece(location, begin, view)


def _batches(targets: list[Wanted]) -> Iterator[list[_Piece]]:
    """Runs of pieces that lie next to each other: at most a page apart, `PIECE_BYTES` in all, 256 in number."""
    batch: list[_Piece] = []
    total = end = 0
    for piece in _pieces(targets):
        near = 0 <= piece.offset - end < PAGE
        if batch and not (near and total + len(piece.view) <= PIECE_BYTES and len(batch) < 256):
            yield batch
            batch, total = [], 0
        batch.append(piece)
        total, end = total + len(piece.view), piece.offset + len(piece.view)
    if batch:
        yield batch


def _read_batch(fd: int, path: Path, batch: list[_Piece]) -> None:
    """Fills the pieces of one run, pads between them into scratch memory."""
    views: list[memoryview] = []
    start = cursor = batch[0].offset
    for piece in batch:
        if piece.offset > cursor:
            views.append(memoryview(bytearray(piece.offset - cursor)))
        views.append(piece.view)
        cursor = piece.offset + len(piece.view)
    while views:
        got = os.preadv(fd, views, start)
        if got == 0:
            raise CorruptBlob(f"pack {path.name} ended at byte {start} while being read: cut off. Run `thaw fsck`.")
        start += got
        while views and got >= len(views[0]):
            got -= len(views.pop(0))
        if got:
            views[0] = views[0][got:]


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
