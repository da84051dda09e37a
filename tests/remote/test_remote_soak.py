"""The soak of remotes: two thousand kills, and writers who move one ref two hundred times each. Ten minutes together.

THAW_SOAK=1 python -m pytest -m "soak or longer_in_soak" tests/remote
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hosts import commit, read_all, remote, tokens
from movers import move_at_once
from servers import StoreServer
from store_fixtures import seaweed_server, store_keys  # noqa: F401 - fixtures

from thaw.remote import refs
from thaw.remote.address import open_bucket
from thaw.remote.fetch import fetch
from thaw.remote.folder import FolderBucket
from thaw.remote.layout import NamespaceBucket
from thaw.store import Store

CHILD = Path(__file__).with_name("killed_child.py")
SOURCE = Path(__file__).resolve().parents[2] / "src"
KILLS, ERA = 2000, 40
BRANCHES = ("main", "side", "fork/0")
ONLY_SOAK = pytest.mark.skipif(not os.environ.get("THAW_SOAK"), reason="set THAW_SOAK=1 (or `make soak`)")


class Children:
    """Hosts in processes of their own, which are killed at a request or at a moment."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, verb: str, repo: Path, bucket: Path, last: int) -> bool:
        """Whether it came to its end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{verb} {repo} {bucket} {last}\n")
        self._process.stdin.flush()
        said = self._process.stdout.readline().strip()
        assert said in ("done", "killed"), f"{verb} at {last}: {said or 'it ended'}"
        return said == "done"


@contextmanager
def children() -> Iterator[Children]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(SOURCE), str(CHILD.parent)))}
    words = [sys.executable, str(CHILD), "serve"]
    with subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Children(process)
        assert process.stdin is not None
        process.stdin.close()


class Era:
    """Two hosts and a bucket through some kills. `there`: where the remote's branches stand."""

    def __init__(self, base: Path, dice: random.Random, counts: Counter[str]) -> None:
        self.base, self.dice, self.counts = base, dice, counts
        self.here, self.reader, self.bucket = base / "here", base / "reader", base / "bucket"
        self.there: dict[str, str] = {}
        for path in (self.here, self.reader):
            Store.init(path).close()

    def live(self, children: Children) -> None:
        verb = self.dice.choice(("push", "push", "push", "delete", "forget", "fetch", "fetch", "gc", "gc"))
        if not self.there:
            verb = "push"
        wanted = dict(self.there)
        if verb == "push":
            wanted |= self._commit()
        elif verb in ("delete", "forget"):
            gone = self.dice.choice(sorted(self.there))
            verb = f"{verb}:{gone}"
            del wanted[gone]
            self._forget(gone)
        most = {"push": 70, "delete": 14, "fetch": 20, "gc": 40}.get(verb, 70)
        last = self.dice.randint(1, most) if self.dice.random() < 0.7 else -self.dice.randint(1, 60)
        done = children.run(verb, self.reader if verb == "fetch" else self.here, self.bucket, last)
        self.counts["came to their end" if done else f"killed: {verb.partition(':')[0]}"] += 1
        self._check(wanted, done)

    def _commit(self) -> dict[str, str]:
        """A commit on a branch of this host's, on what it had; on the remote's where a deletion was killed before."""
        with Store.open(self.here) as store:
            branch = self.dice.choice(BRANCHES)
            ref = store.ref(branch)
            before = self.there.get(branch) if ref is None else ref.target
            parents = () if before is None else (before,)
            commit(store, tokens(self.dice.randint(20, 700), self.dice.getrandbits(20)), branch=branch, parents=parents)
            return {ref.name: ref.target for ref in store.refs("branch")}

    def _forget(self, branch: str) -> None:
        """The branch is gone here too: the next commit on it begins a history of its own."""
        from thaw.store import RefUpdate

        with Store.open(self.here) as store:
            if store.ref(branch) is not None:
                store.update_refs(RefUpdate(branch, "branch", None, "any", "deleted"))

    def _check(self, wanted: dict[str, str], done: bool) -> None:
        part = NamespaceBucket(FolderBucket(self.bucket), "")
        found = {
            name: one.ref.commit for (_, name), one in refs.read_listed(part, 1).items() if one.ref.commit is not None
        }
        for name in {*found, *wanted, *self.there}:
            allowed = {wanted.get(name)} if done else {wanted.get(name), self.there.get(name)}
            assert found.get(name) in allowed, f"{name} stands at {found.get(name)}, not at {allowed}"
        self.there = found
        for path in (self.here, self.reader):
            with Store.open(path) as store:
                _look(store)
        if found:
            with Store.init(self.base / "look") as fresh:
                fetch(fresh, remote(self.bucket), workers=1)
                _look(fresh)
                assert {ref.name: ref.target for ref in fresh.refs()} == {f"origin/{n}": c for n, c in found.items()}
            shutil.rmtree(self.base / "look")


def _look(store: Store) -> None:
    for one in store.commits():
        read_all(store, one)
    assert store.fsck(deep=False).ok


def run_kills(kills: int, seed: int) -> Counter[str]:
    dice, counts = random.Random(seed), Counter[str]()
    with children() as running:
        while (killed := sum(number for what, number in counts.items() if what.startswith("killed"))) < kills:
            base = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
            try:
                era = Era(base, dice, counts)
                for _ in range(min(ERA, kills - killed)):
                    era.live(running)
            finally:
                shutil.rmtree(base)
    return counts


@pytest.mark.slow("forty processes, most of them killed")
def test_what_is_killed_leaves_both_sides_whole() -> None:
    counts = run_kills(20, 7)
    assert counts["killed: push"] >= 3, counts


@pytest.mark.soak(
    "two thousand processes, each killed", receipt="remote-kills",
    covers=("src/thaw/remote", "tests/remote/killed_child.py"),
)  # fmt: skip
@ONLY_SOAK
@pytest.mark.timeout(3 * 3600)
def test_two_thousand_kills(soak_receipt: Callable[..., None]) -> None:
    seed = random.getrandbits(30)
    counts = run_kills(KILLS, seed)
    soak_receipt(
        what="kill -9 at random requests and moments of push, branch delete, forget, fetch and gc of a remote",
        held="after each kill every branch of the remote stood where it was or where it was to go, and "
        "both hosts and a new one that fetched all of it read every commit",
        seed=seed, counts=counts,
    )  # fmt: skip


@pytest.mark.soak(
    "1,600 moves of one ref by 8 writers, on two stores", receipt="remote-moves", covers=("src/thaw/remote",)
)
@ONLY_SOAK
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("store", ["folder", "seaweed"])
def test_eight_writers_move_one_ref_two_hundred_times_each(
    store: str, request: pytest.FixtureRequest, tmp_path: Path, soak_receipt: Callable[..., None]
) -> None:
    server: StoreServer | None = request.getfixturevalue("seaweed_server") if store == "seaweed" else None
    bucket = FolderBucket(tmp_path) if server is None else open_bucket(server.address())
    late = move_at_once(bucket, writers=8, moves=200)
    soak_receipt(
        what=f"8 writers move one ref 200 times each at the same time ({store})",
        held="the reflog has each of the 1,600 moves once, numbered without a gap", counts={f"too late, {store}": late},
    )  # fmt: skip
