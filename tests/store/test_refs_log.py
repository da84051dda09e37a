"""refs.log: a change of refs is on disk in a line of it; with refs.json it says at any time what the database says."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from store_sessions import commit, tokens

from thaw.core.canonical import U64
from thaw.core.errors import RefConflict
from thaw.core.ids import CommitId, StateId
from thaw.core.objects import Commit, in_namespace
from thaw.store import RefUpdate, Store, backup, fsck, refslog, saving

MANY = 3000


def made(path: Path, num: int = 0) -> Store:
    """A repository with `main` and other branches, whose refs.json was written by this store."""
    store = Store.init(path)
    first = commit(store, tokens(30))
    if num:
        store.update_refs(*(RefUpdate(f"s/{i:04}", "branch", first, None, "made") for i in range(num)))
    store.saver.write()
    return store


def saved(store: Store) -> bytes:
    found, whole = refslog.read(store.path)
    assert found is not None and whole
    return backup.encode(found)


def said(store: Store) -> bytes:
    with store.database.read() as connection:
        return backup.encode(backup.collect(connection))


def log_of(store: Store) -> Path:
    return store.path / refslog.NAME


def moved(store: Store) -> dict[str, str]:
    return {ref.name: ref.target for ref in store.refs()}


def test_a_commit_among_many_refs_writes_a_line_and_no_other_ref(tmp_path: Path) -> None:
    with made(tmp_path / "repo", MANY) as store:
        before = (store.path / "refs.json").stat()
        for i in range(10):
            commit(store, tokens(30, seed=i))
            assert saved(store) == said(store)
        after = (store.path / "refs.json").stat()
        assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
        assert log_of(store).stat().st_size < before.st_size / 50
    assert not log_of(store).exists(), "closing writes refs.json"
    assert saved(store) == backup.encode(backup.read(store.path))
    assert b"thaw.refs/1" in (store.path / "refs.json").read_bytes()


def test_a_line_is_on_disk_before_the_change_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        real(fd)

    with made(tmp_path / "repo") as store:
        (target,) = moved(store).values()
        monkeypatch.setattr(os, "fsync", fsync)
        store.update_refs(RefUpdate("one", "tag", target, None, "made"))
        assert synced == [refslog.NAME, "repo"], "and the name of a log that is new"
        store.update_refs(RefUpdate("two", "tag", target, None, "made"))
        assert synced == [refslog.NAME, "repo", refslog.NAME]


@pytest.mark.parametrize("seed", range(4))
def test_log_and_refs_json_say_what_the_database_says(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is changed, in whichever of two open stores, and however often refs.json is written."""
    dice = random.Random(seed)
    monkeypatch.setattr(saving, "LOG_BYTES", dice.choice([3000, 64 << 10]))
    stores = [made(tmp_path / "repo"), Store.open(tmp_path / "repo")]
    commits = [commit(stores[0], tokens(30, seed=i), branch=None) for i in range(3)]
    lines = 0
    for step in range(45):
        store = dice.choice(stores)
        view = store.within("acme") if seed % 2 and dice.random() < 0.1 else store
        name, kind = dice.choice([("a", "branch"), ("b", "branch"), ("c/d", "branch"), ("t", "tag")])
        ref = view.ref(name)
        what = dice.random()
        if view is not store:
            commit_in(view, step)
        elif what < 0.1:
            store.set_setting(f"key{dice.randrange(2)}", f"value {dice.randrange(3)}")
        elif what < 0.15:
            store.set_head(dice.choice(["main", "a"]))
        elif what < 0.25:
            with pytest.raises(RefConflict), store.begin() as tx:
                tx.commit(RefUpdate("main", "branch", dice.choice(commits), None, "lost the race"))
        elif what < 0.5 and ref is not None:
            store.update_refs(RefUpdate(name, kind, None, ref.target, "deleted"))
        else:
            reason = "x" * dice.choice([5, 5, 5, 400_000])
            store.update_refs(RefUpdate(name, kind, dice.choice(commits), "any", reason))
        assert saved(store) == said(store), step
        lines += log_of(store).exists()
    assert lines > 10
    for store in stores:
        store.close()
        assert fsck(store.path).problems == []


def commit_in(view: Store, seed: int) -> None:
    state = StateId(_state(view))
    value = Commit(state=state, parents=(), message="m", time_ns=U64(seed + 1), branch="main")
    with view.begin() as tx:
        one = CommitId(tx.put(in_namespace(value, "acme")))
        tx.commit(RefUpdate("main", "branch", one, "any", "commit"))


def _state(view: Store) -> str:
    with view.database.read() as connection:
        return str(connection.execute("SELECT id FROM objects WHERE kind = 'state'").fetchone()[0])


def test_a_lost_database_is_made_again_with_what_the_log_says(tmp_path: Path) -> None:
    """Of a process that was killed: nothing was closed, and refs.json is that of before."""
    store = made(tmp_path / "repo")
    (first,) = moved(store).values()
    second = commit(store, tokens(40), parents=(first,), expect=first)
    store.update_refs(RefUpdate("gone", "branch", second, None, "made"), RefUpdate("tag", "tag", second, None, "made"))
    store.update_refs(RefUpdate("gone", "branch", None, second, "deleted"))
    store.update_refs(RefUpdate("main", "branch", first, second, "back"))
    wanted, reflog = moved(store), store.reflog("main")
    assert log_of(store).stat().st_size and b'"tag"' not in (store.path / "refs.json").read_bytes().split(b"reflog")[0]
    copy = Path(shutil.copytree(store.path, tmp_path / "copy"))
    for file in copy.glob("thaw.db*"):
        file.unlink()
    assert fsck(copy, rebuild=True).ok
    with Store.open(copy) as again:
        assert moved(again) == wanted == {"main": first, "tag": second}
        assert again.reflog("main") == reflog
    (copy / refslog.NAME).unlink(missing_ok=True)
    store.close()


def test_a_database_that_is_older_than_the_log_has_lost_something(tmp_path: Path) -> None:
    store = made(tmp_path / "repo")
    copy = Path(shutil.copytree(store.path, tmp_path / "copy"))
    commit(store, tokens(40), branch="new")
    shutil.copy(log_of(store), copy)
    problems = fsck(copy).problems
    assert any("it lost some" in problem.what for problem in problems)
    store.close()


def test_every_bit_and_every_byte_of_the_log_counts(tmp_path: Path) -> None:
    """A flipped bit is noticed, and a cut that is not at a line's end; what follows is not believed."""
    store = made(tmp_path / "repo")
    states = [backup.encode(backup.read(store.path))]
    for i in range(3):
        commit(store, tokens(30, seed=i), branch=f"b{i}")
        states.append(said(store))
    data, dice = log_of(store).read_bytes(), random.Random(1)
    base = backup.read_digest(store.path)
    for at in dice.sample(range(len(data) * 8), 200):
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        lines, whole = refslog.parse(bytes(flipped), base)
        assert not whole and len(lines) < 3, at
    for end in {0, 1, *dice.sample(range(len(data)), 200), *(i + 1 for i, byte in enumerate(data) if byte == 10)}:
        lines, whole = refslog.parse(data[:end], base)
        assert whole == (end == 0 or data[:end].endswith(b"\n"))
        assert backup.encode(refslog.brought_up(backup.read(store.path), lines)) in states
    log_of(store).write_bytes(data[:-7])
    assert [problem.file for problem in fsck(store.path).problems] == [refslog.NAME]
    commit(store, tokens(30, seed=9), branch="healed")
    assert saved(store) == said(store) and fsck(store.path).problems == []
    log_of(store).write_bytes(data + b"{}")
    assert fsck(store.path).problems == [], "of another refs.json"
    store.close()


def test_a_log_of_another_refs_json_says_nothing(tmp_path: Path) -> None:
    store = made(tmp_path / "repo")
    commit(store, tokens(30), branch="old")
    old = log_of(store).read_bytes()
    store.set_setting("key", "value")
    assert not log_of(store).exists()
    log_of(store).write_bytes(old)
    assert saved(store) == said(store)
    commit(store, tokens(30, seed=2), branch="new")
    assert saved(store) == said(store)
    store.close()
    assert fsck(store.path).problems == []
