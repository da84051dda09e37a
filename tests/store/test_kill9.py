"""kill -9 at random moments of commit and gc: what returned is there and verifies, nothing half-made is visible.

100 times in `make test`; 2,000 with THAW_SOAK=1, which leaves receipts/soak/kill9.json.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from store_sessions import read_all

from thaw.core.objects import Commit
from thaw.store import Store

CHILD = Path(__file__).with_name("kill9_child.py")


class Run:
    """One repository through many lives: each life is a child that is killed at a random time, then checked."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.dice = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.tips: dict[str, str | None] = {}
        with Store.init(path):
            pass

    def life(self) -> None:
        said = self._live_and_die()
        allowed = self._allowed(said)
        self._check(allowed)
        self.counts["kills"] += 1

    def _live_and_die(self) -> list[str]:
        command = [sys.executable, str(CHILD), str(self.path), str(self.dice.getrandbits(32))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"open\n", child.stderr.read()[-2000:]
            time.sleep(self.dice.random() ** 2 * 0.4)
            child.send_signal(signal.SIGKILL)
            said, errors = child.communicate()
            assert child.returncode == -signal.SIGKILL, errors[-2000:]
        return said.decode().split("\n")[:-1]

    def _allowed(self, said: list[str]) -> dict[str, set[str | None]]:
        """Where each ref may stand: at what was acknowledged last, or at the step that was killed."""
        allowed: dict[str, set[str | None]] = {name: {tip} for name, tip in self.tips.items()}
        for line in said:
            word, *rest = line.split()
            self.counts[word] += 1
            if word == "committed":
                allowed[rest[0]] = {rest[1]}
            elif word == "deleting":
                allowed[rest[0]] = {rest[1], None}
            elif word == "deleted":
                allowed[rest[0]] = {None}
        return allowed

    def _check(self, allowed: dict[str, set[str | None]]) -> None:
        with Store.open(self.path) as store:
            found: dict[str, str | None] = {ref.name: ref.target for ref in store.refs()}
            strangers = 0
            for name in {*allowed, *found}:
                tip = found.get(name)
                if tip not in allowed.get(name, {None}):
                    self._is_the_killed_commit(store, name, tip, allowed.get(name, {None}))
                    strangers += 1
            assert strangers <= 1, "at most one commit was in flight"
            self.counts["in flight and whole"] += strangers
            for tip in found.values():
                read_all(store, tip)
            if self.dice.random() < 0.3:
                store.gc(keep_reflog_s=0)
                assert self._files() == self._indexed(), "gc reclaims what nobody owns"
                self.counts["collected"] += 1
        report = _fsck(self.path)
        assert report.problems == []
        self.tips = {name: found.get(name) for name in {*allowed, *found}}

    def _is_the_killed_commit(self, store: Store, name: str, tip: str | None, before: set[str | None]) -> None:
        """A commit that did not get to say that it returned may be there, then whole; nothing else may."""
        assert tip is not None, f"{name} stood at {before} and is gone"
        value = store.get_as(tip, Commit)
        assert value.branch == name and set(value.parents) == before - {None}

    def _files(self) -> set[str]:
        return set(os.listdir(self.path / "packs"))

    def _indexed(self) -> set[str]:
        with sqlite3.connect(self.path / "thaw.db") as connection:
            return {row[0] for row in connection.execute("SELECT name FROM packs")}


def _fsck(path: Path):  # type: ignore[no-untyped-def]
    from thaw.store import fsck

    return fsck(path)


def run_lives(path: Path, lives: int, seed: int) -> Counter[str]:
    """Several repositories, so that young and old ones are hit."""
    counts: Counter[str] = Counter()
    for number in range(max(1, lives // 25)):
        run = Run(path / str(number), seed + number)
        for _ in range(lives // max(1, lives // 25)):
            run.life()
        counts += run.counts
    return counts


@pytest.mark.slow("a hundred processes, each killed")
def test_kill_9_at_random_moments_loses_nothing_that_returned(tmp_path: Path) -> None:
    counts = run_lives(tmp_path, 100, seed=random.getrandbits(30))
    print(dict(counts))
    assert counts["kills"] == 100
    assert counts["committed"] > 100 and counts["gc"] > 10


@pytest.mark.soak(
    "two thousand processes, each killed",
    receipt="kill9",
    covers=("src/thaw/store", "src/thaw/data", "tests/store/kill9_child.py"),
)
@pytest.mark.skipif(not os.environ.get("THAW_SOAK"), reason="set THAW_SOAK=1 (or `make soak`)")
@pytest.mark.timeout(6 * 3600)
def test_kill_9_two_thousand_times(tmp_path: Path, soak_receipt: Callable[..., None]) -> None:
    seed = random.getrandbits(30)
    counts = run_lives(tmp_path, 2000, seed)
    assert counts["kills"] == 2000
    soak_receipt(
        what="kill -9 at random moments of commit, ref deletion and gc, then every ref read and fsck",
        held="after each kill every ref stood at what was acknowledged or at the step in flight; fsck found nothing",
        seed=seed, counts=counts,
    )  # fmt: skip
