"""Writing a pack: one pass over the items, one item in memory, hashing hidden behind the I/O.

Ids have a fixed length, so the header's room is known before the first byte is hashed: data is written first, while
another thread hashes the same buffer; the header comes last. Content that occurs twice is stored once (the second
copy is overwritten by what follows it).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from thaw.core.errors import InvalidRequest
from thaw.core.ids import digest
from thaw.data.header import DTYPE_BYTES, OBJECT, Entry, align, build, reserve, tensor_nbytes
from thaw.data.locations import BlobLocation, is_pack_name
from thaw.data.tiers.base import NewPack, WritePack
from thaw.data.tiers.folder import Folder

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

Buffer: TypeAlias = "bytes | bytearray | memoryview"
HASH_APART = 64 * 1024
"""Items of at least this size are hashed on another thread; below, handing over costs more than it hides."""


@dataclass(frozen=True)
class PackItem:
    """A tensor to write. `name_prefix` is "" for a blob and "object " for an object; the id follows.

    `read` is called once, in order, on the writing thread, and returns `nbytes` contiguous bytes; they must not change
    until the next `read` is called (or `write_pack` returns), and may be reused from then on.
    """

    name_prefix: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], Buffer]


@dataclass(frozen=True)
class PackResult:
    """A pack on disk. `blobs` is in item order (equal content has equal locations); `stages_s`: `write`, `sync`."""

    name: str
    nbytes: int
    blobs: tuple[BlobLocation, ...]
    stages_s: dict[str, float]


def check_pack_name(name: str) -> str:
    """`name` if it names a pack: a plain file name, so that no path comes from outside."""
    if not is_pack_name(name):
        raise InvalidRequest(f"{name[:80]!r} is not the name of a pack: letters, digits, '_', '-', then '.safetensors'")
    return name


def write_pack(
    packs: Path | WritePack, name: str, items: Sequence[PackItem], *, metadata: Mapping[str, str] | None = None
) -> PackResult:
    """Writes `items` into the pack `name` of a folder, a tier or a mount, atomically: on return the pack is durable
    there; on any error nothing is left.

    Memory: one item. Raises `StorageFailed`, and whatever an item's `read` raises.
    """
    check_pack_name(name)
    for item in items:
        _check(item)
    began = time.perf_counter()
    tier = Folder(packs) if isinstance(packs, Path) else packs
    with tier.new_pack(name) as pack:
        room = reserve([(item.name_prefix, item.dtype, item.shape, item.nbytes) for item in items], metadata or {})
        writer = _Writer(pack, name, room)
        from concurrent.futures import ThreadPoolExecutor  # brings logging along: only for those who write

        with ThreadPoolExecutor(1, thread_name_prefix="thaw-hash") as hasher:
            blobs = tuple(writer.add(item, hasher) for item in items)
        nbytes = writer.finish(metadata or {})
        written = time.perf_counter()
    stages = {"write": written - began, "sync": time.perf_counter() - written}
    return PackResult(name=name, nbytes=nbytes, blobs=blobs, stages_s=stages)


def _check(item: PackItem) -> None:
    if item.name_prefix not in ("", OBJECT):
        raise InvalidRequest(f"name_prefix {item.name_prefix!r}: '' for a blob, {OBJECT!r} for an object")
    if item.dtype not in DTYPE_BYTES:
        raise InvalidRequest(f"dtype {item.dtype!r}: a pack holds {', '.join(DTYPE_BYTES)}")
    if tensor_nbytes(item.dtype, item.shape) != item.nbytes or item.nbytes <= 0:
        raise InvalidRequest(f"nbytes {item.nbytes}: dtype {item.dtype} and shape {list(item.shape)} say otherwise")


class _Writer:
    """The growing pack: entries in file order from `data_start`, without holes."""

    def __init__(self, pack: NewPack, name: str, data_start: int) -> None:
        self.pack, self.name, self.data_start = pack, name, data_start
        self.cursor = data_start
        self.entries: list[Entry] = []
        self.seen: dict[tuple[str, str], BlobLocation] = {}

    def add(self, item: PackItem, hasher: ThreadPoolExecutor) -> BlobLocation:
        data = memoryview(item.read()).cast("B")
        if len(data) != item.nbytes:
            raise InvalidRequest(f"an item announced as {item.nbytes} bytes was read as {len(data)}")
        offset = align(self.cursor, item.nbytes)
        if len(data) >= HASH_APART:
            hashing = hasher.submit(digest, data)
            try:
                self.pack.write(data, offset)
            finally:
                identifier = hashing.result()
        else:
            self.pack.write(data, offset)
            identifier = digest(data)
        known = self.seen.get((item.name_prefix, identifier))
        return known or self._keep(item, identifier, offset)

    def _keep(self, item: PackItem, identifier: str, offset: int) -> BlobLocation:
        if offset > self.cursor:
            self._pad(offset - self.cursor)
        self.entries.append(
            Entry(
                id=identifier, is_object=item.name_prefix == OBJECT, offset=offset, nbytes=item.nbytes,
                dtype=item.dtype, shape=item.shape,
            )
        )  # fmt: skip
        self.cursor = offset + item.nbytes
        location = BlobLocation(blob=identifier, pack=self.name, offset=offset, nbytes=item.nbytes)
        self.seen[item.name_prefix, identifier] = location
        return location

    def _pad(self, nbytes: int) -> None:
        self.pack.write(memoryview(bytes(nbytes)), self.cursor)
        self.entries.append(
            Entry(id="", is_object=False, offset=self.cursor, nbytes=nbytes, dtype="U8", shape=(nbytes,))
        )

    def finish(self, metadata: Mapping[str, str]) -> int:
        """Writes the header; returns the pack's size."""
        self.pack.write(memoryview(build(self.entries, self.data_start, metadata)), 0)
        self.pack.end(self.cursor)
        return self.cursor
