"""kill -9 on an engine's processes as they write a pack or bring one back: the caller is told, nothing is half there.

A life: an engine is booted, the commit of the first life is hydrated and continues with the same bits, then one of its
processes is killed in the middle of a commit or a hydrate. `Lives` counts; `KilledEngineTests` is to be subclassed:

    boot        a fixture: () -> an engine of the test's own processes
    processes   the engine's, by a name, that are killed in turn
    mail        the folder in which it and its client meet
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest

import thaw
from thaw.core.errors import EngineDied
from thaw.engines.base import Engine
from thaw.repo.repository import Repository
from thaw.serve.record import born
from thaw.store import fsck
from thaw.testing.laws.kit import bits, ids, seeded

PROMPT, MORE = 2500, 1200
VERBS = ("commit", "hydrate")
TOLD_WITHIN_S = 60.0
"""Nothing here takes as long; a caller that hangs does."""


class KilledEngineTests:
    num_kills: ClassVar[int] = 2
    """At least one of each process; the soak has many."""

    @pytest.fixture
    def boot(self) -> Callable[[], Engine]:
        raise NotImplementedError("give a fixture `boot`: () -> Engine")

    def processes(self, engine: Engine) -> dict[str, int]:
        """Ids of the engine's processes, by name; the same names in the same order from every engine."""
        raise NotImplementedError

    def mail(self, engine: Engine) -> Path:
        raise NotImplementedError

    def died(self, engine: Engine) -> None:
        """Called when the engine has been killed, before it is closed."""

    @pytest.fixture
    def lives(self, tmp_path: Path, boot: Callable[[], Engine]) -> Lives:
        return Lives(self, tmp_path / "repo", boot, seed=random.getrandbits(30))

    @pytest.mark.slow("a boot for each kill")
    @pytest.mark.timeout(900)
    def test_an_engine_that_is_killed_leaves_nothing_half_done(self, lives: Lives) -> None:
        lives.run(self.num_kills)


class Lives:
    """Of engines on one repository at `path`. `counts`: how the kills ended, by verb and process."""

    def __init__(self, tests: KilledEngineTests, path: Path, boot: Callable[[], Engine], seed: int) -> None:
        self._tests, self._path, self._boot = tests, path, boot
        self._dice = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self._expected: tuple[tuple[int, ...], list[str]] | None = None
        self._refs: dict[str, str | None] = {}

    def run(self, num_kills: int) -> None:
        """So many lives, and one more that nobody ends. Half of the kills must have cut something short: where the
        machine was busy and they came too late, as many again may follow."""
        for number in range(2 * num_kills):
            if number < num_kills or self._told() < num_kills // 2:
                self._life(number)
        assert self._told() >= num_kills // 2, dict(self.counts)
        with self._boot() as engine, thaw.open(self._path, engine=engine) as repo:
            self._goes_on(repo)

    def _told(self) -> int:
        """Kills that cut something short."""
        return sum(count for name, count in self.counts.items() if name.endswith(": told"))

    def _life(self, number: int) -> None:
        with self._boot() as engine:
            pids = self._tests.processes(engine)
            who, verb = _way(number, list(pids))
            with thaw.open(self._path, engine=engine, create=True) as repo:
                self._goes_on(repo)
                told = self._killed(engine, repo, verb, pids[who])
                self.counts[f"{verb}, {who}: {'told' if told else 'done before'}"] += 1
                with pytest.raises(EngineDied):
                    engine.append(engine.open(), [1, 2]).result(TOLD_WITHIN_S)
            self._tests.died(engine)
        _check_no_process(list(pids.values()))
        self._check_store()

    def _goes_on(self, repo: Repository) -> None:
        """The commit of the first life, in this engine: the bits that its own engine would have brought."""
        if self._expected is None:
            session = repo.session(seed=3)
            session.append(token_ids=ids(PROMPT))
            session.generate(token_ids=ids(9, 1), sampling=seeded(7))
            session.commit("the first life", branch="main")
            self._refs = _refs(repo)
            out = session.generate(token_ids=ids(5, 2), sampling=seeded(12))
        else:
            session = repo.session("main")
            out = session.generate(token_ids=ids(5, 2), sampling=seeded(12))
            assert (out.token_ids, bits(out.logprobs)) == self._expected
            assert out.proof is not None and out.proof.num_cached_tokens >= PROMPT
        self._expected = (out.token_ids, bits(out.logprobs))
        session.close()

    def _killed(self, engine: Engine, repo: Repository, verb: str, pid: int) -> bool:
        """Whether the verb was cut short. It must end soon either way."""
        session = repo.session(seed=self._dice.getrandbits(32))
        session.append(token_ids=ids(MORE, self._dice.randrange(1000)))
        branch = f"doomed-{self.counts.total()}"
        begun = threading.Event()

        def commit() -> None:
            begun.set()
            self._refs[branch] = session.commit("killed in the middle", branch=branch).commit

        def hydrate() -> None:
            begun.set()
            repo.session("main")

        watched = self._path / "packs" if verb == "commit" else self._tests.mail(engine) / "plans"
        before = set(os.listdir(watched))
        with ThreadPoolExecutor(1) as pool:
            doing = pool.submit(commit if verb == "commit" else hydrate)
            begun.wait()
            while not doing.done() and set(os.listdir(watched)) <= before:
                pass  # nothing is being written yet, or the plan is not there yet
            time.sleep(self._dice.choice((0.0, 0.0, 0.002, 0.01, 0.04)))
            os.kill(pid, signal.SIGKILL)
            try:
                doing.result(TOLD_WITHIN_S)
            except EngineDied:
                return True
            return False

    def _check_store(self) -> None:
        assert fsck(self._path).problems == []
        with thaw.open(self._path) as repo:
            assert _refs(repo) == self._refs
            repo.gc()
            assert not [name for name in os.listdir(self._path / "packs") if name.endswith(".tmp")]
        assert fsck(self._path).problems == []


def _way(number: int, names: list[str]) -> tuple[str, str]:
    """Which process dies in this life, and during what: each process in turn, and every way before one comes again."""
    return names[number % len(names)], VERBS[(number + number // len(names)) % len(VERBS)]


def _check_no_process(pids: list[int]) -> None:
    ends = time.monotonic() + TOLD_WITHIN_S
    while left := [pid for pid in pids if born(pid)]:
        assert time.monotonic() < ends, f"processes {left} outlive their engine"
        time.sleep(0.1)


def _refs(repo: Repository) -> dict[str, str | None]:
    return {ref.name: ref.target for ref in repo.branches()}
