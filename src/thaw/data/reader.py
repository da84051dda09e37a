"""Reading blobs: straight into the caller's memory, verified, the hash of one overlapped with the read of the next.

Extents are sorted by pack and offset; neighbours (a pad between them at most) come in with one `preadv` of up to
8 MiB. A blob that was returned has been hashed after it entered memory (`disk-verified`).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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

BATCH_BYTES = 8 << 20
IN_FLIGHT = 4
"""Batches read but not yet hashed, at most."""
Target: TypeAlias = "tuple[BlobLocation, memoryview]"
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


def read_header(path: Path, *, short: bool = False) -> PackHeader:
    """The checked header of a pack (`short`: the file may end before its data does).

    Raises `CorruptBlob`, `MissingPack`, `NewerFormat`, `StorageFailed`.
    """
    fd = _open(path)
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
        hashed.drain(0)
    finally:
        hashed.close()
    nbytes = sum(location.nbytes for location, _ in targets)
    return ReadStats(nbytes=nbytes, seconds=time.perf_counter() - began, hash_seconds=hashed.seconds)


def read_blob(folder: Path, location: BlobLocation) -> bytes:
    """One blob's verified bytes. Errors as `read_blobs`."""
    path = folder / check_pack_name(location.pack)
    _check_extent(path, location)
    data = bytearray(location.nbytes)
    read_blobs(folder, [(location, memoryview(data))])
    return bytes(data)


def _checked(location: BlobLocation, target: memoryview | None) -> memoryview | None:
    if location.nbytes <= 0 or location.offset < 0:
        raise CorruptBlob(f"blob {location.blob}: {location.nbytes} bytes at {location.offset} is no place in a pack")
    if target is None:
        return None
    target = target.cast("B")
    if target.readonly or len(target) != location.nbytes:
        kind = "read-only" if target.readonly else "writable"
        raise InvalidRequest(
            f"blob {location.blob} has {location.nbytes} bytes; the target is {kind}, {len(target)} bytes"
        )
    return target


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        text = f"pack {path.name} is missing from {path.parent}. Run `thaw fsck` to see what needs it."
        raise MissingPack(text) from None
    except OSError as error:
        with storage_errors(path, "read"):
            raise error
        raise AssertionError("unreachable") from error


def _check_extent(path: Path, location: BlobLocation) -> None:
    fd = _open(path)
    try:
        _check_size(path, location, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def _check_size(path: Path, location: BlobLocation, nbytes: int) -> None:
    if location.offset + location.nbytes > nbytes:
        raise CorruptBlob(
            f"pack {path.name} has {nbytes} bytes, but blob {location.blob} should end at byte "
            f"{location.offset + location.nbytes}; the pack was cut off. Run `thaw fsck`."
        )


def _read_pack(path: Path, targets: list[Wanted], hashed: _Hashing) -> None:
    fd = _open(path)
    try:
        size = os.fstat(fd).st_size
        for location, _ in targets:
            _check_size(path, location, size)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        for batch in _batches(targets):
            filled = [(place, memoryview(bytearray(place.nbytes)) if to is None else to) for place, to in batch]
            with storage_errors(path, "read"):
                _read_batch(fd, path, filled)
            hashed.submit(filled)
    finally:
        os.close(fd)


def _batches(targets: list[Wanted]) -> Iterator[list[Wanted]]:
    """Runs of targets that lie next to each other: at most a page apart, `BATCH_BYTES` in all, 256 in number."""
    batch: list[Wanted] = []
    total = end = 0
    for location, target in targets:
        near = 0 <= location.offset - end < PAGE
        if batch and not (near and total + location.nbytes <= BATCH_BYTES and len(batch) < 256):
            yield batch
            batch, total = [], 0
        batch.append((location, target))
        total, end = total + location.nbytes, location.offset + location.nbytes
    if batch:
        yield batch


def _read_batch(fd: int, path: Path, batch: list[Target]) -> None:
    """Fills the targets of one run, pads between them into scratch memory."""
    views: list[memoryview] = []
    start = cursor = batch[0][0].offset
    for location, target in batch:
        if location.offset > cursor:
            views.append(memoryview(bytearray(location.offset - cursor)))
        views.append(target)
        cursor = location.offset + location.nbytes
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
    """Verifies batches on two threads, at most `IN_FLIGHT` behind the reader."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(2, thread_name_prefix="thaw-verify")
        self.pending: deque[Future[float]] = deque()
        self.seconds = 0.0

    def submit(self, batch: list[Target]) -> None:
        self.drain(IN_FLIGHT - 1)
        self.pending.append(self.pool.submit(_verify, batch))

    def drain(self, keep: int) -> None:
        while len(self.pending) > keep:
            self.seconds += self.pending.popleft().result()

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)


def _verify(batch: list[Target]) -> float:
    began = time.perf_counter()
    for location, data in batch:
        found = "b3:" + blake3(data).hexdigest()
        if found != location.blob:
            raise CorruptBlob(
                f"pack {location.pack}: blob {location.blob} at byte {location.offset} hashes to {found}; its bytes "
                "were changed after they were written. Run `thaw fsck` to see which snapshots need it."
            )
    return time.perf_counter() - began
