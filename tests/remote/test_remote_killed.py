"""Killed at any request, push, fetch and gc leave both sides whole, and continue with what they had."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import commit, files, read_all, remote, tokens, wish
from killed_child import AT_ONCE, SMALL

import thaw
from thaw.core.errors import Conflict
from thaw.remote.fetch import fetch
from thaw.remote.gc import collect
from thaw.remote.push import PushWish, push
from thaw.store import Store

KILLS = 20
CHILD = Path(__file__).with_name("killed_child.py")
SOURCE = Path(__file__).resolve().parents[2] / "src"


def run(verb: str, repo: Path, bucket: Path, last: int) -> int | None:
    """Bytes that were moved, or None where the child was killed."""
    words = [sys.executable, str(CHILD), verb, str(repo), str(bucket), str(last)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(SOURCE), str(CHILD.parent)))}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    if done.returncode == -signal.SIGKILL:
        return None
    assert done.returncode == 0, done.stderr
    return int(done.stdout or 0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Some 600 KiB of KV on three branches, in packs of 32 KiB once they are pushed."""
    made = Store.init(tmp_path / "here")
    first = commit(made, tokens(3000), branch="main")
    for number in range(2):
        commit(made, tokens(4000, number + 1), branch=f"fork/{number}", parents=(first,))
    return made


def look(store: Store) -> None:
    """Everything that is visible is whole."""
    for one in store.commits():
        read_all(store, one)
    assert store.fsck().ok


def stored(bucket: Path) -> int:
    return sum(path.stat().st_size for path in files(bucket, "packs"))


@pytest.mark.slow("twenty processes, each killed")
def test_a_push_that_is_killed_goes_on_and_sends_little_again(store: Store, bucket: Path, tmp_path: Path) -> None:
    chance, sent = random.Random(1), 0
    for number in range(KILLS):
        before = stored(bucket)
        moved = run("push", store.path, bucket, chance.randint(1, 10 + 4 * number))
        sent += stored(bucket) - before
        if moved is not None:
            break
        with Store.init(tmp_path / f"there{number}") as there:
            if (bucket / "thaw.json").exists():
                fetch(there, remote(bucket))
            look(there)
    assert number >= 5, "it was killed that often"
    whole = stored(bucket)
    last = push(store, remote(bucket), [wish(store, ref.name) for ref in store.refs("branch")], tuning=SMALL)
    assert sent == whole and last.nbytes + whole == stored(bucket), "no pack was sent twice"
    with Store.init(tmp_path / "there") as there:
        assert fetch(there, remote(bucket)).num_commits == 3
        look(there)
        assert {ref.target for ref in there.refs()} == {ref.target for ref in store.refs("branch")}


@pytest.mark.slow("twenty processes, each killed")
def test_a_fetch_that_is_killed_leaves_nothing_half_and_goes_on(store: Store, bucket: Path, tmp_path: Path) -> None:
    push(store, remote(bucket), [wish(store, ref.name) for ref in store.refs("branch")], tuning=SMALL)
    there = tmp_path / "there"
    Store.init(there).close()
    chance, killed = random.Random(2), 0
    for number in range(KILLS):
        killed += run("fetch", there, bucket, chance.randint(1, 6 + 4 * number)) is None
        with Store.open(there) as opened:
            look(opened)
    assert killed >= 3
    run("fetch", there, bucket, 10_000)
    with Store.open(there) as opened:
        assert {ref.target for ref in opened.refs()} == {ref.target for ref in store.refs("branch")}
        look(opened)
        assert opened.gc().nbytes_freed >= 0 and {ref.name for ref in opened.refs()} >= {"origin/main"}
        look(opened)


@pytest.mark.slow("five processes, four of them killed")
def test_a_clone_that_is_killed_says_how_to_go_on_and_does(store: Store, bucket: Path, tmp_path: Path) -> None:
    store.set_head("fork/1")
    push(store, remote(bucket), [wish(store, ref.name) for ref in store.refs("branch")], tuning=SMALL)
    tip = store.ref("fork/1")
    assert tip is not None
    went_on = 0
    for number in (6, 15, 24, 33):
        there = tmp_path / f"there{number}"
        assert run("clone", there, bucket, number) is None
        if not (there / "thaw.db").exists():
            continue
        with pytest.raises(Conflict, match=r"interrupted here.* fetch` and then `pull"):
            thaw.clone(bucket.as_uri(), there)
        with thaw.open(there) as repo:
            look(repo.store)
            repo.fetch()
            assert repo.store.head == "fork/1" and repo.pull().refs[-1].new == tip.target
            look(repo.store)
            went_on += 1
    assert went_on >= 2
    run("clone", tmp_path / "whole", bucket, 10_000)
    with thaw.open(tmp_path / "whole") as repo:
        assert repo.resolve("HEAD").commit == tip.target


@pytest.mark.slow("twenty processes, each killed")
def test_a_gc_that_is_killed_leaves_every_branch_whole(store: Store, bucket: Path, tmp_path: Path) -> None:
    chance, killed = random.Random(3), 0
    for number in range(KILLS // 2):
        push(store, remote(bucket), [wish(store, ref.name) for ref in store.refs("branch")], tuning=SMALL)
        push(store, remote(bucket), [PushWish("branch", f"fork/{number % 2}", None)])
        for _ in range(2):
            killed += run("gc", store.path, bucket, chance.randint(1, 30)) is None
        with Store.init(tmp_path / f"there{number}") as there:
            fetch(there, remote(bucket))
            look(there)
            assert {ref.name for ref in there.refs()} == {"origin/main", f"origin/fork/{1 - number % 2}"}
    assert killed >= 5
    for _ in range(3):
        collect(remote(bucket), AT_ONCE)
    with Store.init(tmp_path / "last") as there:
        fetch(there, remote(bucket))
        look(there)
