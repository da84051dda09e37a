"""Objects and blob places in the database: looked up, verified, decoded, inserted."""

from __future__ import annotations

import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from thaw.core import objects
from thaw.core.errors import CorruptBlob, NotFound
from thaw.core.ids import CommitId, ObjectId, StateId
from thaw.core.objects import AnyObject
from thaw.data.locations import BlobLocation
from thaw.store.links import Links

CACHE_ENTRIES = 1024
_CHUNK = 500


class ObjectCache:
    """The decoded objects used last. They are immutable, so sharing them is safe; any thread may use it."""

    def __init__(self) -> None:
        self._entries: OrderedDict[str, AnyObject] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, identifier: str) -> AnyObject | None:
        with self._lock:
            value = self._entries.get(identifier)
            if value is not None:
                self._entries.move_to_end(identifier)
            return value

    def add(self, identifier: str, value: AnyObject) -> None:
        with self._lock:
            self._entries[identifier] = value
            while len(self._entries) > CACHE_ENTRIES:
                self._entries.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()


def read(connection: sqlite3.Connection, identifier: str) -> AnyObject:
    """The decoded object, its hash verified. Raises `NotFound`, `CorruptBlob`, `NewerFormat`."""
    row = connection.execute("SELECT data FROM objects WHERE id = ?", (identifier,)).fetchone()
    if row is None:
        raise NotFound(f"there is no object {identifier[:80]} in this repository.")
    return objects.decode(stored_bytes(row[0], identifier), identifier)


def stored_bytes(value: object, identifier: str) -> bytes:
    """The `data` of an object's row, which a damaged database may have as something else."""
    if not isinstance(value, bytes):
        raise CorruptBlob(f"object {identifier}: its row holds no bytes. Run `thaw fsck --rebuild`.")
    return value


def present(connection: sqlite3.Connection, table: str, identifiers: Iterable[str]) -> set[str]:
    """Those of `identifiers` that `table` (objects or blobs) has."""
    found: set[str] = set()
    for chunk in _chunks(sorted(set(identifiers))):
        marks = ",".join("?" * len(chunk))
        found.update(row[0] for row in connection.execute(f"SELECT id FROM {table} WHERE id IN ({marks})", chunk))
    return found


def locate(connection: sqlite3.Connection, blobs: Iterable[str]) -> dict[str, BlobLocation]:
    """Where each blob lies. Raises `CorruptBlob` naming one that is not stored."""
    wanted = sorted(set(blobs))
    found: dict[str, BlobLocation] = {}
    for chunk in _chunks(wanted):
        marks = ",".join("?" * len(chunk))
        query = f"SELECT id, pack, start, nbytes FROM blobs WHERE id IN ({marks})"
        for blob, pack, start, nbytes in connection.execute(query, chunk):
            if not (isinstance(pack, str) and isinstance(start, int) and isinstance(nbytes, int)):
                raise CorruptBlob(f"blob {blob}: its row says no place. Run `thaw fsck --rebuild`.")
            found[blob] = BlobLocation(blob=blob, pack=pack, offset=start, nbytes=nbytes)
    for blob in wanted:
        if blob not in found:
            raise CorruptBlob(f"blob {blob[:80]} is in no pack here. Run `thaw fsck` to see what needs it.")
    return found


def _chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    return (values[i : i + _CHUNK] for i in range(0, len(values), _CHUNK))


def find_commits(connection: sqlite3.Connection, prefix: str) -> list[CommitId]:
    """Commits whose id starts with `prefix` ("b3:" and hex digits), by id."""
    query = "SELECT id FROM objects WHERE id >= ? AND id < ? AND kind = 'commit' ORDER BY id LIMIT 100"
    return [CommitId(row[0]) for row in connection.execute(query, (prefix, prefix + "g"))]


def find_segments(connection: sqlite3.Connection, window: str) -> list[tuple[ObjectId, StateId]]:
    query = 'SELECT segment, state FROM segments WHERE "window" = ? ORDER BY segment'
    return [(ObjectId(segment), StateId(state)) for segment, state in connection.execute(query, (window,))]


def insert_pack(connection: sqlite3.Connection, name: str, nbytes: int) -> None:
    connection.execute("INSERT INTO packs (name, nbytes, doomed_ns) VALUES (?, ?, NULL)", (name, nbytes))


def insert_blobs(connection: sqlite3.Connection, blobs: Iterable[BlobLocation]) -> None:
    """Blobs stored already keep their place."""
    connection.executemany(
        "INSERT OR IGNORE INTO blobs (id, pack, start, nbytes) VALUES (?, ?, ?, ?)",
        ((b.blob, b.pack, b.offset, b.nbytes) for b in blobs),
    )


def insert_object(connection: sqlite3.Connection, place: BlobLocation, kind: str, data: bytes) -> None:
    connection.execute(
        "INSERT OR IGNORE INTO objects (id, kind, data, pack, start) VALUES (?, ?, ?, ?, ?)",
        (place.blob, kind, data, place.pack, place.offset),
    )


def home_segments(connection: sqlite3.Connection, rows: Iterable[tuple[str, str, str]]) -> None:
    """Makes segments findable: (segment, window, state). Segments that have a state keep it."""
    connection.executemany('INSERT OR IGNORE INTO segments (segment, "window", state) VALUES (?, ?, ?)', rows)


def homes(new: dict[str, Links]) -> list[tuple[str, str, str]]:
    """(segment, window, state) for each segment that a state in `new` uses through a node in `new`: of several states
    the one that uses most of it.

    Nodes that were stored before came with a state of their own.
    """
    best: dict[str, tuple[int, str]] = {}
    for state, of_state in new.items():
        if of_state.kind == "state":
            nodes = [new[node] for node in of_state.objects if node in new and new[node].kind == "segments"]
            for segment, length in (pair for node in nodes for pair in zip(node.objects, node.lengths, strict=True)):
                if segment in new and length > best.get(segment, (0, ""))[0]:
                    best[segment] = (length, state)
    return [(segment, new[segment].window, state) for segment, (_, state) in best.items()]
