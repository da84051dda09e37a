"""A write: packs and objects first on disk, then one SQL transaction that makes them visible.

    begin      lease: this process, these pack names          (gc leaves them alone)
    add_pack   a pack that an engine wrote and synced
    put        objects, queued
    commit     object pack written and synced ── SQL: packs, blobs, objects, check that everything they
               point to is there, refs by compare-and-swap, reflog, lease released ── refs.json
    afterwards now and then small packs are put together, on a thread (see `thaw.store.gather`)

Before the SQL transaction nothing is visible; after it everything is, power cut or not. Whoever leaves without
`commit` leaves nothing: packs are removed, or, if the process died, reclaimed by gc when its lease is dead.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType

from thaw.core import namespaces
from thaw.core.errors import Busy, Conflict, CorruptBlob, CorruptDatabase, InvalidRequest, RefConflict, StorageFailed
from thaw.core.ids import ObjectId
from thaw.core.objects import AnyObject, Commit, decode, encode
from thaw.data.header import OBJECT
from thaw.data.locations import BlobLocation
from thaw.data.pack import PackItem, PackResult, read_header, write_pack
from thaw.store import boundary, leases, objects, refs, shallow
from thaw.store.db import CommitUnsure
from thaw.store.gather import gather, is_due
from thaw.store.home import NamespaceHome
from thaw.store.links import links
from thaw.store.mark import Reachable
from thaw.store.refs import RefUpdate
from thaw.store.schema import COLLECTING
from thaw.store.settings import admit_namespaces, setting
from thaw.store.windows import Windows, insert


class Transaction:
    """See the module. Used by one thread at a time; valid until `commit` or the end of the `with`."""

    def __init__(self, store: NamespaceHome, roots: Sequence[str] = ()) -> None:
        self.pack = leases.new_pack_name()
        self._object_pack = leases.new_pack_name()
        self._store = store
        self._leased = [self.pack, self._object_pack]
        self._added: dict[str, tuple[int, tuple[BlobLocation, ...]]] = {}
        self._queue: dict[str, bytes] = {}
        self._absent: dict[str, str] = {}
        self._over = False
        self._pid = os.getpid()
        with store.database.write(durable=False) as connection:
            self._lease = leases.take(connection, "write", self._leased, roots)

    def lease_pack(self) -> str:
        """One more leased pack name, for a commit that captures several sessions."""
        return self._lease_packs(1)[0]

    def packs(self, num: int) -> tuple[str, ...]:
        """`num` leased pack names, `pack` first: for a capture that several processes write."""
        return (self.pack, *(self._lease_packs(num - 1) if num > 1 else ()))

    def _lease_packs(self, num: int) -> list[str]:
        self._check_open()
        fresh = [leases.new_pack_name() for _ in range(num)]
        with self._store.database.write(durable=False) as connection:
            leases.set_packs(connection, self._lease, [*self._leased, *fresh])
        self._leased += fresh
        return fresh

    def add_pack(self, name: str, nbytes: int, blobs: Sequence[BlobLocation]) -> None:
        """Takes in a pack of a leased name that is written and synced. Its header must say the same."""
        self._check_open()
        if name not in self._leased:
            raise InvalidRequest(
                f"pack {name[:80]} is not leased by this transaction; write to `pack` or `lease_pack()`."
            )
        header = read_header(self._store.packs / name)
        there = {(entry.id, entry.offset, entry.nbytes) for entry in header.entries}
        for blob in blobs:
            if blob.pack != name or (blob.blob, blob.offset, blob.nbytes) not in there:
                raise CorruptBlob(f"pack {name}: blob {blob.blob} was announced, but its header does not say so.")
        if header.nbytes != nbytes:
            raise CorruptBlob(f"pack {name} was announced with {nbytes} bytes; it has {header.nbytes}.")
        self._added[name] = (nbytes, tuple(blobs))

    def put(self, obj: AnyObject) -> ObjectId:
        """Queues an object; returns its id. Objects stored already are not written again.

        Raises `InvalidRequest` for a value that could not be read again (its fields were set to other types), and for
        a commit of another namespace.
        """
        self._check_open()
        if isinstance(obj, Commit) and obj.of_namespace != self._store.namespace:
            raise InvalidRequest(
                f"a commit of namespace {obj.of_namespace!r} is not written by {self._store.namespace!r}; "
                "open the repository in the commit's own."
            )
        identifier, data = encode(obj)
        try:
            decode(data, identifier)
        except CorruptBlob as error:
            raise InvalidRequest(f"a {type(obj).__name__} that cannot be read again is not stored: {error}") from None
        self._queue[identifier] = data
        return identifier

    def leave_out(self, commits: Mapping[str, str]) -> None:
        """Parents of queued commits that are not stored and stay in the remote that is named for each."""
        self._check_open()
        whose = self._store.namespace
        self._absent.update((commit, namespaces.qualify(whose, remote)) for commit, remote in commits.items())

    def commit(self, *updates: RefUpdate) -> None:
        """Makes it all visible, on disk on return (law 7).

        Raises `RefConflict` when a ref moved: then packs and objects are stored all the same and kept from gc, and no
        ref was moved. Raises `Conflict` when gc took something away meanwhile, `StorageFailed` and others: nothing is
        visible.
        """
        self._check_open()
        updates = tuple(refs.qualified(updates, self._store.namespace))
        stored = set[str]() if self._store.namespace else self._stored()
        new = {identifier: queued for identifier, queued in self._queue.items() if identifier not in stored}
        written = self._write_objects(new)
        redundant: list[str] = []
        with self._store.database.write() as connection:
            self._check_lease(connection)
            if self._store.namespace:
                admit_namespaces(connection)
            redundant += self._insert_blobs(connection)
            self._insert_objects(connection, new, written)
            named = {parent for data in new.values() for parent in links(data).parents} if self._absent else set[str]()
            shallower = boundary.add(connection, {one: self._absent[one] for one in named & self._absent.keys()})
            if setting(connection, COLLECTING) is not None:
                self._find_again(connection)
            lost = _move(connection, updates)
            leases.release(connection, self._lease)
            many_small = is_due(connection)
        self._over = True
        self._remove(redundant)
        if updates or shallower:
            self._store.saver.save(anew=bool(shallower))
        if many_small:
            self._store.upkeep.begin(partial(gather, self._store))
        if lost is not None:
            raise lost

    def _stored(self) -> set[str]:
        """What of the queue need not be written again. A namespace writes all: what others have stored must not show in
        how long its commits take."""
        with self._store.database.read() as connection:
            return objects.present(connection, "objects", self._queue)

    def _write_objects(self, new: dict[str, bytes]) -> PackResult | None:
        if not new:
            return None
        items = [PackItem(OBJECT, "U8", (len(data),), len(data), lambda data=data: data) for data in new.values()]  # type: ignore[misc]
        return write_pack(self._store.packs, self._object_pack, items, metadata={"thaw.store": self._store.uuid})

    def _insert_blobs(self, connection: sqlite3.Connection) -> list[str]:
        """Packs of which everything is stored already are not indexed but returned; those of a namespace stay until the
        next gc, for the reason that `_stored` gives."""
        redundant = []
        for name, (nbytes, blobs) in self._added.items():
            known = objects.present(connection, "blobs", (blob.blob for blob in blobs))
            if blobs and not self._store.namespace and all(blob.blob in known for blob in blobs):
                redundant.append(name)
                continue
            objects.insert_pack(connection, name, nbytes)
            objects.insert_blobs(connection, blobs)
        return redundant

    def _insert_objects(
        self, connection: sqlite3.Connection, new: dict[str, bytes], written: PackResult | None
    ) -> None:
        if written is None:
            self._require(connection, "objects", self._queue)
            return
        objects.insert_pack(connection, written.name, written.nbytes)
        of_new = {identifier: links(data) for identifier, data in new.items()}
        for place in written.blobs:
            objects.insert_object(connection, place, of_new[place.blob], new[place.blob])
        absent = {*self._absent, *shallow.read(connection)}
        self._require(connection, "objects", [*self._queue, *(o for of in of_new.values() for o in of.without(absent))])
        self._require(connection, "blobs", [blob for of in of_new.values() for blob in of.blobs])
        windows = Windows(lambda identifier: new.get(identifier) or objects.read_bytes(connection, identifier))
        insert(connection, windows.rows(objects.homes(of_new)))

    def _find_again(self, connection: sqlite3.Connection) -> None:
        """Rows for every segment that is reached from here: those that were stored and dead may have lost theirs to a
        gc that is under way, or was killed. What is damaged is left to fsck."""
        marks = Reachable()
        with contextlib.suppress(CorruptDatabase):
            marks.mark(connection, self._queue)
        windows = Windows(lambda identifier: objects.read_bytes(connection, identifier))
        insert(connection, windows.rows(marks.homed(), whole=False))

    def _require(self, connection: sqlite3.Connection, table: str, identifiers: Iterable[str]) -> None:
        wanted = set(identifiers)
        missing = wanted - objects.present(connection, table, wanted)
        if missing:
            raise Conflict(
                f"{min(missing)} and {len(missing) - 1} more {table} that this commit needs are not in the repository: "
                "gc removed them meanwhile, or they were never written. Commit again from the session (it writes all)."
            )

    def _check_open(self) -> None:
        if self._over:
            raise InvalidRequest("this transaction is over; begin another.")
        if self._pid != os.getpid():
            raise Busy("this transaction belongs to the process that began it; begin another in this one.")

    def _check_lease(self, connection: sqlite3.Connection) -> None:
        if not leases.exists(connection, self._lease):
            raise Conflict("this transaction's lease ran out, so gc may have removed its packs. Commit again.")
        for name, (nbytes, _) in self._added.items():
            path = self._store.packs / name
            if not path.exists() or path.stat().st_size != nbytes:
                raise Conflict(f"pack {name} is not there any more as it was written. Commit again.")

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            for path in (self._store.packs / name, self._store.packs / f"{name}.tmp"):
                with contextlib.suppress(OSError):
                    path.unlink()

    def abort(self) -> None:
        """Removes the packs and the lease; nothing was visible. Idempotent; after `commit` it does nothing.

        Packs whose lease is gone belong to gc, or to a database that was made again with them.
        """
        if self._over or self._pid != os.getpid():
            return
        self._over = True
        with contextlib.suppress(StorageFailed, Conflict), self._store.database.write(durable=False) as connection:
            if leases.exists(connection, self._lease):
                self._remove(self._leased)
                leases.release(connection, self._lease)

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, CommitUnsure):
            self._over = True  # gc reclaims the packs if the rows did not come back
        self.abort()


def _move(connection: sqlite3.Connection, updates: Sequence[RefUpdate]) -> RefConflict | None:
    """Applies `updates`, all or none; a lost race keeps their targets and returns the conflict."""
    connection.execute("SAVEPOINT refs")
    try:
        refs.apply(connection, updates)
    except RefConflict as conflict:
        connection.execute("ROLLBACK TO refs")
        refs.keep(connection, updates)
        return conflict
    return None
