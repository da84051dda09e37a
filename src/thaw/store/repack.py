"""Copying what is alive out of packs that are mostly dead, and many small packs into one.

Only places change, never an id: each blob is verified while it is read, written into a new pack of our own lease, and
the rows are moved in one transaction. The old packs are doomed then, and unlinked when no reader is left.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from thaw.core.errors import CorruptBlob
from thaw.data.header import OBJECT, Entry
from thaw.data.locations import BlobLocation
from thaw.data.pack import PackItem, PackResult, read_header, write_pack
from thaw.store import leases, objects
from thaw.store.home import StoreHome
from thaw.store.objects import PackRow
from thaw.store.scan import PackFiles

DEAD_SHARE = 0.3
"""A pack is rewritten when this frees at least this share of its bytes."""
SMALL_BYTES, SMALL_COUNT = 1 << 20, 64
"""Packs below this size are put together when there are this many."""
GROUP_BYTES, GROUP_ENTRIES = 1 << 30, 1 << 14
"""What one new pack holds at most, about: more entries would make a header that takes long to read."""


def choose(connection: sqlite3.Connection, folder: Path) -> list[list[PackRow]]:
    """Groups of packs of `folder` for gc to copy, each group into one new pack."""
    live = {}
    places = "SELECT pack, nbytes FROM blobs UNION ALL SELECT pack, length(data) FROM objects"
    for pack, num, nbytes in connection.execute(f"SELECT pack, count(*), sum(nbytes) FROM ({places}) GROUP BY pack"):
        live[pack] = (num, nbytes)
    packs = objects.read_packs(connection, "doomed_ns IS NULL")
    small = {pack.name for pack in packs if pack.nbytes < SMALL_BYTES}
    chosen = small if len(small) >= SMALL_COUNT else set()
    chosen |= {pack.name for pack in packs if _is_mostly_dead(pack, *live.get(pack.name, (0, 0)), folder)}
    return grouped((pack, *live.get(pack.name, (0, 0))) for pack in packs if pack.name in chosen)


def _is_mostly_dead(pack: PackRow, num_live: int, live_nbytes: int, folder: Path) -> bool:
    """Whether a copy of the pack's live entries is enough smaller. It has their share of the header and the pads, which
    are most of a pack of small blobs. A header that cannot be read is for the copy to report."""
    least = DEAD_SHARE * pack.nbytes
    if pack.nbytes - live_nbytes < least:
        return False
    try:
        stored = [entry.nbytes for entry in read_header(folder / pack.name).entries if not entry.is_pad]
    except CorruptBlob:
        return True
    overhead = pack.nbytes - sum(stored)
    return pack.nbytes - live_nbytes - overhead * num_live / max(1, len(stored)) >= least


def grouped(packs: Iterable[tuple[PackRow, int, int]]) -> list[list[PackRow]]:
    """(pack, live entries, live bytes) put together, in order, so that no group goes beyond what a pack is to hold."""
    groups: list[list[PackRow]] = []
    total = entries = 0
    for pack, num, nbytes in packs:
        if not groups or total + nbytes > GROUP_BYTES or entries + num > GROUP_ENTRIES:
            groups.append([])
            total = entries = 0
        groups[-1].append(pack)
        total, entries = total + nbytes, entries + num
    return groups


def copy_packs(store: StoreHome, packs: list[PackRow], damaged: list[str]) -> int:
    """Copies what is alive in `packs` into one new pack; returns how many were doomed. Damaged ones are left alone."""
    name = leases.new_pack_name()
    with store.database.write(durable=False) as connection:
        lease = leases.take(connection, "write", [name])
    try:
        copied, entries = _copyable(store, packs, damaged)
        if not copied:
            return 0
        result = _copy(store, name, entries)
        with store.database.write() as connection:
            _move_rows(connection, entries, result)
            emptied = [pack for pack in copied if not objects.is_used(connection, pack.name)]
            objects.doom_packs(connection, emptied, time.time_ns())
            leases.release(connection, lease)
        return len(emptied)
    finally:
        with store.database.write(durable=False) as connection:
            leases.release(connection, lease)


def _copyable(store: StoreHome, packs: list[PackRow], damaged: list[str]) -> tuple[list[PackRow], list[BlobOf]]:
    """The packs whose live entries all verify, and those entries. A pack that does not is added to `damaged`."""
    good: list[PackRow] = []
    entries: list[BlobOf] = []
    with PackFiles(store.packs) as files:
        for pack in packs:
            try:
                alive = _alive(store, pack.name)
                for entry in alive:
                    what = files.damage(pack.name, entry)
                    if what:
                        raise CorruptBlob(f"pack {pack.name}: {what}")
            except CorruptBlob:
                damaged.append(pack.name)
                continue
            good.append(pack)
            entries.extend((pack.name, entry) for entry in alive)
    return good, entries


BlobOf = tuple[str, Entry]
"""An entry and the pack that it is in."""


def _alive(store: StoreHome, pack: str) -> list[Entry]:
    """The entries of `pack` that rows point at: the index of packs must know all of them, and no others."""
    header = read_header(store.packs / pack)
    with store.database.read() as connection:
        rows = connection.execute("SELECT start, id FROM blobs WHERE pack = ?", (pack,)).fetchall()
        rows += connection.execute("SELECT start, id FROM objects WHERE pack = ?", (pack,)).fetchall()
        alive = [entry for entry in header.entries if not entry.is_pad and _lies_in(connection, pack, entry)]
    if {(entry.offset, entry.id) for entry in alive} != set(rows):
        raise CorruptBlob(f"pack {pack}: database and header do not agree about what it holds. Run `thaw fsck`.")
    return alive


def _lies_in(connection: sqlite3.Connection, pack: str, entry: Entry) -> bool:
    table = "objects" if entry.is_object else "blobs"
    row = connection.execute(f"SELECT pack, start FROM {table} WHERE id = ?", (entry.id,)).fetchone()
    return bool(row == (pack, entry.offset))


def _copy(store: StoreHome, name: str, entries: list[BlobOf]) -> PackResult | None:
    """Writes the entries into a new pack; what was written is what they are named by."""
    if not entries:
        return None
    with PackFiles(store.packs) as files:
        items = [
            PackItem(
                OBJECT if e.is_object else "", e.dtype, e.shape, e.nbytes, partial(files.read, pack, e.offset, e.nbytes)
            )
            for pack, e in entries
        ]
        result = write_pack(store.packs, name, items, metadata={"thaw.store": store.uuid})
    for (pack, entry), place in zip(entries, result.blobs, strict=True):
        if place.blob != entry.id:
            raise CorruptBlob(f"pack {pack}: {entry.id} changed while it was copied. Run `thaw fsck`.")
    return result


def _move_rows(connection: sqlite3.Connection, entries: list[BlobOf], result: PackResult | None) -> None:
    if result is None:
        return
    objects.insert_pack(connection, result.name, result.nbytes)
    moves: dict[bool, list[tuple[BlobLocation, str]]] = {False: [], True: []}
    for (pack, entry), place in zip(entries, result.blobs, strict=True):
        moves[entry.is_object].append((place, pack))
    objects.move_blobs(connection, moves[False])
    objects.move_objects(connection, moves[True])
