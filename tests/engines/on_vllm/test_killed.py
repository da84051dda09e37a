"""kill -9 on the engine's processes as they write a pack or bring one back: the caller is told, nothing is half there.

A life: an engine is booted, the commit of the first life is hydrated and goes on with the same bits, then the engine
core or its worker is killed in the middle of a commit or a hydrate. 5 kills in `make test`, 25 with THAW_SOAK=1. A
client that is killed while a server goes on is tested in test_operators.py.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import thaw
from thaw.core.errors import EngineDied
from thaw.engines import load_engine
from thaw.repo.repository import Repository
from thaw.repo.session import Session
from thaw.store import fsck
from thaw.testing.laws.kit import bits, ids, seeded

pytest.importorskip("vllm")

from thaw.engines.served.talk import worker_facts
from thaw.engines.vllm.client.engine import VllmEngine

PROMPT, MORE = 2500, 1200
TOLD_WITHIN_S = 60.0
"""Nothing here takes as long; a caller that hangs does."""


class Lives:
    def __init__(self, folder: Path, model: Path, seed: int) -> None:
        self.path, self._model = folder / "repo", model
        self._dice = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self._expected: tuple[tuple[int, ...], list[str]] | None = None
        self._refs: dict[str, str | None] = {}
        self._left: list[Path] = []

    def boot(self) -> VllmEngine:
        engine = load_engine("vllm", model=str(self._model), enforce_eager=True, max_model_len=4096)
        assert isinstance(engine, VllmEngine)
        assert not [folder for folder in self._left if folder.exists()], "what dead engines left is swept at a boot"
        return engine

    def life(self, verb: str, who: str) -> None:
        with self.boot() as engine:
            transport = engine._transport
            pids = {"core": transport.facts.pid, "worker": worker_facts(transport)[0].pid}
            with thaw.open(self.path, engine=engine) as repo:
                self._goes_on(repo)
                told = self._killed(engine, repo, verb, pids[who])
                self.counts[f"{verb}, {who}: {'told' if told else 'done before'}"] += 1
                with pytest.raises(EngineDied):
                    engine.append(engine.open(), [1, 2]).result(TOLD_WITHIN_S)
            self._left.append(copy_of(transport.mail.folder))
        self._check_no_process(list(pids.values()))
        self._check_store()

    def _goes_on(self, repo: Repository) -> None:
        """The commit of the first life, in this engine: the bits that its own engine would have brought."""
        if self._expected is None:
            session = repo.session(seed=3)
            session.append(token_ids=ids(PROMPT))
            session.generate(token_ids=ids(9, 1), sampling=seeded(7))
            session.commit("the first life", branch="main")
            self._refs = refs(repo)
            out = session.generate(token_ids=ids(5, 2), sampling=seeded(12))
        else:
            session = repo.session("main")
            out = session.generate(token_ids=ids(5, 2), sampling=seeded(12))
            assert (out.token_ids, bits(out.logprobs)) == self._expected
            assert out.proof is not None and out.proof.num_cached_tokens >= PROMPT
        self._expected = (out.token_ids, bits(out.logprobs))
        session.close()

    def _killed(self, engine: VllmEngine, repo: Repository, verb: str, pid: int) -> bool:
        """Whether the verb was cut short. It must end soon either way."""
        session = repo.session(seed=self._dice.getrandbits(32))
        session.append(token_ids=ids(MORE, self._dice.randrange(1000)))
        branch = f"doomed-{self.counts.total()}"
        begun = threading.Event()
        work: Callable[[], object] = {
            "commit": lambda: self._commit(session, branch),
            "hydrate": lambda: repo.session("main"),
        }[verb]
        watched = self.path / "packs" if verb == "commit" else engine._transport.mail.folder / "plans"
        before = set(os.listdir(watched))

        def run() -> object:
            begun.set()
            return work()

        with ThreadPoolExecutor(1) as pool:
            doing = pool.submit(run)
            begun.wait()
            while not doing.done() and set(os.listdir(watched)) <= before:
                pass  # the worker has not begun to write, or the plan is not there yet
            time.sleep(self._dice.choice((0.0, 0.0, 0.002, 0.01, 0.04)))
            os.kill(pid, signal.SIGKILL)
            try:
                doing.result(TOLD_WITHIN_S)
            except EngineDied:
                return True
            return False

    def _commit(self, session: Session, branch: str) -> None:
        result = session.commit("killed in the middle", branch=branch)
        self._refs[branch] = result.commit

    def _check_store(self) -> None:
        assert fsck(self.path).problems == []
        with thaw.open(self.path) as repo:
            assert refs(repo) == self._refs
            repo.gc()
            assert not [name for name in os.listdir(self.path / "packs") if name.endswith(".tmp")]
        assert fsck(self.path).problems == []

    def _check_no_process(self, pids: list[int]) -> None:
        ends = time.monotonic() + TOLD_WITHIN_S
        while left := [pid for pid in pids if lives(pid)]:
            assert time.monotonic() < ends, f"processes {left} outlive their engine"
            time.sleep(0.1)


def refs(repo: Repository) -> dict[str, str | None]:
    return {ref.name: ref.target for ref in repo.branches()}


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def copy_of(mail: Path) -> Path:
    """What would be left where whoever started the engine was killed too and could not clean up."""
    other = mail.with_name(f"{mail.name}-killed")
    shutil.copytree(mail, other)
    return other


@pytest.fixture
def lived(tmp_path: Path, tiny_model: Callable[..., Path]) -> Iterator[Lives]:
    model = tiny_model("llama", dtype="bfloat16", head_dim=64, num_hidden_layers=8, num_key_value_heads=4)
    one = Lives(tmp_path, model, seed=random.getrandbits(30))
    yield one
    print(dict(one.counts))


def live(lives: Lives, num_kills: int) -> None:
    ways = [(verb, who) for verb in ("commit", "hydrate") for who in ("worker", "core")]
    for number in range(num_kills):
        lives.life(*ways[number % len(ways)])
    assert sum(count for name, count in lives.counts.items() if name.endswith(": told")) >= num_kills // 2
    with lives.boot() as engine, thaw.open(lives.path, engine=engine) as repo:
        lives._goes_on(repo)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_engine_that_is_killed_leaves_nothing_half_done(lived: Lives) -> None:
    live(lived, 5)


@pytest.mark.soak
@pytest.mark.skipif(not os.environ.get("THAW_SOAK"), reason="set THAW_SOAK=1 (or `make soak`)")
@pytest.mark.timeout(3 * 3600)
def test_killed_25_times(lived: Lives, soak_receipt: Callable[..., None]) -> None:
    live(lived, 25)
    soak_receipt(
        "vllm-kills",
        what="vLLM killed with kill -9 in the middle of a commit or a hydrate, 25 times",
        held="nothing half made was visible, a restarted engine went on from every acknowledged commit",
        counts=dict(sorted(lived.counts.items())),
    )
