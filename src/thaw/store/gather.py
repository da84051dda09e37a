"""Gathering: small packs are put together as commits make them, so that many small commits stay few files.

After a commit that leaves `COUNT` packs of one tier, these are copied into one pack (see `repack`), which is of the
next tier or of none: a byte is copied twice at most. Ids never change, and packs that a reader holds stay until it is
done. The commit has returned before (see `thaw.store.upkeep`): what goes wrong here is a warning, and the next tries.
"""

from __future__ import annotations

import sqlite3
import warnings

from thaw.core.errors import Busy, ThawError
from thaw.store import objects
from thaw.store.gc import unlink_doomed
from thaw.store.home import StoreHome
from thaw.store.locks import locked
from thaw.store.objects import PackRow
from thaw.store.repack import SMALL_BYTES, copy_packs, grouped

TIERS = ((0, 64 << 10), (64 << 10, SMALL_BYTES))
"""Sizes of packs, from and to."""
COUNT = 128


def is_due(connection: sqlite3.Connection) -> bool:
    """Whether a tier is full. Looks at `COUNT` rows of an index at most."""
    return any(_num(connection, *tier) >= COUNT for tier in TIERS)


def _num(connection: sqlite3.Connection, low: int, high: int) -> int:
    rows = "SELECT 1 FROM packs WHERE doomed_ns IS NULL AND nbytes >= ? AND nbytes < ? LIMIT ?"
    return int(connection.execute(f"SELECT count(*) FROM ({rows})", (low, high, COUNT)).fetchone()[0])


def gather(store: StoreHome) -> None:
    """Puts the packs of full tiers together. Does nothing beside a gc; raises nothing of thaw's, but warns."""
    try:
        with locked(store.path / "gc.lock", wait_s=0, busy="a gc is running"):
            for tier in TIERS:
                _gather_tier(store, *tier)
            unlink_doomed(store)
    except Busy:
        return
    except ThawError as error:
        warnings.warn(f"small packs could not be put together: {error}", RuntimeWarning, stacklevel=3)


def _gather_tier(store: StoreHome, low: int, high: int) -> None:
    with store.database.read() as connection:
        packs = objects.read_packs(connection, "doomed_ns IS NULL AND nbytes >= ? AND nbytes < ?", low, high)
        groups = grouped((pack, _entries(connection, pack), pack.nbytes) for pack in packs)
    if len(packs) >= COUNT:
        for group in groups:
            if len(group) > 1:
                copy_packs(store, group, [])


def _entries(connection: sqlite3.Connection, pack: PackRow) -> int:
    query = "SELECT (SELECT count(*) FROM blobs WHERE pack = ?) + (SELECT count(*) FROM objects WHERE pack = ?)"
    return int(connection.execute(query, (pack.name, pack.name)).fetchone()[0])
