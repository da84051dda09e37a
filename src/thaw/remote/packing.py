"""Packs for a remote: what goes into each, and its bytes, made one pack at a time.

A pack's header names everything in it by hash, so the header's own hash names the pack, before a byte of KV is read.
The same objects and blobs in the same order make the same pack: what an interrupted push sent, the next one finds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from thaw.core.ids import digest
from thaw.data.header import OBJECT, Entry, align, build, reserve
from thaw.data.locations import BlobLocation
from thaw.data.pack import read_blobs, read_header
from thaw.store import Store

PACK_BYTES = 64 << 20
"""Of one pack, about: a blob is never cut, so one that is larger has a pack of its own."""
PACK_ENTRIES = 1 << 14


class PackMember(NamedTuple):
    """One thing to pack: an object or a blob."""

    id: str
    is_object: bool
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


class PlannedPack(NamedTuple):
    """A pack that can be made: its header's bytes, and where each thing lies."""

    digest: str
    header: bytes
    nbytes: int
    entries: tuple[Entry, ...]


def plan(things: Sequence[PackMember]) -> PlannedPack:
    start = reserve([(OBJECT if one.is_object else "", one.dtype, one.shape, one.nbytes) for one in things], {})
    entries: list[Entry] = []
    cursor = start
    for one in things:
        offset = align(cursor, one.nbytes)
        if offset > cursor:
            pad = offset - cursor
            entries.append(Entry(id="", is_object=False, offset=cursor, nbytes=pad, dtype="U8", shape=(pad,)))
        entries.append(
            Entry(
                id=one.id, is_object=one.is_object, offset=offset, nbytes=one.nbytes, dtype=one.dtype, shape=one.shape
            )
        )
        cursor = offset + one.nbytes
    header = build(entries, start, {})
    return PlannedPack(digest(header), header, cursor, tuple(entries))


def split(things: Sequence[PackMember], pack_bytes: int = PACK_BYTES) -> list[list[PackMember]]:
    """The things in order, cut where a pack is full."""
    groups: list[list[PackMember]] = []
    room = entries = 0
    for one in things:
        if not groups or one.nbytes > room or entries >= PACK_ENTRIES:
            groups.append([])
            room, entries = pack_bytes, 0
        groups[-1].append(one)
        room, entries = room - one.nbytes, entries + 1
    return groups


def make(pack: PlannedPack, store: Store, places: dict[str, BlobLocation], data: Callable[[str], bytes]) -> bytearray:
    """The pack's bytes. Every blob is hashed after it was read, every object before. Raises `CorruptBlob`,
    `MissingPack`."""
    whole = bytearray(pack.nbytes)
    whole[: len(pack.header)] = pack.header
    view = memoryview(whole)
    wanted = []
    for entry in pack.entries:
        target = view[entry.offset : entry.offset + entry.nbytes]
        if entry.is_object:
            target[:] = data(entry.id)
        elif not entry.is_pad:
            wanted.append((places[entry.id], target))
    read_blobs(store.packs, wanted)
    return whole


class Tensors:
    """As which tensors blobs stand in local packs."""

    def __init__(self, store: Store) -> None:
        self._read = lru_cache(maxsize=4)(lambda pack: _tensors(store, pack))

    def of(self, place: BlobLocation) -> PackMember:
        dtype, shape = self._read(place.pack).get(place.blob, ("U8", (place.nbytes,)))
        return PackMember(place.blob, False, place.nbytes, dtype, shape)


def _tensors(store: Store, pack: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    header = read_header(store.packs / pack)
    return {entry.id: (entry.dtype, entry.shape) for entry in header.entries if entry.id and not entry.is_object}
