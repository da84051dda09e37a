"""How work grows with commits: counted in steps of SQLite's machine in every run, in seconds of CPU in the soak."""

from __future__ import annotations

import math
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from store_sessions import MODEL, commit, tokens

import thaw
from thaw.core import objects
from thaw.core.errors import StorageFailed
from thaw.repo import log as logs
from thaw.repo import match
from thaw.repo.repository import Repository
from thaw.store import Store, db, transaction
from thaw.store import gather as gathering
from thaw.store.gather import COUNT, gather

FEW, MANY = 40, 160
STRIDE = 20


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], int]:
    """Steps that SQLite takes for a call, in a store opened after this."""
    counted = [0]
    connect = db.connect

    def counting(path: Path) -> object:
        connection = connect(path)

        def step() -> int:
            counted[0] += 1
            return 0

        connection.set_progress_handler(step, STRIDE)
        return connection

    monkeypatch.setattr(db, "connect", counting)

    def count(work: Callable[[], object]) -> int:
        before = counted[0]
        work()
        return (counted[0] - before) * STRIDE

    return count


def grow(store: Store, num: int) -> None:
    """Sessions that all begin alike and part within the first window, each with a branch of its own."""
    for i in range(num):
        commit(store, (*range(20), i, *tokens(10, seed=i)), branch=f"b{i}")


def test_gc_is_linear_and_looking_up_is_constant(tmp_path: Path, steps: Callable[[Callable[[], object]], int]) -> None:
    found: dict[str, list[int]] = {}
    model = objects.encode(MODEL)[0]
    for num in (FEW, MANY):
        with Store.init(tmp_path / str(num)) as store:
            grow(store, num)
        with Store.open(tmp_path / str(num)) as store:
            tips = [ref.target for ref in store.refs() if ref.name == "b7"]
            for what, work in (
                ("match", partial(match.match, store, [model], (*range(20), 7, *tokens(10, seed=7), 5))),
                ("log -n", partial(logs.log, store, tips, 5)),
                ("gc", store.gc),
                ("gc again", store.gc),
                ("fsck --quick", partial(store.fsck, deep=False)),
            ):
                found.setdefault(what, []).append(steps(work))
    growth = {what: many / few for what, (few, many) in found.items()}
    assert growth["match"] < 1.5 and growth["log -n"] < 1.5, found
    linear = MANY / FEW * 1.5
    assert growth["gc"] < linear and growth["gc again"] < linear and growth["fsck --quick"] < linear, found


def test_small_packs_are_put_together_without_being_asked(tmp_path: Path) -> None:
    with Store.init(tmp_path / "repo") as store:
        grow(store, COUNT + 10)
        store.upkeep.wait()
        files = len(os.listdir(store.packs))
        assert files < COUNT, "two packs a commit would be twice as many"
        assert store.fsck().problems == []
        assert store.gc().commits_removed == 0


def test_a_commit_returns_before_small_packs_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it fail where that fails; a gc of this process waits for it, and so does closing."""
    go, done = threading.Event(), list[str]()

    def late(store: Store) -> None:
        go.wait(60)
        gather(store)
        done.append("gathered")

    monkeypatch.setattr(transaction, "gather", late)
    with Store.init(tmp_path / "repo") as store:
        grow(store, COUNT // 2 + 5)
        assert not done and len(os.listdir(store.packs)) >= COUNT
        go.set()
        assert store.gc().commits_removed == 0 and done
    assert len(os.listdir(store.packs)) < COUNT


def test_packs_that_cannot_be_put_together_are_a_warning_and_the_commit_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageFailed("the disk is full")

    monkeypatch.setattr(gathering, "copy_packs", full)
    warned = pytest.warns(RuntimeWarning, match="small packs could not be put together")
    with warned, Store.init(tmp_path / "repo") as store:
        grow(store, COUNT // 2 + 5)
        last = commit(store, tokens(30), branch="last")
    with Store.open(tmp_path / "repo") as store:
        assert store.ref("last").target == last and store.fsck().problems == []


def test_packs_stay_for_their_reader_when_they_are_put_together(tmp_path: Path) -> None:
    with Store.init(tmp_path / "repo") as store:
        grow(store, 2)
        held = set(os.listdir(store.packs))
        with store.reading():
            grow_more = [commit(store, tokens(12, seed=1000 + i), branch=f"c{i}") for i in range(COUNT)]
            store.upkeep.wait()
            assert held <= set(os.listdir(store.packs)) and grow_more
        commit(store, tokens(12, seed=1), branch="last")
        store.gc()
        assert not held & set(os.listdir(store.packs))


# --- the soak

LEVELS = (500, 2000, 10_000, 50_000)
CHAIN = 50


def cpu_of(path: Path, *words: str) -> float:
    """Seconds of CPU of a whole `thaw` process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "thaw.cli", "-C", str(path), *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def timed(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def exponent(levels: list[int], seconds: list[float]) -> float:
    """Of the power of the number of commits that fits best: 1 is linear."""
    x, y = [math.log(level) for level in levels], [math.log(max(s, 1e-6)) for s in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return slope / sum((a - mean_x) ** 2 for a in x)


def measured(path: Path, branch: str, ids: tuple[int, ...]) -> dict[str, float]:
    """CPU seconds of what people do most, each in a repository opened for it."""

    def opened(use: Callable[[Repository], object]) -> float:
        with thaw.open(path) as repo:
            return timed(lambda: use(repo))

    return {
        "match": min(opened(lambda repo: repo.match(ids)) for _ in range(5)),
        "log -n 5": min(cpu_of(path, "log", branch, "-n", "5") for _ in range(3)),
        "log --all": cpu_of(path, "log", "--all"),
        "show": cpu_of(path, "show", branch),
        "branch": cpu_of(path, "branch"),
        "stats": cpu_of(path, "stats"),
        "reflog": cpu_of(path, "reflog", branch),
        "fsck": opened(lambda repo: repo.fsck()),
        "fsck --quick": opened(lambda repo: repo.fsck(deep=False)),
        "gc --dry-run": opened(lambda repo: repo.gc(dry_run=True)),
        "gc": opened(lambda repo: repo.gc()),
    }


@pytest.mark.soak(
    "fifty thousand commits",
    receipt="growth",
    covers=("src/thaw/store", "src/thaw/repo/log.py", "src/thaw/repo/match.py", "src/thaw/repo/stats.py"),
)
@pytest.mark.timeout(7200)
def test_fifty_thousand_commits(tmp_path: Path, soak_receipt: Callable[..., None]) -> None:
    path, made, found = tmp_path / "repo", 0, list[dict[str, float]]()
    levels = [int(level) for level in os.environ.get("THAW_GROWTH", "").split(",") if level] or list(LEVELS)
    sampling = thaw.Sampling(max_tokens=4)
    with thaw.load_engine("fake") as engine, thaw.open(path, engine=engine) as repo:
        for level in levels:
            while made < level:
                if made % CHAIN == 0:
                    session = repo.session(seed=made)
                    session.append(f"session {made}: " + "some words here. " * 6)
                session.generate("go", sampling)
                session.commit(f"c{made}", branch=f"s/{made // CHAIN}")
                made += 1
                if made % CHAIN == 0 and made < level:
                    session.close()
            found.append(measured(path, f"s/{(made - 1) // CHAIN}", (*session.tokens, 1, 2, 3)))
            print(level, {what: round(seconds, 4) for what, seconds in found[-1].items()}, flush=True)
            assert len(os.listdir(path / "packs")) < 4 * COUNT + level // 100
            session.close()
    check(levels, found)
    soak_receipt(
        what=f"{levels[-1]} commits of the fake engine, verbs measured at {', '.join(map(str, levels))}",
        held="gc and log are linear and in their limits, match and log -n constant, fsck --quick a fifth of fsck",
        counts={"commits": levels[-1]},
    )


def check(levels: list[int], found: list[dict[str, float]]) -> None:
    by_name = {what: [at[what] for at in found] for what in found[0]}
    last = found[-1]
    assert exponent(levels, by_name["gc"]) < 1.25 and exponent(levels, by_name["fsck"]) < 1.25, by_name
    for level, at in zip(levels, found, strict=True):
        assert at["gc"] <= 10 * max(1, level / 10_000), (level, at)
        assert level < 10_000 or at["fsck --quick"] <= 0.2 * at["fsck"], (level, at)
    assert last["match"] <= 1.5 * found[0]["match"] + 0.0005, by_name
    assert last["log -n 5"] <= 1.2 * found[0]["log -n 5"], by_name
    assert last["log --all"] <= 3.0, by_name


@pytest.mark.soak(
    "a session of a million tokens",
    receipt="growth",
    covers=("src/thaw/store", "src/thaw/repo/log.py", "src/thaw/repo/match.py", "src/thaw/repo/stats.py"),
)
@pytest.mark.timeout(3600)
def test_a_million_tokens(tmp_path: Path) -> None:
    path, num = tmp_path / "repo", 1_000_000
    with thaw.load_engine("fake", max_model_len=num + 1000) as engine, thaw.open(path, engine=engine) as repo:
        session = repo.session()
        session.append(token_ids=[i % 251 for i in range(num)])
        session.commit("long", branch="main")
        session.append(" and on")
        session.commit("longer", branch="main")
        ids = session.tokens
        assert repo.match([*ids[:-3], 0]).num_tokens >= num
        assert repo.session("main:token=999999").num_kv >= 999_998
        assert repo.diff("main", "main~1").num_common_tokens == num
        assert len(repo.show("main").tokens) == len(ids)
        assert repo.stats().num_commits == 2
        assert repo.fsck().ok and repo.fsck(deep=False).ok
        repo.undo()
        assert repo.gc(keep_reflog_s=0).commits_removed == 1
    for words in (("log",), ("show",), ("reflog",), ("stats",), ("fsck",), ("gc",)):
        assert cpu_of(path, *words) < 60
