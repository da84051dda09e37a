"""The repository as its users see it: objects, blob places, refs, writing, upkeep.

A `Store` is a folder: `thaw.db`, `packs/`, `refs.json`, as one namespace sees it. It may be used from any thread, and
again in a process that was forked off. Nothing of a live session is in it, and no KV passes through it: engines write
and read the packs.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import msgspec

from thaw.core import namespaces, points
from thaw.core.errors import Conflict, CorruptDatabase, InvalidRequest, NotFound, StorageFailed
from thaw.core.ids import CommitId, ObjectId, StateId, digest
from thaw.core.objects import AnyObject, Commit, NamespacedCommit, State
from thaw.data.files import storage_errors
from thaw.data.locations import BlobLocation
from thaw.store import backup, leases, objects, refs, refslog, reserve, shallow, windows
from thaw.store.db import Database, creating, is_read_only
from thaw.store.filesystem import refuse_network
from thaw.store.objects import ObjectCache, Recorded
from thaw.store.refs import Ref, ReflogEntry, RefUpdate
from thaw.store.saving import Saver
from thaw.store.schema import DATABASE, FORMAT, KEEP_REFLOG_S, PACKS
from thaw.store.settings import REBUILD, admit_namespaces, check_format, number, required, set_setting, setting
from thaw.store.upkeep import Upkeep

if TYPE_CHECKING:
    from thaw.store.gc import GcReport
    from thaw.store.report import FsckReport
    from thaw.store.transaction import Transaction

T = TypeVar("T")
_PAGE = 1000
SECRET = "namespaces.secret"
"""The setting that lineage salts of namespaces are made from: who does not know it cannot ask for one of theirs."""
ROOM = 1 << 20
"""Bytes that the smallest commit may take, with what SQLite writes beside it."""

_ALONE: dict[type, type[AnyObject]] = {Commit: Commit, State: State}
"""Kinds that a verb that only reads looks at, often without any other."""


class DiskUsage(msgspec.Struct, frozen=True):
    """Bytes on disk. `pack_nbytes` counts whole files, `blob_nbytes` the KV in them."""

    num_packs: int
    pack_nbytes: int
    blob_nbytes: int
    database_nbytes: int


class Store:
    """An open repository. Make one with `init` or `open`; `close` it, or use it as a context manager."""

    namespace = namespaces.DEFAULT
    """Whose refs, HEAD, reflogs and commits this store shows, and in whose name it writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.packs = path / PACKS
        self.database = Database(path / DATABASE)
        self.upkeep = Upkeep()
        self.saver = Saver(path, self.database)
        self._cache = ObjectCache()
        try:
            self.uuid = reserve.with_room(path, self._check, reserve.OPENING)
        except BaseException:
            self.database.close()
            raise

    def _check(self) -> str:
        """That the database is one of ours and not older than refs.json; returns its UUID."""
        path = self.path
        saved = _saved_sequence(path)
        with self.database.read() as connection:
            version = check_format(connection, path / DATABASE)
        if version < FORMAT:
            from thaw.store.upgrade import bring_up

            bring_up(self.database)
        with self.database.read() as connection:
            uuid = required(connection, "uuid")
            sequence = number(connection, "sequence")
        if sequence < saved:
            raise CorruptDatabase(
                f"{path / DATABASE} has seen {sequence} changes of refs, but refs.json {saved}: it lost some. {REBUILD}"
            )
        return uuid

    @classmethod
    def init(cls, path: Path) -> Store:
        """Makes a repository in a new or empty folder (0700). Raises `Conflict` when something is there."""
        path = Path(path)
        refuse_network(path)
        with storage_errors(path, "make a repository in"):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (path / DATABASE).exists():
                raise Conflict(f"{path} is a repository already; open it.")
            if any(path.iterdir()):
                raise Conflict(f"{path} is not empty. Make the repository in a folder of its own.")
            path.chmod(0o700)
            (path / PACKS).mkdir(mode=0o700)
        from uuid import uuid4

        try:
            with creating(path, str(uuid4())):
                pass
        except BaseException:
            with contextlib.suppress(OSError):
                (path / PACKS).rmdir()
            raise
        store = cls(path)
        store.saver.write()
        return store

    @classmethod
    def open(cls, path: Path) -> Store:
        """Opens a repository. Raises `NotFound`, `CorruptDatabase` (lost, damaged), `NewerFormat`, `StorageFailed`."""
        path = Path(path)
        with storage_errors(path, "open"):
            if not path.is_dir() or DATABASE not in os.listdir(path):
                _refuse_missing(path)
        refuse_network(path)
        return cls(path)

    def within(self, namespace: str) -> Store:
        """The same open store, as a namespace sees it: to close either is to close both. Raises `InvalidRequest`."""
        view = object.__new__(Store)
        view.__dict__.update(self.__dict__, namespace=namespaces.check(namespace))
        return view

    def namespaces(self) -> list[str]:
        """The namespaces that have a branch or tag or had one, by name; the default one left out."""
        with self.database.read() as connection:
            return refs.read_namespaces(connection)

    def close(self) -> None:
        """Idempotent; waits for `upkeep`. Transactions that are open can not commit any more."""
        self.upkeep.close()
        self.saver.fold()
        self.database.close()
        reserve.refill(self.path)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- objects

    def get(self, id: str) -> AnyObject:
        """The object, decoded and verified against its id. Raises `NotFound`, `CorruptBlob`, `NewerFormat`.

        A commit of another namespace is not found.
        """
        return self._get(id, None)

    def _get(self, id: str, kind: type[AnyObject] | None) -> AnyObject:
        value = self._cache.get(self.namespace, id)
        if value is None:
            with self._explained(id), self.database.read() as connection:
                value = objects.read(connection, id, kind)
            if isinstance(value, Commit) and value.of_namespace != self.namespace:
                raise objects.not_stored(id)
            self._cache.add(self.namespace, id, value)
        return value

    def get_as(self, id: str, kind: type[T]) -> T:
        """As `get`; raises `CorruptBlob` when the object is of another kind."""
        return objects.expect(self._get(id, self.commit_kind if kind is Commit else _ALONE.get(kind)), id, kind)

    @property
    def commit_kind(self) -> type[Commit]:
        """What the commits of this namespace are."""
        return NamespacedCommit if self.namespace else Commit

    @contextlib.contextmanager
    def _explained(self, id: str) -> Iterator[None]:
        """`NotFetched` for what is not here because a shallow fetch left it in its remote."""
        try:
            yield
        except NotFound:
            remote = self.absent().get(id)
            if remote is None:
                raise
            raise shallow.not_fetched(id, remote) from None

    def absent(self) -> dict[str, str]:
        """Parents of commits of this namespace that a shallow fetch left in a remote, each with the remote's name."""
        with self.database.read() as connection:
            found = shallow.read(connection)
        split = {commit: namespaces.split(remote) for commit, remote in found.items()}
        return {commit: remote for commit, (whose, remote) in split.items() if whose == self.namespace}

    def first_parent(self, commit: Commit) -> CommitId | None:
        """None also where history was fetched no further."""
        if not commit.parents or commit.parents[0] in self.absent():
            return None
        return CommitId(commit.parents[0])

    def has(self, id: str) -> bool:
        """Whether this object is stored; a commit, in this namespace."""
        with self.database.read() as connection:
            kinds = connection.execute("SELECT kind FROM objects WHERE id = ?", (id,)).fetchone()
            if kinds is None or kinds[0] != "commit":
                return kinds is not None
            return objects.read_namespace(connection, id) == self.namespace

    def find(self, hex_prefix: str) -> list[CommitId]:
        """Commits of this namespace whose id starts with these hex digits (at least 4; 100 at most), by id."""
        digits = hex_prefix.removeprefix("b3:")
        if not 4 <= len(digits) <= 64 or any(c not in "0123456789abcdef" for c in digits):
            raise InvalidRequest(f"{hex_prefix[:80]!r} is no id prefix: 4 to 64 digits 0-9a-f.")
        with self.database.read() as connection:
            return objects.find_commits(connection, "b3:" + digits, self.namespace)

    def locate(self, blobs: Iterable[str]) -> dict[str, BlobLocation]:
        """Where each blob lies now; valid until gc moves it (`reading` holds that off). Raises `CorruptBlob`."""
        with self.database.read() as connection:
            return objects.locate(connection, blobs)

    def find_segments(self, window: str) -> list[tuple[ObjectId, StateId]]:
        """Segments whose `window` hash equals, each with a state that holds it (or at least its first tokens)."""
        with self.database.read() as connection:
            return windows.find(connection, window)

    def nearest(self, window: str, tokens: Sequence[int]) -> list[StateId]:
        """The states with this hash before a window whose tokens in it (256 at most) are most like these: up to two."""
        with self.database.read() as connection:
            return windows.nearest(connection, window, tokens)

    def recorded(self, commit: str, num: int = 1) -> list[Recorded]:
        """A commit's bytes and its state's, and those of the `num` - 1 commits that were stored before it.

        For who looks at many: bytes are verified, not decoded. Raises `NotFound` (of another namespace, too),
        `CorruptBlob`, `CorruptDatabase`.
        """
        with self._explained(commit), self.database.read() as connection:
            found = objects.read_recorded(connection, commit, num)
        if objects.namespace_of(found[0].commit) != self.namespace:
            raise objects.not_stored(commit)
        return found

    def models(self) -> list[ObjectId]:
        """The identities of models that something here was captured with."""
        with self.database.read() as connection:
            return objects.find_models(connection)

    def recorders(self, state: str) -> list[CommitId]:
        """The commits of this namespace that recorded a state, newest first."""
        with self.database.read() as connection:
            recorders = objects.find_recorders(connection, state)
            found = [one for one in recorders if objects.read_namespace(connection, one) == self.namespace]
        for one in found:
            if self.get_as(one, Commit).state != state:
                raise CorruptDatabase(f"the row of commit {one} in objects says another state than it. {REBUILD}")
        return found

    def commits(self) -> Iterator[CommitId]:
        """All commits of this namespace in the order they were stored; those that come meanwhile may be seen."""
        last = 0
        query = "SELECT seq, id FROM objects WHERE kind = 'commit' AND seq > ? ORDER BY seq LIMIT ?"
        while True:
            with self.database.read() as connection:
                rows = connection.execute(query, (last, _PAGE)).fetchall()
                own = [row[1] for row in rows if objects.read_namespace(connection, row[1]) == self.namespace]
            if not rows:
                return
            last = rows[-1][0]
            yield from map(CommitId, own)

    def usage(self) -> DiskUsage:
        """What the repository takes on disk."""
        with self.database.read() as connection:
            packs = objects.read_packs(connection, "doomed_ns IS NULL")
            blobs = objects.read_blobs_nbytes(connection)
        with storage_errors(self.database.path, "look at"):
            database = os.stat(self.database.path).st_size
        return DiskUsage(len(packs), sum(pack.nbytes for pack in packs), blobs, database)

    # --- writing

    def begin(self, *roots: str) -> Transaction:
        """A write, as a context manager. gc keeps its packs, and everything under `roots`, while it runs."""
        from thaw.store.transaction import Transaction

        return Transaction(self, roots)

    # --- refs

    def refs(self, kind: str | None = None) -> list[Ref]:
        with self.database.read() as connection:
            return refs.read_refs_of(connection, self.namespace, kind)

    def ref(self, name: str) -> Ref | None:
        with self.database.read() as connection:
            found = refs.read_ref(connection, self._qualified(name))
        return None if found is None else refs.bare(found)

    def _qualified(self, name: str) -> str:
        return namespaces.qualify(self.namespace, name)

    def update_refs(self, *updates: RefUpdate) -> None:
        """All or none, on disk on return. Raises `RefConflict`, `NotFound`, `BadPoint`."""
        if any(update.target is not None for update in updates):
            self._apply(updates)
            self.saver.save()
        else:  # whoever deletes is about to make room
            reserve.with_room(self.path, lambda: self._apply(updates))
            self.saver.save(with_reserve=True)

    def _apply(self, updates: Sequence[RefUpdate]) -> None:
        with self.database.write() as connection:
            refs.apply(connection, refs.qualified(updates, self.namespace))

    def refs_at(self, targets: Iterable[str]) -> list[Ref]:
        """The refs of this namespace that name one of these commits, by name; others are not read."""
        with self.database.read() as connection:
            found = refs.read_refs_at(connection, targets)
        return [refs.bare(ref) for ref in found if namespaces.split(ref.name)[0] == self.namespace]

    def reflog(self, name: str, *, kept: bool = False, limit: int | None = None) -> list[ReflogEntry]:
        """Moves of a ref, newest first; with `kept` also commits that were kept when their update lost a race. With
        `limit` no more are read."""
        with self.database.read() as connection:
            entries = refs.read_reflog(connection, self._qualified(name), kept=kept)
            return [msgspec.structs.replace(entry, name=name) for entry in islice(entries, limit)]

    def stood(self, name: str, num: int) -> list[CommitId]:
        """Where a ref stood before each of its last moves, newest first: `num` commits, or as many as there are."""
        with self.database.read() as connection:
            entries = refs.read_reflog(connection, self._qualified(name))
            return list(islice((entry.old for entry in entries if entry.old is not None), num))

    @property
    def head(self) -> str:
        """The name of the namespace's current branch, which need not exist yet."""
        with self.database.read() as connection:
            return setting(connection, self._head) or "main" if self.namespace else required(connection, "head")

    def set_head(self, name: str) -> None:
        self._set(self._head, points.check_name(name))

    @property
    def _head(self) -> str:
        return f"user.namespaces.head.{self.namespace}" if self.namespace else "head"

    def salt(self, salt: str) -> str:
        """`salt` of a caller as the lineage salt: that of a namespace is nobody else's, whatever they ask for."""
        if not self.namespace:
            return salt
        from thaw.core.text import require_text

        secret = self.get_setting(SECRET)
        if secret is None:
            with self.database.write() as connection:
                secret = setting(connection, f"user.{SECRET}") or os.urandom(16).hex()
                self._write_setting(connection, f"user.{SECRET}", secret)
            self.saver.save()
        return digest(f"thaw.salt/1\0{secret}\0{self.namespace}\0{require_text(salt, 'the salt')}".encode())

    def get_setting(self, key: str) -> str | None:
        with self.database.read() as connection:
            return setting(connection, "user." + key)

    def set_setting(self, key: str, value: str) -> None:
        self._set("user." + key, value)

    def _set(self, key: str, value: str) -> None:
        with self.database.write() as connection:
            self._write_setting(connection, key, value)
        self.saver.save()

    def _write_setting(self, connection: sqlite3.Connection, key: str, value: str) -> None:
        if self.namespace:
            admit_namespaces(connection)
        set_setting(connection, key, value)
        refs.bump_sequence(connection)

    # --- upkeep

    def gc(self, *, dry_run: bool = False, keep_reflog_s: float = KEEP_REFLOG_S, now: float | None = None) -> GcReport:
        """Removes what no ref, no reflog entry within the limit and no live lease needs. See `thaw.store.gc`."""
        from thaw.store.gc import collect_garbage

        self.upkeep.wait()
        report = collect_garbage(self, dry_run=dry_run, keep_reflog_s=keep_reflog_s, now=now)
        self._cache.clear()
        return report

    def fsck(self, *, rebuild: bool = False, deep: bool = True) -> FsckReport:
        """Checks everything; see `thaw.store.checkup`, which also works on a repository that does not open."""
        from thaw.store.checkup import fsck

        self.upkeep.wait()
        report = fsck(self.path, rebuild=rebuild, deep=deep)
        self._cache.clear()
        return report

    def require_room(self, nbytes: int = 0) -> None:
        """For who is about to write: that the disk holds `nbytes` more, and the reserve. Nothing on a read-only one.

        Raises `StorageFailed`. What is free now may be gone when it is needed; then writing fails, and leaves nothing.
        """
        if is_read_only(self.database.path):
            return
        try:
            reserve.keep(self.path)
            whole = True
        except StorageFailed as error:
            if not reserve.is_full(error, self.path):
                raise
            whole = False
        free = reserve.free_bytes(self.path)
        if not whole or free < nbytes + ROOM:
            raise StorageFailed(
                f"the disk of {self.path} is full: {free:,} bytes are free, and about {nbytes + ROOM:,} are needed to "
                "commit. Free some space first (`thaw branch -d` and `thaw gc` work on a full disk), then try again."
            )

    @contextlib.contextmanager
    def reading(self, *roots: str) -> Iterator[None]:
        """While the block runs, gc unlinks no pack that is there now, and keeps everything under `roots`.

        On a read-only file system there is no lease, and no gc.
        """
        if is_read_only(self.database.path):
            yield
            return
        with self.database.write(durable=False) as connection:
            lease = leases.take(connection, "read", roots=roots)
        pid = os.getpid()
        try:
            yield
        finally:
            if pid == os.getpid():
                with self.database.write(durable=False) as connection:
                    leases.release(connection, lease)


def _refuse_missing(path: Path) -> None:
    if (path / PACKS).is_dir() or (path / backup.NAME).exists():
        raise CorruptDatabase(f"{path} has lost its database {DATABASE}. {REBUILD}")
    raise NotFound(f"{path} is not a repository (no {DATABASE}). Make one with `thaw init {path}`.")


def _saved_sequence(path: Path) -> int:
    """How many changes refs.json and its log know of; 0 when it is not readable (`fsck` says so)."""
    try:
        saved, _ = refslog.read(path)
    except CorruptDatabase:
        return 0
    return 0 if saved is None else saved.sequence
