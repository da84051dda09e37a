"""Objects and blob places in the database: looked up, verified, decoded, inserted.

What a row says that its object does not is covered by the row's check. What an index does not find, where that would be
news, is looked for in the table itself.
"""

from __future__ import annotations

import itertools
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import msgspec

from thaw.core import objects
from thaw.core.canonical import decode_stored
from thaw.core.errors import CorruptBlob, CorruptDatabase, NotFound
from thaw.core.identity import ModelIdentity
from thaw.core.ids import CommitId, ObjectId, digest
from thaw.core.objects import AnyObject, State
from thaw.data.locations import BlobLocation, is_pack_name
from thaw.store.schema import KINDS, check
from thaw.store.settings import REBUILD

if TYPE_CHECKING:
    from thaw.store.links import Links

T = TypeVar("T")
CACHE_ENTRIES = 1024
_CHUNK = 500
MOST_FOUND = 100


class ObjectCache:
    """The decoded objects used last, those of each namespace apart: what one has read, another does not get sooner.

    They are immutable, so sharing them is safe; any thread may use it."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[str, str], AnyObject] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, namespace: str, identifier: str) -> AnyObject | None:
        with self._lock:
            value = self._entries.get((namespace, identifier))
            if value is not None:
                self._entries.move_to_end((namespace, identifier))
            return value

    def add(self, namespace: str, identifier: str, value: AnyObject) -> None:
        with self._lock:
            self._entries[namespace, identifier] = value
            while len(self._entries) > CACHE_ENTRIES:
                self._entries.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()


def read(connection: sqlite3.Connection, identifier: str, kind: type[AnyObject] | None = None) -> AnyObject:
    """The decoded object (of `kind`, probably), its hash verified. Raises `NotFound`, `CorruptBlob`, `NewerFormat`."""
    row = connection.execute("SELECT data FROM objects WHERE id = ?", (identifier,)).fetchone()
    if row is None:
        if connection.execute("SELECT 1 FROM objects NOT INDEXED WHERE id = ?", (identifier,)).fetchone() is not None:
            raise CorruptDatabase(f"the index of objects does not find {identifier}, which is stored. {REBUILD}")
        raise not_stored(identifier)
    data = stored_bytes(row[0], identifier)
    return objects.decode(data, identifier) if kind is None else objects.decode_as(data, identifier, kind)


def not_stored(identifier: str) -> NotFound:
    return NotFound(f"there is no object {identifier[:80]} in this repository.")


def stored_bytes(value: object, identifier: str) -> bytes:
    """The `data` of an object's row, which a damaged database may have as something else."""
    if not isinstance(value, bytes):
        raise CorruptBlob(f"object {identifier}: its row holds no bytes. Run `thaw fsck --rebuild`.")
    return value


def read_bytes(connection: sqlite3.Connection, identifier: object) -> bytes:
    """The object's verified bytes. `identifier` may come from a row, and be anything. Raises `CorruptBlob` where it is
    not stored or does not match its hash."""
    row = connection.execute("SELECT data FROM objects WHERE id = ?", (identifier,)).fetchone()
    if row is None:
        raise CorruptBlob(f"object {str(identifier)[:80]} is needed but not stored. Run `thaw fsck`.")
    return verified(row[0], str(identifier))


def verified(value: object, identifier: str) -> bytes:
    """The `data` of an object's row, hashed. Raises `CorruptBlob`."""
    data = stored_bytes(value, identifier)
    if digest(data) != identifier:
        raise CorruptBlob(f"object {identifier} does not match its hash. {REBUILD}")
    return data


class Recorded(msgspec.Struct, frozen=True):
    """A commit and the state that it names, each as the verified bytes of an object."""

    id: CommitId
    commit: bytes
    state: bytes


def read_recorded(connection: sqlite3.Connection, identifier: str, num: int) -> list[Recorded]:
    """The commit, and the `num` - 1 that were stored before it: where its ancestors mostly are.

    Raises `NotFound`, `CorruptBlob`, `CorruptDatabase`.
    """
    row = connection.execute("SELECT seq FROM objects WHERE id = ? AND kind = 'commit'", (identifier,)).fetchone()
    if row is None:
        read(connection, identifier)
        raise CorruptBlob(f"object {identifier} is not a commit.")
    query = (
        "SELECT c.id, c.data, s.id, s.data FROM objects c LEFT JOIN objects s ON s.id = c.state "
        "WHERE c.kind = 'commit' AND c.seq <= ? ORDER BY c.seq DESC LIMIT ?"
    )
    found = []
    for commit, data, state, state_data in connection.execute(query, (row[0], num)):
        if state is None:
            raise CorruptDatabase(f"the state of commit {commit} is not stored. {REBUILD}")
        found.append(Recorded(CommitId(commit), verified(data, commit), verified(state_data, state)))
    if not found or found[0].id != identifier:
        raise CorruptDatabase(f"the index of commits does not find {identifier}, which is stored. {REBUILD}")
    return found


class _Commit(msgspec.Struct):
    namespace: str = ""


def read_namespace(connection: sqlite3.Connection, commit: str) -> str:
    """Whose a stored commit is. Raises `CorruptBlob`."""
    return namespace_of(read_bytes(connection, commit))


def namespace_of(commit: bytes) -> str:
    try:
        return decode_stored(commit, _Commit).namespace
    except msgspec.DecodeError as error:
        raise CorruptBlob(f"a commit cannot be read: {error}. Run `thaw fsck`.") from None


def find_models(connection: sqlite3.Connection) -> list[ObjectId]:
    """The identities of models, in the order in which they were stored. Raises `CorruptBlob`, `CorruptDatabase`.

    The index that finds them by their kind has no check of its own, so what stands beside them there must be in order
    and of kinds that there are, and the newest commit's model must be one of them.
    """
    columns = "SELECT kind, seq, id FROM objects INDEXED BY objects_kind WHERE kind"
    beside = list(connection.execute(f"{columns} < 'model' ORDER BY kind DESC, seq DESC LIMIT 2"))[::-1]
    found = []
    for row in connection.execute(f"{columns} >= 'model' ORDER BY kind, seq"):
        beside.append(row)
        if row[0] == "model":
            found.append(ObjectId(row[2]))
        elif len(beside) > len(found) + 3:
            break
    places = [(kind, seq) for kind, seq, _ in beside]
    if not KINDS.issuperset(kind for kind, _ in places) or any(a >= b for a, b in itertools.pairwise(places)):
        raise CorruptDatabase(f"the index of objects is out of order where the models are. {REBUILD}")
    if not all(isinstance(read(connection, identifier), ModelIdentity) for identifier in found):
        raise CorruptDatabase(f"the index of objects says that something is a model which is none. {REBUILD}")
    newest = connection.execute("SELECT state FROM objects WHERE kind = 'commit' ORDER BY seq DESC LIMIT 1").fetchone()
    if newest is not None and _decoded(connection, newest[0], State).model not in found:
        raise CorruptDatabase(f"the index of objects does not find the model of the newest commit. {REBUILD}")
    return found


def _decoded(connection: sqlite3.Connection, identifier: object, kind: type[T]) -> T:
    return expect(objects.decode(read_bytes(connection, identifier), str(identifier)), identifier, kind)


def expect(value: AnyObject, identifier: object, kind: type[T]) -> T:
    """`value`, the object of this id. Raises `CorruptBlob` when it is of another kind."""
    if not isinstance(value, kind):
        raise CorruptBlob(f"object {identifier} is a {type(value).__name__}; a {kind.__name__} was expected.")
    return value


def find_recorders(connection: sqlite3.Connection, state: str) -> list[CommitId]:
    """The commits that recorded a state, newest first."""
    query = "SELECT id FROM objects WHERE state = ? ORDER BY seq DESC"
    return [CommitId(row[0]) for row in connection.execute(query, (state,))]


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
        query = f'SELECT id, pack, start, nbytes, "check" FROM blobs WHERE id IN ({marks})'
        for row in connection.execute(query, chunk):
            place = blob_place(row)
            found[place.blob] = place
    for blob in wanted:
        if blob not in found:
            raise CorruptBlob(f"blob {blob[:80]} is in no pack here. Run `thaw fsck` to see what needs it.")
    return found


def blob_place(row: tuple[str, str, int, int, int]) -> BlobLocation:
    blob, pack, start, nbytes, said = row
    sound = isinstance(blob, str) and is_pack_name(pack) and isinstance(start, int) and isinstance(nbytes, int)
    if not sound or said != check("blobs", blob, pack, start, nbytes):
        raise CorruptBlob(f"the row of {str(blob)[:80]} in blobs does not match its check. {REBUILD}")
    return BlobLocation(blob=blob, pack=pack, offset=start, nbytes=nbytes)


def _chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    return (values[i : i + _CHUNK] for i in range(0, len(values), _CHUNK))


def find_commits(connection: sqlite3.Connection, prefix: str, namespace: str) -> list[CommitId]:
    """Commits of a namespace whose id starts with `prefix` ("b3:" and hex digits), by id; 100 at most."""
    for how in ("", "NOT INDEXED"):
        query = f"SELECT id FROM objects {how} WHERE id >= ? AND id < ? AND kind = 'commit' ORDER BY id"
        rows = connection.execute(query, (prefix, prefix + "g"))
        own = (CommitId(one) for (one,) in rows if read_namespace(connection, one) == namespace)
        found = list(islice(own, MOST_FOUND))
        if found and how:
            raise CorruptDatabase(f"the index of objects does not find {found[0]}, which is stored. {REBUILD}")
        if found:
            return found
    return []


class PackRow(msgspec.Struct, frozen=True):
    """A file of `packs/`; `doomed_ns`: since when nothing points into it."""

    name: str
    nbytes: int
    doomed_ns: int | None


def read_packs(connection: sqlite3.Connection, where: str = "1", *values: int) -> list[PackRow]:
    """The packs, or those of a condition, by name. Raises `CorruptDatabase`."""
    query = f'SELECT name, nbytes, doomed_ns, "check" FROM packs WHERE {where} ORDER BY name'
    return [pack_row(row) for row in connection.execute(query, values)]


def pack_row(row: tuple[str, int, int | None, int]) -> PackRow:
    name, nbytes, doomed_ns, said = row
    sound = is_pack_name(name) and isinstance(nbytes, int) and isinstance(doomed_ns, int | None)
    if not sound or said != check("packs", name, nbytes, doomed_ns):
        raise CorruptDatabase(f"the row of {str(name)[:80]!r} in packs does not match its check. {REBUILD}")
    return PackRow(name, nbytes, doomed_ns)


def insert_pack(connection: sqlite3.Connection, name: str, nbytes: int) -> None:
    connection.execute("INSERT INTO packs VALUES (?, ?, NULL, ?)", (name, nbytes, check("packs", name, nbytes, None)))


def doom_packs(connection: sqlite3.Connection, packs: Iterable[PackRow], now_ns: int) -> None:
    """Says of packs that nothing points into them any more."""
    connection.executemany(
        'UPDATE packs SET doomed_ns = ?, "check" = ? WHERE name = ?',
        ((now_ns, check("packs", pack.name, pack.nbytes, now_ns), pack.name) for pack in packs),
    )


def read_places(connection: sqlite3.Connection) -> Iterator[tuple[str, str, str]]:
    """(kind, id, pack) of every object and blob ("blob"), each row checked, read from the tables and not by an index.

    Raises `CorruptDatabase`, `CorruptBlob`.
    """
    columns = 'id, kind, pack, start, state, "check"'
    for row in connection.execute(f"SELECT {columns} FROM objects NOT INDEXED ORDER BY seq DESC"):
        identifier, kind, pack = row[:3]
        if not (isinstance(identifier, str) and is_pack_name(pack)) or row[5] != check("objects", *row[:5]):
            raise CorruptDatabase(f"the row of {str(identifier)[:80]} in objects does not match its check. {REBUILD}")
        yield kind, identifier, pack
    for row in connection.execute('SELECT id, pack, start, nbytes, "check" FROM blobs'):
        place = blob_place(row)
        yield "blob", place.blob, place.pack


def read_blobs_nbytes(connection: sqlite3.Connection) -> int:
    """Bytes of all blobs, each row checked; the index by pack must have as many."""
    rows = connection.execute('SELECT id, pack, start, nbytes, "check" FROM blobs NOT INDEXED')
    nbytes = [blob_place(row).nbytes for row in rows]
    (num,) = connection.execute("SELECT count(*) FROM blobs INDEXED BY blobs_pack").fetchone()
    if len(nbytes) != num:
        raise CorruptDatabase(f"blobs has {len(nbytes)} rows, its index {num}. {REBUILD}")
    return sum(nbytes)


def is_used(connection: sqlite3.Connection, pack: str) -> bool:
    """Whether a row points into the pack."""
    query = "SELECT 1 FROM blobs WHERE pack = ? UNION ALL SELECT 1 FROM objects WHERE pack = ? LIMIT 1"
    return connection.execute(query, (pack, pack)).fetchone() is not None


def insert_blobs(connection: sqlite3.Connection, blobs: Iterable[BlobLocation]) -> None:
    """Blobs stored already keep their place."""
    connection.executemany("INSERT OR IGNORE INTO blobs VALUES (?, ?, ?, ?, ?)", map(_blob_row, blobs))


def move_blobs(connection: sqlite3.Connection, moves: Iterable[tuple[BlobLocation, str]]) -> None:
    """Gives each blob its new place, if it still lies in the pack that it was copied from."""
    rows = ((*_blob_row(place)[1:], place.blob, old) for place, old in moves)
    connection.executemany(
        'UPDATE blobs SET pack = ?, start = ?, nbytes = ?, "check" = ? WHERE id = ? AND pack = ?', rows
    )


def _blob_row(place: BlobLocation) -> tuple[str, str, int, int, int]:
    row = (place.blob, place.pack, place.offset, place.nbytes)
    return (*row, check("blobs", *row))


def move_objects(connection: sqlite3.Connection, moves: Iterable[tuple[BlobLocation, str]]) -> None:
    """As `move_blobs`."""
    for place, old in moves:
        query = "SELECT kind, state FROM objects WHERE id = ? AND pack = ?"
        for kind, state in connection.execute(query, (place.blob, old)).fetchall():
            said = check("objects", place.blob, kind, place.pack, place.offset, state)
            connection.execute(
                'UPDATE objects SET pack = ?, start = ?, "check" = ? WHERE id = ?',
                (place.pack, place.offset, said, place.blob),
            )


def insert_object(connection: sqlite3.Connection, place: BlobLocation, of: Links, data: bytes) -> None:
    said = check("objects", place.blob, of.kind, place.pack, place.offset, of.state)
    connection.execute(
        'INSERT OR IGNORE INTO objects (id, kind, data, pack, start, state, "check") VALUES (?, ?, ?, ?, ?, ?, ?)',
        (place.blob, of.kind, data, place.pack, place.offset, of.state, said),
    )


def homes(new: dict[str, Links]) -> list[tuple[str, str]]:
    """(segment, state) for each segment that a state in `new` uses through a node in `new`: of several states the
    first that uses most of it.

    Nodes that were stored before came with a state of their own.
    """
    best: dict[str, tuple[int, str]] = {}
    for state, of_state in new.items():
        if of_state.kind == "state":
            nodes = [new[node] for node in of_state.objects if node in new and new[node].kind == "segments"]
            for segment, length in (pair for node in nodes for pair in zip(node.objects, node.lengths, strict=True)):
                if segment in new and length > best.get(segment, (0, ""))[0]:
                    best[segment] = (length, state)
    return [(segment, state) for segment, (_, state) in best.items()]
