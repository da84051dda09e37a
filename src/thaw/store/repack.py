"""Copying what is alive out of packs that are mostly dead, and many small packs into one.

Only places change, never an id: each blob is verified while it is read, written into a new pack of our own lease, and
the rows are moved in one transaction. The old packs are doomed then, and unlinked when no reader is left.
"""

from __future__ import annotations

import sqlite3
import time
from functools import partial
from pathlib import Path
from typing import Protocol

from thaw.core.errors import CorruptBlob
from thaw.data.header import OBJECT, Entry
from thaw.data.locations import BlobLocation
from thaw.data.pack import PackItem, PackResult, read_blob, read_header, write_pack
from thaw.store import leases, objects
from thaw.store.db import Database

DEAD_SHARE = 0.3
"""A pack is rewritten when at least this share of its bytes is dead."""
SMALL_BYTES, SMALL_COUNT = 1 << 20, 64
"""Packs below this size are put together when there are this many."""
GROUP_BYTES = 1 << 30


class Home(Protocol):
    path: Path
    packs: Path
    uuid: str
    database: Database


def choose(connection: sqlite3.Connection) -> list[list[str]]:
    """Groups of packs to copy, each group into one new pack of about a GiB at most."""
    live = dict.fromkeys((row[0] for row in connection.execute("SELECT name FROM packs")), 0)
    places = "SELECT pack, nbytes FROM blobs UNION ALL SELECT pack, length(data) FROM objects"
    for pack, nbytes in connection.execute(f"SELECT pack, sum(nbytes) FROM ({places}) GROUP BY pack"):
        live[pack] = nbytes
    packs = connection.execute("SELECT name, nbytes FROM packs WHERE doomed_ns IS NULL ORDER BY name").fetchall()
    small = [name for name, nbytes in packs if nbytes < SMALL_BYTES]
    chosen = set(small) if len(small) >= SMALL_COUNT else set()
    chosen |= {name for name, nbytes in packs if _overhead_free(nbytes) - live[name] >= DEAD_SHARE * nbytes}
    return _grouped([(name, live[name]) for name, _ in packs if name in chosen])


def _overhead_free(nbytes: int) -> int:
    """A pack's size without what a header and pads take at most in a small pack: they are not dead bytes."""
    return nbytes - min(nbytes // 2, 64 << 10)


def _grouped(packs: list[tuple[str, int]]) -> list[list[str]]:
    groups: list[list[str]] = []
    total = GROUP_BYTES
    for name, nbytes in packs:
        if total + nbytes > GROUP_BYTES:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += nbytes
    return groups


def copy_packs(store: Home, packs: list[str], damaged: list[str]) -> int:
    """Copies what is alive in `packs` into one new pack; returns how many were doomed. Damaged ones are left alone."""
    name = leases.new_pack_name()
    with store.database.write(durable=False) as connection:
        lease = leases.take(connection, "write", [name])
    try:
        copied, entries = _copyable(store, packs, damaged)
        if not copied:
            return 0
        items = [_item(store.packs, pack, entry) for pack, entry in entries]
        result = write_pack(store.packs, name, items, metadata={"thaw.store": store.uuid}) if items else None
        with store.database.write() as connection:
            _move_rows(connection, entries, result)
            doomed = _doom(connection, copied)
            leases.release(connection, lease)
        return doomed
    finally:
        with store.database.write(durable=False) as connection:
            leases.release(connection, lease)


def _copyable(store: Home, packs: list[str], damaged: list[str]) -> tuple[list[str], list[tuple[str, Entry]]]:
    """The packs whose live entries all verify, and those entries. A pack that does not is added to `damaged`."""
    good: list[str] = []
    entries: list[tuple[str, Entry]] = []
    for pack in packs:
        try:
            alive = _alive(store, pack)
            for entry in alive:
                read_blob(store.packs, _place(pack, entry))
        except CorruptBlob:
            damaged.append(pack)
            continue
        good.append(pack)
        entries.extend((pack, entry) for entry in alive)
    return good, entries


def _alive(store: Home, pack: str) -> list[Entry]:
    """The entries of `pack` that rows point at."""
    header = read_header(store.packs / pack)
    with store.database.read() as connection:
        rows = connection.execute("SELECT start, id FROM blobs WHERE pack = ?", (pack,)).fetchall()
        rows += connection.execute("SELECT start, id FROM objects WHERE pack = ?", (pack,)).fetchall()
    wanted = set(rows)
    alive = [entry for entry in header.entries if (entry.offset, entry.id) in wanted]
    if len(alive) != len(wanted):
        raise CorruptBlob(f"pack {pack}: database and header do not agree about what it holds. Run `thaw fsck`.")
    return alive


def _place(pack: str, entry: Entry) -> BlobLocation:
    return BlobLocation(blob=entry.id, pack=pack, offset=entry.offset, nbytes=entry.nbytes)


def _item(folder: Path, pack: str, entry: Entry) -> PackItem:
    read = partial(read_blob, folder, _place(pack, entry))
    return PackItem(OBJECT if entry.is_object else "", entry.dtype, entry.shape, entry.nbytes, read)


def _move_rows(connection: sqlite3.Connection, entries: list[tuple[str, Entry]], result: PackResult | None) -> None:
    if result is None:
        return
    objects.insert_pack(connection, result.name, result.nbytes)
    for (pack, entry), place in zip(entries, result.blobs, strict=True):
        table = "objects" if entry.is_object else "blobs"
        connection.execute(
            f"UPDATE {table} SET pack = ?, start = ? WHERE id = ? AND pack = ?",
            (place.pack, place.offset, entry.id, pack),
        )


def _doom(connection: sqlite3.Connection, packs: list[str]) -> int:
    """Dooms those of `packs` that no row points into any more."""
    doomed = 0
    for pack in packs:
        used = "SELECT 1 FROM blobs WHERE pack = ? UNION ALL SELECT 1 FROM objects WHERE pack = ? LIMIT 1"
        if connection.execute(used, (pack, pack)).fetchone() is None:
            connection.execute("UPDATE packs SET doomed_ns = ? WHERE name = ?", (time.time_ns(), pack))
            doomed += 1
    return doomed
