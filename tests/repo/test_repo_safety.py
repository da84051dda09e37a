"""Laws under pressure: other processes, other threads, a read-only folder, and objects that lie."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import thaw
from thaw import Sampling
from thaw.core.canonical import U64
from thaw.core.errors import CorruptBlob, StorageFailed, ThawError
from thaw.core.objects import Commit, SegmentEntry, SegmentNode, State
from thaw.engines.base import Engine
from thaw.repo import Repository
from thaw.repo.timeline import read_entries, read_state

COMMITTER = """
import sys, thaw
from thaw.repo import CommitConflict
with thaw.load_engine("fake") as engine, thaw.open(sys.argv[1], engine=engine) as repo:
    s = repo.session("main")
    s.append(f"process {sys.argv[2]} was here. ")
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        print("won", s.commit(sys.argv[2]).commit)
    except CommitConflict as conflict:
        print("kept", conflict.commit, conflict)
"""


def test_of_processes_that_commit_to_one_branch_one_wins_and_all_are_kept(repo: Repository) -> None:
    s = repo.session()
    s.append("shared " * 100)
    base = s.commit("base", branch="main").commit
    command = [sys.executable, "-c", COMMITTER, str(repo.path)]
    env = {**os.environ, "PYTHONPATH": str(Path(thaw.__file__).resolve().parents[1])}
    racers = [
        subprocess.Popen([*command, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        for i in range(3)
    ]
    for racer in racers:
        assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    said = [racer.communicate(timeout=60)[0].split(maxsplit=2) for racer in racers]
    assert sorted(words[0] for words in said) == ["kept", "kept", "won"]
    for i, words in enumerate(said):
        shown = repo.show(words[1])
        assert shown.text.endswith(f"process {i} was here. ") and shown.entry.parents == (base,)
        assert (repo.resolve("main").commit == words[1]) == (words[0] == "won")
        assert words[0] == "won" or ("thaw adopt" in words[2] and words[1][3:19] in words[2])


def test_commits_and_gc_run_side_by_side(repo: Repository) -> None:
    stop, errors = threading.Event(), list[BaseException]()

    def work(name: str) -> None:
        s = repo.session()
        s.append(f"{name} " * 200)
        try:
            for i in range(12):
                s.generate("", Sampling(max_tokens=5, ignore_eos=True))
                s.commit(str(i), branch=name)
                if i % 4 == 3:
                    repo.delete_branch(name)
                    s = repo.session(s.parent)
                assert s.parent is not None
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            errors.append(error)

    def collect() -> None:
        while not stop.is_set():
            repo.gc()
            repo.gc(dry_run=True)

    gc, workers = threading.Thread(target=collect), [threading.Thread(target=work, args=(n,)) for n in "abc"]
    for thread in (gc, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    gc.join()
    assert errors == []
    for commit in repo.store.commits():
        assert repo.session(commit).num_tokens


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_repository_hydrates_or_says_that_it_cannot(tmp_path: Path, engine: Engine) -> None:
    path = tmp_path / "r"
    with thaw.open(path, engine=engine) as repo:
        s = repo.session()
        s.append("read only")
        s.commit("x", branch="main")
    for folder in (path / "packs", path):
        folder.chmod(0o500)
    try:
        with thaw.open(path, engine=engine) as there:
            assert there.session("main").tokens == s.tokens
    except StorageFailed as error:
        assert str(path) in str(error)
    finally:
        path.chmod(0o700)


def lie(change: Callable[[Repository, State], State]) -> Callable[[Repository], str]:
    """Store a commit whose state was changed, and return its id."""

    def make(repo: Repository) -> str:
        s = repo.session()
        s.append("z" * 600)
        s.generate("", Sampling(max_tokens=5))
        state = repo.store.get_as(s.commit().state, State)
        with repo.store.begin() as tx:
            changed = tx.put(change(repo, state))
            commit = tx.put(Commit(state=changed, parents=(), message="a lie", time_ns=U64(1)))
            tx.commit()
        return commit

    return make


def _nodes(edit: Callable[[list[SegmentEntry]], list[SegmentEntry]]) -> Callable[[Repository, State], State]:
    def change(repo: Repository, state: State) -> State:
        node = SegmentNode(entries=tuple(edit(list(read_entries(repo.store, state)))))
        with repo.store.begin() as tx:
            identifier = tx.put(node)
            tx.commit()
        return msgspec.structs.replace(state, nodes=(identifier,))

    return change


@pytest.mark.parametrize(
    "make",
    [
        lie(_nodes(lambda e: e[1:])),
        lie(_nodes(lambda e: e[:-1])),
        lie(_nodes(lambda e: [e[0], e[0], *e[2:]])),
        lie(_nodes(lambda e: [*e[:-1], msgspec.structs.replace(e[-1], length=256)])),
        lie(_nodes(lambda e: [msgspec.structs.replace(e[1], start=0), *e[1:]])),
        lie(lambda _, s: msgspec.structs.replace(s, num_turns=s.num_turns + 1)),
        lie(lambda _, s: msgspec.structs.replace(s, turn_nodes=())),
        lie(lambda _, s: msgspec.structs.replace(s, num_turns=0, turn_nodes=())),
        lie(lambda _, s: msgspec.structs.replace(s, turn_nodes=s.nodes)),
        lie(lambda _, s: msgspec.structs.replace(s, model=s.turn_nodes[0])),
        lie(lambda _, s: msgspec.structs.replace(s, tail_tokens=(*s.tail_tokens, 1), num_tokens=s.num_tokens + 1)),
    ],
)
def test_objects_that_contradict_one_another_are_refused(repo: Repository, make: Callable[[Repository], str]) -> None:
    commit = make(repo)
    for use in (repo.session, repo.show):
        with pytest.raises(CorruptBlob):
            use(commit)
    assert not repo.verify(commit, fresh_process=False).ok
    assert read_state(repo.store, repo.resolve(commit).state)


def test_a_session_outlives_neither_its_close_nor_its_engine(repo: Repository) -> None:
    s, t = repo.session(), repo.session()
    s.append("x")
    s.close()
    s.close()
    with pytest.raises(ThawError, match="closed"):
        s.commit()
    repo.engine.close()
    with pytest.raises(ThawError, match="closed"):
        t.append("y")
    t.close()


def test_opening_a_folder_finds_the_repository_that_init_made_in_it(tmp_path: Path, engine: Engine) -> None:
    with thaw.init(tmp_path / ".thaw"):
        pass
    with thaw.open(tmp_path) as found:
        assert found.path == tmp_path / ".thaw"
    with thaw.open(tmp_path, engine=engine) as found:
        found.session().append("here")
        assert found.path == tmp_path / ".thaw" and not (tmp_path / "thaw.db").exists()
    with thaw.init(tmp_path / "outer"):
        pass
    (tmp_path / ".thaw").rename(tmp_path / "outer" / ".thaw")
    with thaw.open(tmp_path / "outer") as found:
        assert found.path == tmp_path / "outer"
