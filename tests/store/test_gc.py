"""Laws of gc: everything reachable stays and verifies, everything else goes, whoever else is at work."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from store_sessions import commit, folder_bytes, put_session, read_all, stored_entries, tokens

from thaw.core.canonical import U64
from thaw.core.errors import Busy, Conflict, NotFound, RefConflict
from thaw.core.objects import Commit
from thaw.data.pack import MissingPack, read_blob
from thaw.repo import match
from thaw.store import RefUpdate, Store, gc
from thaw.store.locks import locked


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.init(tmp_path / "repo")


def delete(store: Store, name: str) -> None:
    store.update_refs(RefUpdate(name, "branch", None, "any", "delete"))


def test_gc_keeps_everything_reachable_and_removes_the_rest(store: Store) -> None:
    kept = commit(store, tokens(600))
    commit(store, tokens(600, seed=1), branch="gone")
    size = folder_bytes(store.packs)
    delete(store, "gone")
    assert store.gc().objects_removed == 0, "the reflog still names it"
    report = store.gc(keep_reflog_s=0)
    assert report.commits_removed == 1 and report.packs_removed == 2
    assert folder_bytes(store.packs) == size - report.nbytes_freed == report.nbytes_kept
    read_all(store, kept)
    assert store.fsck().ok
    assert list(store.commits()) == [kept]
    assert store.gc(keep_reflog_s=0).objects_removed == 0


def test_gc_that_is_killed_between_two_transactions_leaves_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole by fsck, and what lives is found by its tokens, also where the state that it was found through is dead."""
    monkeypatch.setattr(gc, "BATCH", 2)
    path, done = tmp_path / "repo", 0
    with Store.init(path) as store:
        first = commit(store, tokens(600))
        kept = commit(store, tokens(900), base=first, branch="kept")
        commit(store, tokens(600, seed=1), branch="gone")
        commit(store, tokens(900, seed=2), branch="gone-too")
        for name in ("main", "gone", "gone-too"):
            delete(store, name)
    while True:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        with Store.open(shutil.copytree(path, tmp_path / "copy")) as store:
            ended = not killed_after(done, store, monkeypatch)
            assert store.fsck().problems == []
            found = match.match(store, store.models(), (*tokens(300), *tokens(300, seed=9)))
            assert found is not None and found.num_tokens == 300
            read_all(store, kept)
            assert store.gc(keep_reflog_s=0).nbytes_kept == folder_bytes(store.packs)
            assert store.fsck().ok and list(store.commits()) == [kept]
        if ended:
            break
        done += 1
    assert done > 15


@pytest.mark.parametrize("again", ["the same", "the same, the KV known", "what followed it"])
def test_what_is_committed_again_after_gc_was_killed_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    """Objects may be stored still whose rows gc has taken already."""
    monkeypatch.setattr(gc, "BATCH", 2)
    path, done, ended = tmp_path / "repo", 0, False
    with Store.init(path) as store:
        commit(store, tokens(300, seed=9), branch="other")
        first = commit(store, tokens(600), branch="gone")
        delete(store, "gone")
    while not ended:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        with Store.open(shutil.copytree(path, tmp_path / "copy")) as store:
            entries = () if again == "the same" else stored_entries(store, first)
            length = 900 if again == "what followed it" else 600
            ended = not killed_after(done, store, monkeypatch)
            with contextlib.suppress(Conflict):
                commit(store, tokens(length), branch="again", base=entries)
                found = match.match(store, store.models(), (*tokens(length - 1), 7))
                assert found is not None and found.num_tokens == length - 1
            assert store.fsck().problems == []
            store.gc(keep_reflog_s=0)
            assert store.fsck().problems == []
        done += 1
    assert done > 8


def killed_after(num: int, store: Store, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run gc up to its transaction `num`, let go of its leases as of a dead process; False where it had no more."""
    left, write = [num], store.database.write

    @contextlib.contextmanager
    def counted(**how: bool) -> Iterator[sqlite3.Connection]:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        with write(**how) as connection:
            yield connection

    with monkeypatch.context() as patch:
        patch.setattr(store.database, "write", counted)
        try:
            store.gc(keep_reflog_s=0)
            return False
        except KeyboardInterrupt:
            pass
    with store.database.write() as connection:
        connection.execute("DELETE FROM leases")
    return True


def test_the_reflog_holds_commits_until_its_limit(store: Store) -> None:
    first = commit(store, tokens(300))
    commit(store, tokens(310, seed=2))
    assert store.gc().commits_removed == 0
    assert store.gc(now=time.time() + 89 * 86400).commits_removed == 0
    read_all(store, first)
    assert store.gc(now=time.time() + 91 * 86400).commits_removed == 1


def test_a_dry_run_says_what_gc_would_do_and_does_nothing(store: Store) -> None:
    commit(store, tokens(600))
    commit(store, tokens(600, seed=1), branch="gone")
    delete(store, "gone")
    (store.packs / "left.safetensors.tmp").write_bytes(b"x" * 100)
    before = sorted(os.listdir(store.packs))
    would = store.gc(dry_run=True, keep_reflog_s=0)
    assert sorted(os.listdir(store.packs)) == before
    did = store.gc(keep_reflog_s=0)
    for field in (
        "commits_removed",
        "objects_removed",
        "blobs_removed",
        "packs_removed",
        "orphans_removed",
        "nbytes_freed",
    ):
        assert getattr(would, field) == getattr(did, field), field


def test_a_shared_prefix_stays_for_the_survivor_and_is_found_through_it(store: Store) -> None:
    first = commit(store, tokens(600))
    second = commit(store, tokens(900), branch="long", base=first)
    delete(store, "main")
    store.gc(keep_reflog_s=0)
    assert list(store.commits()) == [second]
    read_all(store, second)
    state = store.get_as(second, Commit).state
    for entry in stored_entries(store, second):
        segment = store.get(entry.segment)
        assert (entry.segment, state) in store.find_segments(segment.window)
    assert store.fsck().ok


def test_mostly_dead_packs_are_rewritten_without_changing_an_id(store: Store) -> None:
    first = commit(store, tokens(300))
    with store.begin() as tx:
        long = tx.put(put_session(tx, store, tokens(3000), first))
        tx.put(Commit(state=long, parents=(), message="unused", time_ns=U64(1), branch=None))
        tx.commit()
    second = commit(store, tokens(520), branch="b", base=first)
    with store.reading():
        before = store.locate(store.get(stored_entries(store, second)[-1].segment).blobs["full"])
    size = folder_bytes(store.packs)
    report = store.gc(keep_reflog_s=0)
    assert report.packs_rewritten >= 1 and folder_bytes(store.packs) < size / 2
    read_all(store, second)
    assert store.fsck().ok
    place = next(iter(before.values()))
    if not (store.packs / place.pack).exists():
        with pytest.raises(MissingPack):
            read_blob(store.packs, place)
    assert read_blob(store.packs, store.locate([place.blob])[place.blob])


def test_many_small_packs_are_put_together(store: Store) -> None:
    parents: tuple[str, ...] = ()
    for number in range(40):
        parents = (commit(store, tokens(5 + number), parents=parents),)
    assert len(os.listdir(store.packs)) == 80
    report = store.gc()
    assert report.packs_rewritten == 80
    assert len(os.listdir(store.packs)) == 1
    assert report.commits_removed == 0
    for one in store.commits():
        read_all(store, one)
    assert store.fsck().ok


def test_gc_unlinks_nothing_that_a_reader_may_be_reading(store: Store) -> None:
    first = commit(store, tokens(600))
    places = list(store.locate(store.get(stored_entries(store, first)[0].segment).blobs["full"]).values())
    with store.reading():
        delete(store, "main")
        report = store.gc(keep_reflog_s=0)
        assert (report.packs_waiting, report.packs_removed) == (2, 0)
        read_blob(store.packs, places[0])
    assert store.gc(keep_reflog_s=0).packs_removed == 2
    assert os.listdir(store.packs) == []


def test_a_lease_keeps_its_roots(store: Store) -> None:
    first = commit(store, tokens(300), branch=None)
    with store.reading(first):
        assert store.gc(keep_reflog_s=0).commits_removed == 0
    with store.begin(first):
        assert store.gc(keep_reflog_s=0).commits_removed == 0
    assert store.gc(keep_reflog_s=0).commits_removed == 1


def test_files_of_a_running_writer_stay_and_orphans_go(store: Store) -> None:
    with store.begin() as tx:
        state = put_session(tx, store, tokens(300))
        (store.packs / "dead.safetensors").write_bytes(b"x")
        (store.packs / f"{tx.pack}.tmp").write_bytes(b"being written")
        assert store.gc(keep_reflog_s=0).orphans_removed == 1
        assert sorted(os.listdir(store.packs)) == sorted([tx.pack, f"{tx.pack}.tmp"])
        one = tx.put(Commit(state=tx.put(state), parents=(), message="", time_ns=U64(1)))
        tx.commit(RefUpdate("main", "branch", one, None, "r"))
    read_all(store, one)


def test_a_dead_process_leaves_no_lease(store: Store) -> None:
    pid = os.fork()
    if pid == 0:
        tx = store.begin()
        put_session(tx, store, tokens(300))
        os._exit(0)
    os.waitpid(pid, 0)
    assert len(os.listdir(store.packs)) == 1
    assert store.gc().orphans_removed == 1
    with store.database.read() as connection:
        assert connection.execute("SELECT count(*) FROM leases").fetchone() == (0,)


def test_a_commit_that_needs_what_gc_took_is_refused_or_writes_it_again(store: Store) -> None:
    first = commit(store, tokens(300), branch=None)
    with store.begin() as tx:
        state = put_session(tx, store, tokens(400), first)
        identifier = tx.put(Commit(state=tx.put(state), parents=(), message="", time_ns=U64(1)))
        assert store.gc(keep_reflog_s=0).commits_removed == 1
        with pytest.raises(Conflict, match="gc removed them meanwhile"):
            tx.commit(RefUpdate("main", "branch", identifier, None, "r"))
    assert os.listdir(store.packs) == []
    again = commit(store, tokens(400))
    read_all(store, again)


def test_one_gc_at_a_time(store: Store) -> None:
    with locked(store.path / "gc.lock"), pytest.raises(Busy, match="another gc"):
        store.gc()


def _commit_in_a_loop(path: Path, seed: int, until: float, pipe) -> None:  # type: ignore[no-untyped-def]
    store = Store.open(path)
    number, tip = 0, None
    while time.time() < until:
        number += 1
        try:
            tip = commit(store, tokens(200 + number, seed), branch=f"b{seed}", expect=tip, base=tip)
        except RefConflict:
            raise
        except Conflict:
            continue
        if number % 5 == 0:
            delete(store, f"b{seed}")
            tip = None
    pipe.send((number, tip))


@pytest.mark.slow("commits and collects for six seconds")
def test_gc_beside_commits_of_other_processes_loses_nothing(store: Store) -> None:
    until = time.time() + 6
    spawn = multiprocessing.get_context("spawn")
    pipes, children = [], []
    for seed in (1, 2):
        here, there = spawn.Pipe()
        child = spawn.Process(target=_commit_in_a_loop, args=(store.path, seed, until, there))
        child.start()
        pipes.append(here)
        children.append(child)
    runs = 0
    while any(child.is_alive() for child in children):
        store.gc(keep_reflog_s=0)
        runs += 1
    for child, pipe in zip(children, pipes, strict=True):
        child.join()
        assert child.exitcode == 0
        number, tip = pipe.recv()
        assert number > 5
        if tip is not None:
            read_all(store, tip)
    assert runs > 3
    assert store.fsck().problems == []
    store.gc(keep_reflog_s=0)
    assert store.fsck().problems == []


def test_threads_commit_read_and_collect_at_the_same_time(store: Store) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            tip = None
            for number in range(12):
                tip = commit(
                    store, tokens(200 + number, seed), branch=f"b{seed}", expect=tip, parents=(tip,) if tip else ()
                )
                with store.reading():
                    read_all(store, tip)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        store.gc(keep_reflog_s=0)
    assert errors == []
    assert len(list(store.commits())) == 48
    assert store.fsck().problems == []


class Histories(RuleBasedStateMachine):
    """Random histories of commit, fork, branch, delete, crash and gc, against a model: a graph of sets."""

    commits = Bundle("commits")

    @initialize()
    def make(self) -> None:
        import tempfile

        self.folder = Path(tempfile.mkdtemp(prefix="thaw-gc-"))
        self.store = Store.init(self.folder / "repo")
        self.parents: dict[str, tuple[str, ...]] = {}
        self.refs: dict[str, str] = {}
        self.number = 0

    @rule(target=commits, name=st.sampled_from(["a", "b", "c"]), size=st.integers(2, 700))
    def commit_new(self, name: str, size: int) -> str:
        self.number += 1
        return self._commit(name, tokens(size, self.number), None)

    @rule(target=commits, name=st.sampled_from(["a", "b", "c"]), size=st.integers(1, 400), base=commits)
    def commit_on(self, name: str, size: int, base: str) -> str:
        if base not in self._alive():
            return base
        self.number += 1
        old = self.store.get(self.store.get(base).state)
        prefix = tuple(t for e in stored_entries(self.store, base) for t in self.store.get(e.segment).tokens)
        return self._commit(name, prefix + old.tail_tokens + tokens(size, self.number), base)

    def _commit(self, name: str, new: tuple[int, ...], base: str | None) -> str:
        parents = () if base is None else (base,)
        one = commit(self.store, new, branch=name, parents=parents, expect=self.refs.get(name), base=base)
        self.parents[one], self.refs[name] = parents, one
        return one

    @rule(name=st.sampled_from(["a", "b", "c"]), to=commits)
    def move(self, name: str, to: str) -> None:
        update = RefUpdate(name, "branch", to, self.refs.get(name), "move")
        if to in self._alive() or self.store.has(to):
            self.store.update_refs(update)
            self.refs[name] = to
        else:
            with pytest.raises(NotFound):
                self.store.update_refs(update)

    @rule(name=st.sampled_from(["a", "b", "c"]))
    def remove(self, name: str) -> None:
        if name in self.refs:
            delete(self.store, name)
            del self.refs[name]

    @rule()
    def collect(self) -> None:
        would = self.store.gc(keep_reflog_s=0, dry_run=True)
        did = self.store.gc(keep_reflog_s=0)
        assert would.objects_removed == did.objects_removed
        assert set(self.store.commits()) == self._alive()

    @rule()
    def rebuild(self) -> None:
        self.store.close()
        (self.store.path / "thaw.db").unlink()
        assert self._fsck(rebuild=True).ok
        self.store = Store.open(self.store.path)

    def _fsck(self, rebuild: bool = False):  # type: ignore[no-untyped-def]
        from thaw.store import fsck

        return fsck(self.store.path, rebuild=rebuild)

    def _alive(self) -> set[str]:
        alive: set[str] = set()
        pending = list(self.refs.values())
        while pending:
            one = pending.pop()
            if one not in alive:
                alive.add(one)
                pending.extend(self.parents[one])
        return alive

    @invariant()
    def refs_stand_where_the_model_says(self) -> None:
        if hasattr(self, "store"):
            assert {ref.name: ref.target for ref in self.store.refs()} == self.refs

    def teardown(self) -> None:
        if hasattr(self, "store"):
            for one in self._alive():
                read_all(self.store, one)
            assert self._fsck().problems == []
            self.store.close()
            shutil.rmtree(self.folder)


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
