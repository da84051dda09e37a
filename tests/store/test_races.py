"""fsck and `fsck --rebuild` beside those who write: what is sound is called sound, and no commit that returned is lost.

What others do is done at each step of fsck in turn, so that no test depends on who is how fast.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from store_sessions import commit, put_session, read_all, tokens

from thaw.core.canonical import U64
from thaw.core.errors import Busy, Conflict, RefConflict, StorageFailed
from thaw.core.objects import Commit
from thaw.store import RefUpdate, Store, backup, checkup, db, fsck, rebuild
from thaw.store.db import Database

LOOKS = ((backup, "read"), (Database, "_take"), (Database, "_give_back"), (checkup, "list_packs"))
REBUILDS = (
    (backup, "read"), (rebuild, "list_packs"), (rebuild, "scan_packs"), (rebuild, "salvage"), (rebuild, "_collect"),
    (rebuild, "_fill"), (db, "_set_aside"), (db, "sync_folder"), (checkup, "check_tables"),
)  # fmt: skip
Steps = tuple[tuple[object, str], ...]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    with Store.init(tmp_path / "repo") as store:
        first = commit(store, tokens(300))
        commit(store, tokens(520), base=first, parents=(first,), branch="other")
        yield store


def at_each_step(
    monkeypatch: pytest.MonkeyPatch, steps: tuple[tuple[object, str], ...], act: Callable[[], None]
) -> None:
    """From now on `act` runs before and after each of these calls, but for its own."""
    acting = []

    def moment() -> None:
        if not acting:
            acting.append(True)
            act()
            acting.clear()

    def around(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def stepped(*args: object, **how: object) -> object:
            moment()
            try:
                return real(*args, **how)
            finally:
                moment()

        monkeypatch.setattr(owner, name, stepped)

    for owner, name in steps:
        around(owner, name)


def damage(path: Path) -> None:
    """A row that is no pack's: everything else is sound, and everybody goes on."""
    with sqlite3.connect(path / "thaw.db") as connection:
        connection.execute("INSERT OR REPLACE INTO packs VALUES ('none', 1, NULL, 5)")
    connection.close()


class Others:
    """Who commits, deletes a branch and collects garbage in a store of their own, one of these at a time."""

    def __init__(self, path: Path) -> None:
        self.store = Store.open(path)
        self.num = 0

    def act(self) -> None:
        self.num += 1
        commit(self.store, tokens(30, seed=self.num), branch=f"b{self.num}")
        if self.num % 3 == 0:
            ref = self.store.ref(f"b{self.num - 1}")
            assert ref is not None
            self.store.update_refs(RefUpdate(ref.name, "branch", None, ref.target, "deleted"))
            self.store.gc(keep_reflog_s=0)


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "quick"])
@pytest.mark.parametrize("broken", [False, True], ids=["sound", "broken-pack"])
def test_fsck_beside_others_names_what_is_broken_and_nothing_else(
    store: Store, monkeypatch: pytest.MonkeyPatch, deep: bool, broken: bool
) -> None:
    pack = max(store.packs.iterdir(), key=lambda file: file.stat().st_size)
    if broken:
        os.truncate(pack, pack.stat().st_size - 100)
    others = Others(store.path)
    at_each_step(monkeypatch, LOOKS, others.act)
    report = fsck(store.path, deep=deep)
    assert others.num > 10
    assert {problem.file for problem in report.problems} == ({f"packs/{pack.name}"} if broken else set())
    assert not fsck(store.path, deep=deep, rebuild=True).rebuilt


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "quick"])
def test_a_commit_that_returned_at_any_step_of_a_rebuild_is_in_the_new_database(
    store: Store, monkeypatch: pytest.MonkeyPatch, deep: bool
) -> None:
    """Those that come while the database is exchanged wait; here they are told so at once."""
    monkeypatch.setattr(db, "BUSY_S", 0.0)
    damage(store.path)
    returned: dict[str, str] = {}
    busy = []

    def act() -> None:
        name = f"b{len(returned)}"
        try:
            returned[name] = commit(store, tokens(30, seed=len(returned)), branch=name)
        except Busy:
            busy.append(name)

    at_each_step(monkeypatch, REBUILDS, act)
    report = fsck(store.path, deep=deep, rebuild=True)
    monkeypatch.undo()
    assert report.ok and report.rebuilt
    assert len(returned) > 8 and len(busy) > 8
    store.gc(keep_reflog_s=0)
    assert {ref.name: ref.target for ref in store.refs() if ref.name in returned} == returned
    for one in returned.values():
        read_all(store, one)
    assert fsck(store.path).ok


@pytest.mark.parametrize("readable", [True, False])
def test_a_commit_that_is_being_written_outlives_a_rebuild_or_is_told_to_begin_again(
    store: Store, readable: bool
) -> None:
    """It takes away no pack that the new database has."""
    with store.reading(), store.begin() as tx:
        state = tx.put(put_session(tx, store, tokens(700, seed=5)))
        one = tx.put(Commit(state=state, parents=(), message="m", time_ns=U64(1), branch="new"))
        if readable:
            damage(store.path)
        else:
            for file in store.path.glob("thaw.db*"):
                file.unlink()
        assert fsck(store.path, rebuild=True).ok
        update = RefUpdate("new", "branch", one, None, "commit")
        if readable:
            store.gc(keep_reflog_s=0)
            tx.commit(update)
        else:
            with pytest.raises(Conflict, match="Commit again"):
                tx.commit(update)
            tx.abort()
    assert fsck(store.path).ok
    if readable:
        read_all(store, one)
    one = commit(store, tokens(700, seed=5), branch="again")
    store.gc(keep_reflog_s=0)
    read_all(store, one)
    assert fsck(store.path).ok


def test_a_reader_keeps_its_packs_through_a_rebuild(store: Store) -> None:
    other = store.ref("other")
    assert other is not None
    with store.reading(other.target):
        damage(store.path)
        assert fsck(store.path, rebuild=True).ok
        store.update_refs(RefUpdate("other", "branch", None, "any", "deleted"))
        store.gc(keep_reflog_s=0)
        read_all(store, other.target)
    assert store.gc(keep_reflog_s=0).commits_removed == 1


def test_a_rebuild_waits_for_who_is_writing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(store.path)
    monkeypatch.setattr(rebuild, "BUSY_S", 0.0)
    before = (store.path / "thaw.db").stat().st_ino
    with store.database.write() as connection:
        with pytest.raises(Busy, match="has been writing"):
            rebuild.rebuild(store.path, {})
        connection.execute("UPDATE settings SET value = value")
    assert (store.path / "thaw.db").stat().st_ino == before
    assert fsck(store.path, rebuild=True).ok


def test_who_waited_to_write_writes_into_the_new_database(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection was to the old one already."""
    damage(store.path)
    scans = checkup.scan_packs(store.packs, checkup.list_packs(store.packs), deep=False)
    take = Database._take

    def take_and_wait(self: Database) -> object:
        taken = take(self)
        monkeypatch.undo()
        rebuild.rebuild(store.path, scans)
        return taken

    monkeypatch.setattr(Database, "_take", take_and_wait)
    store.set_setting("key", "value")
    with Store.open(store.path) as again:
        assert again.get_setting("key") == "value"


def test_many_readers_at_once_leave_few_connections_open(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has pages of its own: what a burst of requests opened is closed again, and all of them could read."""
    num, read, opened, connect = 3 * db.IDLE, list[int](), list[sqlite3.Connection](), db.connect

    def kept(path: Path) -> sqlite3.Connection:
        opened.append(connect(path))
        return opened[-1]

    monkeypatch.setattr(db, "connect", kept)
    together = threading.Barrier(num)

    def reader() -> None:
        with store.database.read() as connection:
            together.wait(60)
            read.append(connection.execute("SELECT count(*) FROM refs").fetchone()[0])

    threads = [threading.Thread(target=reader) for _ in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read) == num and len(opened) > db.IDLE and sum(map(_is_open, opened)) <= db.IDLE


def _is_open(connection: sqlite3.Connection) -> bool:
    try:
        return connection.total_changes >= 0
    except sqlite3.ProgrammingError:
        return False


def test_a_write_into_a_file_that_is_no_longer_the_database_did_not_happen(store: Store) -> None:
    shutil.copy(store.path / "thaw.db", store.path / "copy")
    with pytest.raises(Conflict, match="replaced"), store.database.write() as connection:
        connection.execute("UPDATE settings SET value = value")
        os.replace(store.path / "copy", store.path / "thaw.db")


@pytest.mark.slow("kills a process at each step")
def test_a_rebuild_that_is_killed_at_any_step_leaves_a_repository(store: Store, tmp_path: Path) -> None:
    """Where it is killed before the end, the next finishes; `thaw.db` is there at any time."""
    kept = {ref.name: ref.target for ref in store.refs()}
    commit(store, tokens(40), branch="last")
    damage(store.path)
    (store.path / "refs.json").unlink()
    at = 0
    while True:
        copy = Path(shutil.copytree(store.path, tmp_path / f"copy-{at}"))
        pid = os.fork()
        if pid == 0:
            _die_at(at)
            fsck(copy, rebuild=True)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert (copy / "thaw.db").is_file()
        assert fsck(copy, rebuild=True).ok
        with Store.open(copy) as again:
            found = {ref.name: ref.target for ref in again.refs()}
            assert found == {**kept, "last": found["last"]}
            for one in found.values():
                read_all(again, one)
        if ended:
            break
        at += 1
    assert at > 5


def _die_at(num: int) -> None:
    left = [num]

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **how: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return real(*args, **how)

        return call

    for name in ("rename", "link", "unlink", "fsync"):
        setattr(os, name, dying(getattr(os, name)))


def _commit_until(path: Path, worker: int, stop, pipe) -> None:  # type: ignore[no-untyped-def]
    returned, refused = {}, 0
    with Store.open(path) as store:
        while not stop.is_set() or len(returned) < 3:
            name = f"w{worker}/{len(returned)}"
            try:
                returned[name] = commit(store, tokens(40, seed=1000 * worker + len(returned)), branch=name)
            except (Conflict, RefConflict):
                refused += 1
    pipe.send((returned, refused))


def test_rebuilds_beside_processes_that_commit_lose_nothing(store: Store) -> None:
    spawn = multiprocessing.get_context("fork")
    stop = spawn.Event()
    pipes = [spawn.Pipe() for _ in range(2)]
    workers = [spawn.Process(target=_commit_until, args=(store.path, i, stop, pipes[i][1])) for i in range(2)]
    for worker in workers:
        worker.start()
    rebuilt = 0
    while rebuilt < 6:
        damage(store.path)
        try:
            rebuilt += fsck(store.path, rebuild=True).rebuilt
        except Busy:
            continue  # a worker puts small packs together
    stop.set()
    returned: dict[str, str] = {}
    for pipe, _ in pipes:
        returned |= pipe.recv()[0]
    for worker in workers:
        worker.join()
    store.gc(keep_reflog_s=0)
    for name, one in returned.items():
        ref = store.ref(name)
        assert ref is not None and ref.target == one
        read_all(store, one)
    assert fsck(store.path).ok


# --- what is no damage


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "quick"])
def test_a_database_that_is_in_use_is_not_damaged(store: Store, monkeypatch: pytest.MonkeyPatch, deep: bool) -> None:
    monkeypatch.setattr(db, "BUSY_S", 0.0)
    store.close()
    before = (store.path / "thaw.db").stat().st_ino
    with sqlite3.connect(store.path / "thaw.db", isolation_level=None) as connection:
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        connection.execute("BEGIN IMMEDIATE")
        for rebuilding in (False, True):
            with pytest.raises(Busy):
                fsck(store.path, deep=deep, rebuild=rebuilding)
        connection.execute("ROLLBACK")
    connection.close()
    assert (store.path / "thaw.db").stat().st_ino == before
    assert fsck(store.path, deep=deep).ok


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "quick"])
def test_a_database_that_cannot_be_opened_is_not_damaged(store: Store, deep: bool) -> None:
    """At whatever step no more files may be opened."""
    store.close()
    before = (store.path / "thaw.db").stat().st_ino
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for more in range(12):
        pid = os.fork()
        if pid == 0:
            free = os.open("/", os.O_RDONLY)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + more, hard))
            try:
                report = fsck(store.path, deep=deep)
            except StorageFailed:
                os._exit(0)
            os._exit(0 if report.ok else 2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, more
    assert (store.path / "thaw.db").stat().st_ino == before
