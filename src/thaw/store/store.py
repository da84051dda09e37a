"""The repository as its users see it: objects, blob places, refs, writing, upkeep.

A `Store` is a folder: `thaw.db`, `packs/`, `refs.json`. It may be used from any thread, and again in a process that
was forked off. Nothing of a live session is in it, and no KV passes through it: engines write and read the packs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from thaw.core import points
from thaw.core.errors import Conflict, CorruptBlob, CorruptDatabase, InvalidRequest, NotFound
from thaw.core.ids import CommitId, ObjectId, StateId
from thaw.core.objects import AnyObject
from thaw.data.files import storage_errors
from thaw.data.locations import BlobLocation
from thaw.store import backup, leases, objects, refs
from thaw.store.db import REBUILD, Database, check_format, creating, is_read_only, set_setting, setting
from thaw.store.filesystem import refuse_network
from thaw.store.objects import ObjectCache
from thaw.store.refs import Ref, ReflogEntry, RefUpdate
from thaw.store.schema import DATABASE, KEEP_REFLOG_S, PACKS

if TYPE_CHECKING:
    from thaw.store.gc import GcReport
    from thaw.store.report import FsckReport
    from thaw.store.transaction import Transaction

T = TypeVar("T")
_PAGE = 1000


class Store:
    """An open repository. Make one with `init` or `open`; `close` it, or use it as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.packs = path / PACKS
        self.database = Database(path / DATABASE)
        self._cache = ObjectCache()
        try:
            self.uuid = self._check()
        except BaseException:
            self.database.close()
            raise

    def _check(self) -> str:
        """That the database is one of ours and not older than refs.json; returns its UUID."""
        path = self.path
        saved = _saved_sequence(path)
        with self.database.read() as connection:
            check_format(connection, path / DATABASE)
            uuid = setting(connection, "uuid") or ""
            sequence = int(setting(connection, "sequence") or "0")
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
        backup.write(path, store.database)
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

    def close(self) -> None:
        """Idempotent. Transactions that are open can not commit any more."""
        self.database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- objects

    def get(self, id: str) -> AnyObject:
        """The object, decoded and verified against its id. Raises `NotFound`, `CorruptBlob`, `NewerFormat`."""
        value = self._cache.get(id)
        if value is None:
            with self.database.read() as connection:
                value = objects.read(connection, id)
            self._cache.add(id, value)
        return value

    def get_as(self, id: str, kind: type[T]) -> T:
        """As `get`; raises `CorruptBlob` when the object is of another kind."""
        value = self.get(id)
        if not isinstance(value, kind):
            raise CorruptBlob(f"object {id} is a {type(value).__name__}; a {kind.__name__} was expected.")
        return value

    def has(self, id: str) -> bool:
        with self.database.read() as connection:
            return bool(objects.present(connection, "objects", [id]))

    def find(self, hex_prefix: str) -> list[CommitId]:
        """Commits whose id starts with these hex digits (at least 4; at most 100 are returned), by id."""
        digits = hex_prefix.removeprefix("b3:")
        if not 4 <= len(digits) <= 64 or any(c not in "0123456789abcdef" for c in digits):
            raise InvalidRequest(f"{hex_prefix[:80]!r} is no id prefix: 4 to 64 digits 0-9a-f.")
        with self.database.read() as connection:
            return objects.find_commits(connection, "b3:" + digits)

    def locate(self, blobs: Iterable[str]) -> dict[str, BlobLocation]:
        """Where each blob lies now; valid until gc moves it (`reading` holds that off). Raises `CorruptBlob`."""
        with self.database.read() as connection:
            return objects.locate(connection, blobs)

    def find_segments(self, window: str) -> list[tuple[ObjectId, StateId]]:
        """Segments whose `window` hash equals, each with a state that holds it (or at least its first tokens)."""
        with self.database.read() as connection:
            return objects.find_segments(connection, window)

    def commits(self) -> Iterator[CommitId]:
        """All commits in the order they were stored; those that come meanwhile may be seen."""
        last = 0
        query = "SELECT seq, id FROM objects WHERE kind = 'commit' AND seq > ? ORDER BY seq LIMIT ?"
        while True:
            with self.database.read() as connection:
                rows = connection.execute(query, (last, _PAGE)).fetchall()
            if not rows:
                return
            last = rows[-1][0]
            yield from (CommitId(row[1]) for row in rows)

    # --- writing

    def begin(self, *roots: str) -> Transaction:
        """A write, as a context manager. gc keeps its packs, and everything under `roots`, while it runs."""
        from thaw.store.transaction import Transaction

        return Transaction(self, roots)

    # --- refs

    def refs(self, kind: str | None = None) -> list[Ref]:
        with self.database.read() as connection:
            return refs.read_refs(connection, kind)

    def ref(self, name: str) -> Ref | None:
        with self.database.read() as connection:
            return refs.read_ref(connection, name)

    def update_refs(self, *updates: RefUpdate) -> None:
        """All or none, on disk on return. Raises `RefConflict`, `NotFound`, `BadPoint`."""
        with self.database.write() as connection:
            refs.apply(connection, updates)
        backup.save(self.path, self.database)

    def reflog(self, name: str, *, kept: bool = False) -> list[ReflogEntry]:
        """Moves of a ref, newest first; with `kept` also commits that were kept when their update lost a race."""
        with self.database.read() as connection:
            return refs.read_reflog(connection, name, kept=kept)

    @property
    def head(self) -> str:
        """The name of the current branch, which need not exist yet."""
        with self.database.read() as connection:
            return setting(connection, "head") or "main"

    def set_head(self, name: str) -> None:
        self._set("head", points.check_name(name))

    def get_setting(self, key: str) -> str | None:
        with self.database.read() as connection:
            return setting(connection, "user." + key)

    def set_setting(self, key: str, value: str) -> None:
        self._set("user." + key, value)

    def _set(self, key: str, value: str) -> None:
        with self.database.write() as connection:
            set_setting(connection, key, value)
            refs.bump_sequence(connection)
        backup.save(self.path, self.database)

    # --- upkeep

    def gc(self, *, dry_run: bool = False, keep_reflog_s: float = KEEP_REFLOG_S, now: float | None = None) -> GcReport:
        """Removes what no ref, no reflog entry within the limit and no live lease needs. See `thaw.store.gc`."""
        from thaw.store.gc import collect_garbage

        report = collect_garbage(self, dry_run=dry_run, keep_reflog_s=keep_reflog_s, now=now)
        self._cache.clear()
        return report

    def fsck(self, *, rebuild: bool = False, deep: bool = True) -> FsckReport:
        """Checks everything; see `thaw.store.checkup`, which also works on a repository that does not open."""
        from thaw.store.checkup import fsck

        report = fsck(self.path, rebuild=rebuild, deep=deep)
        self._cache.clear()
        return report

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
    """How many changes refs.json knows of; 0 when it is not readable (`fsck` says so)."""
    try:
        saved = backup.read(path)
    except CorruptDatabase:
        return 0
    return 0 if saved is None else saved.sequence
