"""The pool's parts one by one: what it measures and decides, what travels, attached engines, weight sync."""

from __future__ import annotations

import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pool_updates import load

import thaw
from thaw import Sampling
from thaw.core.canonical import U64
from thaw.core.errors import (
    BadSampling,
    EngineDied,
    IdentityMismatch,
    InvalidRequest,
    NotFound,
    NotHit,
    StaleSession,
    ThawError,
    Unsupported,
)
from thaw.core.objects import ChatTurn, Turn
from thaw.doctor import pools as doctor
from thaw.engines.base import Completion, Engine, GenerateRequest, Handle, SessionView
from thaw.pool import Branch, ForkPool, PoolSession, backends
from thaw.pool.round import Round
from thaw.pool.rpc import protocol
from thaw.pool.schedule.rates import Rates, line
from thaw.pool.shm.guard import GRACE_S
from thaw.pool.values import BranchResult
from thaw.testing.laws.kit import until
from thaw.testing.laws.pool_kit import bits

HERE = Path(__file__).parent
SRC = HERE.parents[1] / "src"
GREEDY = Sampling(max_tokens=8, ignore_eos=True)
SAMPLED = Sampling(max_tokens=8, temperature=1.0, ignore_eos=True)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("THAW_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


# -- what Python's collector may do at any point

COLLECTED_AMID_A_SUBMIT = """
import concurrent.futures._base as base, gc, time
from thaw import Sampling
from thaw.pool import ForkPool

class Future(base.Future):  # made within an executor's submit, which holds the lock of all executors
    def __init__(self):
        gc.collect()
        super().__init__()

with ForkPool("fake", backend="inline") as pool:
    trunk = pool.session(seed=7)
    trunk.append("A document. " * 9)
    base.Future = Future
    for _ in range(10):
        ring = [pool.fork(trunk, 4, Sampling(max_tokens=2))]
        ring.append(ring)
        del ring
    base.Future = Future.__base__
    gc.collect()
    while len(pool._fleet.named("worker-0").life.engine._sessions) > 1:  # the trunk stays
        time.sleep(0.01)
    print("closed")
"""


def test_sessions_that_the_collector_ends_amid_a_submit_are_closed() -> None:
    command = [sys.executable, "-c", COLLECTED_AMID_A_SUBMIT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "closed\n"), done.stderr


# -- sessions that a chat moved to an earlier token


def user(text: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": text}]


@pytest.fixture
def moved(tmp_path: Path) -> Iterator[tuple[ForkPool, PoolSession]]:
    """A pool with a repository, and a session that was captured before a chat dropped most of it."""
    with ForkPool("fake", backend="inline", workers=2, repo=tmp_path / "runs") as pool:
        session = pool.session()
        session.chat(user("A" * 300), GREEDY)
        pool.snapshot(session)
        session.chat(history=user("A" * 100 + "B" * 100), sampling=GREEDY)
        yield pool, session


def elsewhere(pool: ForkPool, session: PoolSession) -> str:
    return next(worker for worker in pool.workers if worker != session.worker)


def test_a_session_that_a_chat_moved_is_captured_anew(moved: tuple[ForkPool, PoolSession]) -> None:
    """What it said before would be loaded in the other worker, and seem to hit."""
    pool, session = moved
    here = pool.fork(session, 2, GREEDY, worker=session.worker)
    there = pool.fork(session, 2, GREEDY, worker=elsewhere(pool, session))
    assert there[0].decision is not None and there[0].decision.action == "hydrate"
    assert bits(here) == bits(there)


def test_what_each_store_kept_of_it_ends_where_the_chat_moved_it_to(moved: tuple[ForkPool, PoolSession]) -> None:
    pool, session = moved
    child = pool.fork(pool.snapshot(session), 1, GREEDY, worker=elsewhere(pool, session))[0].session
    assert child is not None and min(kept.end for kept in child.kept_in.by_store.values()) > 200
    child.chat(history=user("A" * 50 + "C" * 400), sampling=GREEDY)
    saved = pool.snapshot(child)
    assert pool.session(saved).tokens == child.tokens
    here = pool.fork(child, 1, GREEDY, worker=child.worker)
    assert bits(pool.fork(saved, 1, GREEDY, worker=elsewhere(pool, child))) == bits(here)


def test_closing_a_session_that_a_chat_moved_ends_what_it_is_now(moved: tuple[ForkPool, PoolSession]) -> None:
    _, session = moved
    engine = session.engine
    engine.view(session.ref)
    ref = session.ref
    session.close()
    until(lambda: ref not in engine._sessions)  # type: ignore[attr-defined]


# -- rates and decisions


@given(st.floats(0, 10), st.floats(0.001, 10), st.lists(st.integers(1, 10_000), min_size=2, max_size=30, unique=True))
def test_a_line_is_found_again(fixed: float, slope: float, amounts: list[int]) -> None:
    found = line([(float(x), fixed + slope * x) for x in amounts])
    assert found == pytest.approx((fixed, slope), rel=1e-3, abs=1e-3 * slope * max(amounts) + 1e-9)


@given(st.lists(st.tuples(st.floats(1, 1e6), st.floats(0, 1e3)), min_size=1, max_size=30))
def test_no_fit_promises_less_than_nothing(points: list[tuple[float, float]]) -> None:
    fixed, slope = line(points)
    assert fixed >= 0 and slope >= 0


def measured(cache: Path, *, load_s: float, prefill_s: float, step_s: float | None = None, tier: str = "arena") -> None:
    """Rates that another pool is said to have measured: by 100 tokens, and a step by the branch."""
    rates = Rates("fake", "fake", "cpu", cache)
    for tokens in (100, 400):
        rates.prefilled(tokens, prefill_s * tokens / 100)
        rates.load(tier, tokens * 32, load_s * tokens / 100)
    for branches in (1, 8) if step_s is not None else ():
        rates.stepped(branches, step_s * branches)
    rates.save()


def test_a_snapshot_inside_a_session_that_was_captured_before_is_of_that_point(cache: Path) -> None:
    """Its bytes are there: they belong to the snapshot of the whole session. Only the position is another."""
    with ForkPool("fake", workers=2, backend="inline") as pool:
        session = pool.session(seed=7)
        session.append("A document that every branch needs. " * 5)
        at, other = session.num_tokens - 3, elsewhere(pool, session)
        whole = pool.snapshot(session)
        inside, inner = pool.snapshot(session, at=at), pool.snapshot(whole, at=at - 5)
        assert (whole.num_tokens, inside.num_tokens, inner.num_tokens) == (at + 3, at, at - 5)
        asked = {"seed": 1, "worker": other}
        there = pool.fork(session, 2, GREEDY, at=at, **asked)
        assert bits(pool.fork(inside, 2, GREEDY, **asked)) == bits(there) != bits(pool.fork(whole, 2, GREEDY, **asked))
        assert bits(pool.fork(inside, 2, GREEDY, at=at - 5, **asked)) == bits(pool.fork(inner, 2, GREEDY, **asked))
        with pytest.raises(NotFound, match=f"in 1 … {at}"):
            pool.fork(inside, 2, GREEDY, at=at + 1)
        whole.release()
        pool.drain(session.worker)
        assert bits(pool.fork(inside, 2, GREEDY, seed=1)) == bits(there)


@pytest.mark.parametrize(("load_s", "prefill_s", "action"), [(1.0, 0.01, "prefill"), (0.01, 1.0, "hydrate")])
def test_fast_takes_what_is_expected_sooner_and_exact_always_loads(
    cache: Path, load_s: float, prefill_s: float, action: str
) -> None:
    measured(cache, load_s=load_s, prefill_s=prefill_s)
    with ForkPool("fake", workers=2, backend="inline") as pool:
        session = pool.session()
        session.append("a document " * 40)
        snapshot = pool.snapshot(session)
        other = next(name for name in pool.workers if name != session.worker)
        fast = pool.fork(snapshot, 1, GREEDY, policy="fast", worker=other)[0]
        assert fast.decision is not None and fast.decision.action == action
        costs = fast.decision.alternatives
        assert fast.decision.predicted_s == costs[action] == min(costs.values())
        assert fast.decision.measured_s > 0 and "sooner" in fast.decision.reason
        pool.drain(other)
        pool.add_worker()
        pool.drain(session.worker)
        exact = pool.fork(snapshot, 1, GREEDY)[0]
        assert exact.decision is not None and exact.decision.action == "hydrate"


def test_a_branch_of_a_repositorys_point_commits_behind_it_though_it_was_prefilled(cache: Path, tmp_path: Path) -> None:
    """The round that prefilled it, and the next one, which finds it there."""
    measured(cache, load_s=100.0, prefill_s=0.0001, tier="disk")
    with ForkPool("fake", backend="inline", repo=tmp_path / "runs", policy="fast") as pool:
        trunk = pool.session(seed=7)
        trunk.append("a document " * 40)
        commit = trunk.commit("read it", branch="main").commit
        results = [pool.fork("main", 1, GREEDY)[0] for _ in range(2)]
        assert [r.decision and r.decision.action for r in results] == ["prefill", "fork"]
        for number, result in enumerate(results):
            assert result.session is not None and pool.repo is not None
            result.session.commit("answered", branch=f"answer-{number}")
            assert pool.repo.log(f"answer-{number}")[0].parents == (commit,)


@pytest.mark.parametrize(("load_s", "step_s", "expected"), [(0.01, 1.0, 2), (100.0, 0.001, 1)])
@pytest.mark.parametrize("backend", ["process", "inline"])
def test_auto_spreads_a_round_where_that_is_expected_sooner_and_changes_no_bit(
    cache: Path, backend: str, load_s: float, step_s: float, expected: int
) -> None:
    """Steps that are dear by the branch are shared by the workers; loads that are dear keep a round together."""
    measured(cache, load_s=load_s, prefill_s=1.0, step_s=step_s)
    sampling = Sampling(temperature=0.9, max_tokens=24, ignore_eos=True)
    with ForkPool("fake", workers=2, backend=backend, step_s=0.004) as pool:
        session = pool.session(seed=7)
        session.append("a document " * 40)
        spread = pool.fork(session, 6, sampling, spread="auto")
        assert len({result.worker for result in spread}) == expected
        assert bits(spread) == bits(pool.fork(session, 6, sampling))


def test_auto_keeps_a_round_together_while_nothing_is_measured() -> None:
    with ForkPool("fake", workers=2, backend="inline") as pool:
        session = pool.session(seed=7)
        session.append("a document " * 40)
        assert len({result.worker for result in pool.fork(session, 4, GREEDY, spread="auto")}) == 1


def test_what_was_measured_is_known_to_the_next_pool_and_to_the_doctor(cache: Path) -> None:
    assert list(doctor.findings()) == []
    with ForkPool("fake", workers=2, backend="inline") as pool:
        ids = pool.encode("a document " * 40)
        pool.fork(ids, 2, GREEDY, spread=2, snapshot="before")
        seen = pool.stats().rates
        assert seen["prefill.tokens_per_s"] > 0
    found = list(doctor.findings())
    assert len(found) == 1 and "a pool of fake fake on cpu" in found[0].text and "prefills" in found[0].text
    with ForkPool("fake", backend="inline") as pool:
        assert pool.stats().rates["prefill.tokens_per_s"] == seen["prefill.tokens_per_s"]


# -- what travels


def test_messages_come_out_as_they_went_in() -> None:
    turn = Turn(kind="completion", start=0, end=2, seed=U64(2**64 - 1), logprobs=(-0.1, -2.0))
    view = SessionView(
        tokens=(1, 2), num_kv=1, turns=(turn,), seed=2**64 - 1, salt="s", running=False, parked=False, proof=None
    )
    reply = protocol.REPLIES.decode(protocol.ENCODER.encode(protocol.settled(7, view)))
    assert isinstance(reply, protocol.Settled) and reply.id == 7
    assert protocol.value_of(protocol.View, reply) == view


MISMATCH = IdentityMismatch("c", field="f", stored="1", running="2")


@pytest.mark.parametrize("error", [NotHit("a"), Unsupported("b"), MISMATCH], ids=lambda error: error.kind)
def test_errors_keep_their_class_and_their_words(error: ThawError) -> None:
    back = protocol.error_of(protocol.failed(1, error))
    assert type(back) is type(error) and str(back) == str(error) and vars(back) == vars(error)


def test_an_error_that_is_none_of_ours_is_the_engines_death_or_its_lack_of_memory() -> None:
    class OutOfMemoryError(RuntimeError):
        """As torch calls it."""

    assert isinstance(protocol.error_of(protocol.failed(1, MemoryError("x"))), protocol.OutOfMemory)
    assert isinstance(protocol.error_of(protocol.failed(1, OutOfMemoryError("x"))), protocol.OutOfMemory)
    other = protocol.error_of(protocol.failed(1, ZeroDivisionError("x")))
    assert other.kind == "engine-died" and "ZeroDivisionError" in str(other)


# -- seeds


@pytest.mark.parametrize("backend", ["process", "inline"])
def test_a_round_that_is_to_replay_its_point_is_refused_seeds_before_it_begins(backend: str) -> None:
    with ForkPool("fake", backend=backend) as pool:
        session = pool.session(seed=7)
        session.append("hello there")
        points = [session, pool.snapshot(session), pool.encode("a document")]
        for seeded, beside in (
            ({"seed": 5}, "seed=5"), ({"seeds": [5, 6]}, "seeds=[5, 6] gives each its own"),
            ({"branches": [Branch(), Branch(seed=5)]}, "seed=5 gives branch 1 its own"),
        ):  # fmt: skip
            told = "fork: replay=True gives every child its parent's seed, and " + re.escape(beside)
            for point in points:
                with pytest.raises(InvalidRequest, match=f"{told}.*leave one of the two out"):
                    pool.submit(point, sampling=GREEDY, replay=True, **{"branches": 2, **seeded})
        assert pool.stats().num_rounds == 0 and pool.stats().num_branches == 0
        for how, seeds in (({"replay": True}, [7, 7]), ({"seeds": [5, 6]}, [5, 6])):
            results = pool.fork(session, 2, SAMPLED, **how)
            assert [result.seed for result in results] == [result.history.seed for result in results] == seeds


def test_a_point_that_was_prefilled_under_another_seed_is_replayed_with_its_own(cache: Path) -> None:
    measured(cache, load_s=100.0, prefill_s=0.0001)
    with ForkPool("fake", backend="inline", workers=2) as pool:
        session = pool.session(seed=7)
        session.append("hello there")
        there = next(name for name in pool.workers if name != session.worker)
        other = pool.fork(session, 1, SAMPLED, seed=5, worker=there, policy="fast", snapshot="never")[0]
        assert other.decision is not None and other.decision.action == "prefill"
        again = pool.fork(session, 1, SAMPLED, replay=True, worker=there)[0]
        here = pool.fork(session, 1, SAMPLED, replay=True)[0]
        assert again.decision is not None and again.decision.action == "fork", "from what the first round prefilled"
        assert again.seed == again.history.seed == here.seed == 7 and again.token_ids == here.token_ids


def test_a_session_at_a_point_has_the_seed_that_it_was_given() -> None:
    with ForkPool("fake", backend="inline") as pool:
        session, ids = pool.session(seed=7), pool.encode("a document " * 3)
        session.append("hello there")
        for point in (session, pool.snapshot(session), ids):
            assert [pool.session(point, seed=seed).seed for seed in (5, 9)] == [5, 9]
        assert pool.session(session).seed == pool.session(pool.snapshot(session)).seed == 7, "the point's own"
        with pytest.raises(BadSampling, match="seed"):
            pool.session(session, seed=-1)


def test_a_history_has_the_seed_that_its_completion_was_sampled_with() -> None:
    """It had the session's, also where the sampling parameters have their own."""
    with ForkPool("fake", backend="inline") as pool:
        session = pool.session(seed=7)
        session.append("hello there")
        for sampling in (SAMPLED, Sampling(max_tokens=8, temperature=1.0, seed=5)):
            result = pool.fork(session, 1, sampling)[0]
            assert result.history is not None and result.session is not None
            assert result.history.turns == result.session.turns and result.history.seed == result.session.seed


# -- backends


def test_another_package_brings_a_backend_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = EntryPoint("elsewhere", "thaw.pool.backends.inline:InlineBackend", backends.GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [ours] if group == backends.GROUP else [])
    with ForkPool("fake", backend="elsewhere", workers=2) as pool:
        assert pool.fork(pool.encode("a document"), 1, GREEDY)[0].ok
    with pytest.raises(
        InvalidRequest, match=r"backend='nowhere': must be 'process' or 'inline' or 'ray' or 'elsewhere'"
    ):
        ForkPool("fake", backend="nowhere")


NO_PROCESS = [
    ({"env": {"SECRET": "xyz", "A": "1"}}, r"env sets A, SECRET for the workers' processes.*Leave env out"),
    ({"env": [{}, {"B": "2"}]}, "env sets B for"),
    ({"boot_timeout_s": 5.0}, r"boot_timeout_s=5\.0 is a limit.*Leave boot_timeout_s out"),
    ({"heartbeat_s": 2.0}, r"heartbeat_s=2\.0 is a limit"),
]
JOINED = [
    ({"workers": 3}, "workers=3: a pool that joins engines has one worker for each, here 1"),
    ({"backend": "inline"}, "backend='inline' boots engines.*Leave backend out"),
    ({"policy_version": "4"}, r"policy_version='4': .* runs policy '0'.*pool.set_policy\('4'\)"),
    ({"max_bach": 3}, "max_bach=3: no option of ForkPool"),
]


@pytest.mark.parametrize(("options", "told"), NO_PROCESS, ids=lambda each: "" if isinstance(each, str) else str(each))
def test_what_only_a_process_heeds_is_refused_where_none_is_started(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRequest, match=told) as refused:
        ForkPool("fake", backend="inline", **options)
    assert "backend='inline'" in str(refused.value) and "xyz" not in str(refused.value), "values may be secrets"
    with thaw.load_engine("fake") as engine:
        with pytest.raises(InvalidRequest, match=told):
            ForkPool(engine, **options)
        with ForkPool(engine, env={}) as pool, ForkPool("fake", backend="inline", env=[{}, {}]) as other:
            assert pool.fork(pool.encode("a"), 1, GREEDY)[0].ok and other.workers, (
                "the engine that was not joined runs on"
            )


@pytest.mark.parametrize(("options", "told"), JOINED, ids=lambda each: "" if isinstance(each, str) else str(each))
def test_what_engines_that_run_already_cannot_heed_is_refused(options: dict[str, Any], told: str) -> None:
    with thaw.load_engine("fake") as engine:
        with pytest.raises(InvalidRequest, match=told):
            ForkPool(engine, **options)
        with ForkPool([engine], workers=1, policy_version="0") as pool:
            assert pool.fork(pool.encode("a"), 1, GREEDY)[0].ok


# -- attached engines


class Narrow:
    """An engine that has memory for two branches at a time."""

    def __init__(self, engine: Engine) -> None:
        self._generate = engine.generate
        engine.generate = self.generate  # type: ignore[method-assign]
        self.refused = 0

    def generate(self, requests: Sequence[GenerateRequest]) -> Handle[list[Completion]]:
        if len(requests) > 2:
            self.refused += 1
            raise MemoryError("no room")
        return self._generate(requests)


def test_a_batch_without_memory_begins_again_in_halves() -> None:
    with thaw.load_engine("fake") as engine:
        with ForkPool(engine) as pool:
            ids = pool.encode("a document " * 10)
            plain = pool.fork(ids, 8, GREEDY, seed=1)
            narrow = Narrow(engine)
            halved = pool.fork(ids, 8, GREEDY, seed=1)
            assert narrow.refused > 0 and bits(halved) == bits(plain)
            assert max(result.attempts for result in halved) == 3
        assert engine.view(engine.open()).tokens == (), "an attached engine stays when the pool closes"


def test_engines_that_run_already_are_joined_and_given_up_when_they_end() -> None:
    with thaw.load_engine("fake") as one, thaw.load_engine("fake") as two, ForkPool([one, two]) as pool:
        assert len(pool.workers) == 2
        ids = pool.encode("a document " * 10)
        plain = pool.fork(ids, 2, GREEDY, seed=1, snapshot="before")
        one.close()
        two_left = [pool.fork(ids, 2, GREEDY, seed=1) for _ in range(2)]
        assert all(bits(results) == bits(plain) for results in two_left)
        with thaw.load_engine("fake") as three:
            pool.add_worker(three)
            assert bits(pool.fork(ids, 2, GREEDY, seed=1, worker=pool.workers[-1])) == bits(plain)


def test_a_session_of_an_engine_outside_the_pool_is_a_point(tmp_path: Path) -> None:
    with thaw.load_engine("fake") as engine, thaw.init(tmp_path / "runs", engine=engine) as repo:
        session = repo.session(seed=3)
        session.append("a document " * 10)
        with ForkPool("fake") as pool:
            results = pool.fork(session, 2, GREEDY)
            assert results[0].decision is not None and results[0].decision.action == "hydrate"
        with session.fork(2) as kids:
            own = kids.generate("", GREEDY)
        assert [r.token_ids for r in results] == [c.token_ids for c in own]


def test_a_branch_has_one_result_however_often_it_is_settled() -> None:
    """A branch that is stopped may come to its end at the same moment."""
    ring = Round(2)
    assert ring.settle(BranchResult(index=0, text="first"))
    assert not ring.settle(BranchResult(index=0, text="again"))
    assert ring.num_dropped == 1 and not ring.done()
    assert ring.settle(BranchResult(index=1, text="second"))
    assert [result.text for result in ring.result()] == ["first", "second"]


# -- weight sync


@pytest.mark.parametrize(
    ("update", "arguments"),
    [("pool_updates:load", {"seed": 5}), ("thaw.engines.base:update_weights", {"source": "5"})],
    ids=["a function of the user's", "the contract's own"],
)
def test_new_weights_reach_every_worker_and_those_that_are_restarted(update: str, arguments: dict[str, object]) -> None:
    env = {"PYTHONPATH": str(HERE)}
    with ForkPool("fake", workers=2, env=env) as pool:
        ids = pool.encode("a document " * 10)
        old = pool.fork(ids, 2, GREEDY, seed=1)
        pool.set_policy("1", update=update, arguments=arguments)
        new = [pool.fork(ids, 2, GREEDY, seed=1, worker=name) for name in pool.workers]
        assert bits(new[0]) == bits(new[1]) != bits(old)
        pids = {worker.name: worker.pid for worker in pool.stats().workers}
        for name, pid in pids.items():
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            assert bits(pool.fork(ids, 2, GREEDY, seed=1, worker=name)) == bits(new[0])
        assert all(worker.incarnation == 2 for worker in pool.stats().workers)


@pytest.mark.slow("starts and ends a pool of processes")
def test_a_function_cannot_be_sent_to_another_process_and_an_update_that_fails_serves_nothing() -> None:
    with ForkPool("fake") as pool:
        before = pool.stats()
        with pytest.raises(Unsupported, match="module:function"):
            pool.set_policy("1", update=lambda engine: None)
        assert pool.policy_version == "0" and pool.stats().workers == before.workers, "it has changed nothing"
        assert pool.fork(pool.encode("a document"), 1, GREEDY)[0].ok
    with ForkPool("fake", backend="inline") as pool:
        seen: list[str] = []
        pool.set_policy("1", update=lambda engine: seen.append(engine.policy_version))
        assert seen == ["0"] and pool.policy_version == "1"


@pytest.mark.slow("starts and ends a pool of processes")
def test_a_worker_that_could_not_be_brought_to_the_policy_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process used to stay, and the pool waited at its end for it to go."""
    monkeypatch.setattr("thaw.pool.workers.fleet.MAX_RESTARTS", 1)
    with ForkPool("fake", env={"PYTHONPATH": str(HERE)}) as pool:
        with pytest.raises(ThawError, match="left no weights"):
            pool.set_policy("1", update="pool_updates:broken")
        until(lambda: [worker.state for worker in pool.stats().workers] == ["gone"])
        began = time.monotonic()
    assert time.monotonic() - began < GRACE_S / 2


@pytest.mark.slow("starts and ends a pool of processes")
def test_a_pool_is_closed_while_a_worker_boots(tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    waits = f"import os, time\nwhile os.path.exists({str(stop)!r}):\n    time.sleep(0.1)\n"
    (tmp_path / "sitecustomize.py").write_text(waits)
    with ForkPool("fake", env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{SRC}"}) as pool:
        (pid,) = [worker.pid for worker in pool.stats().workers]
        assert pid is not None
        stop.touch()
        os.kill(pid, signal.SIGKILL)
        until(lambda: [worker.state for worker in pool.stats().workers] == ["booting"])
        began = time.monotonic()
    assert time.monotonic() - began < GRACE_S / 2
    assert pool._threads._shutdown and not pool._home.path.exists()


@pytest.mark.parametrize("backend", ["process", "inline"])
@pytest.mark.parametrize("captured", ["before", "never"])
def test_tokens_are_prefilled_anew_when_nobody_said_that_the_weights_changed(backend: str, captured: str) -> None:
    """The same round from other weights' own pool is the reference. What must keep its KV stays refused."""
    env = {"PYTHONPATH": str(HERE)} if backend == "process" else {}
    with ForkPool("fake", workers=2, backend=backend, env=env) as pool:
        ids = pool.encode("a document " * 40)
        session = pool.session()
        session.append(token_ids=ids)
        snapshot = pool.snapshot(session)
        old = [pool.fork(ids, 2, GREEDY, seed=1, snapshot=captured, worker=name) for name in pool.workers]
        for name in pool.workers:
            life = pool._fleet.named(name).life
            assert life is not None
            life.host.invoke("pool_updates:load" if backend == "process" else load, {"seed": 5})
        for name in pool.workers:
            new = pool.fork(ids, 2, GREEDY, seed=1, worker=name)
            assert bits(new) != bits(old[0]) == bits(old[1]) and {result.attempts for result in new} == {2}
            prefilled = new[0].decision.num_prefilled_tokens if new[0].decision else None
            assert prefilled == len(ids) or (prefilled == 0 and name != pool.workers[0])
            again = pool.fork(ids, 2, GREEDY, seed=1, worker=name)
            assert bits(again) == bits(new) and {result.attempts for result in again} == {1}
            assert again[0].decision is not None and again[0].decision.action == "fork"
            for stale, error in ((session, StaleSession), (snapshot, IdentityMismatch)):
                with pytest.raises(error):
                    pool.fork(stale, 1, GREEDY, worker=name)
        own = pool.session(ids)
        assert own.tokens == tuple(ids) and pool.fork(pool.snapshot(ids), 1, GREEDY)[0].ok
        with ForkPool("fake", seed=5) as other:
            assert bits(other.fork(ids, 2, GREEDY, seed=1)) == bits(new)


def test_a_session_and_a_snapshot_of_tokens_are_prefilled_anew_too() -> None:
    with ForkPool("fake", backend="inline") as pool:
        ids = pool.encode("a document " * 40)
        old = pool.fork(pool.snapshot(ids), 2, GREEDY, seed=1)
        life = pool._fleet.named("worker-0").life
        assert life is not None
        life.host.invoke(load, {"seed": 5})
        new = pool.fork(pool.snapshot(ids), 2, GREEDY, seed=1)
        assert bits(new) != bits(old) and bits(pool.fork(pool.session(ids), 2, GREEDY, seed=1)) == bits(new)


def test_a_later_round_from_the_same_tokens_knows_their_turn_too() -> None:
    """Where it forks from what an earlier round prefilled, and where it loads that in another worker."""
    with ForkPool("fake", workers=2, backend="inline") as pool:
        ids = pool.encode("a document " * 40)
        first = pool.fork(ids, 1, GREEDY, seed=1)[0]
        until(lambda: pool.stats().arena.num_points == 1)
        again = pool.fork(ids, 1, GREEDY, seed=1, worker=first.worker)[0]
        other = next(name for name in pool.workers if name != first.worker)
        loaded = pool.fork(ids, 1, GREEDY, seed=1, worker=other)[0]
        assert [r.decision and r.decision.action for r in (first, again, loaded)] == ["prefill", "fork", "hydrate"]
        for result in (first, again, loaded):
            assert result.history is not None and result.session is not None
            assert [(turn.start, turn.end) for turn in result.history.turns] == [
                (0, len(ids)),
                (len(ids), len(ids) + 8),
            ]
            assert result.history.turns == result.session.turns


def test_a_lost_sessions_tokens_are_not_taken_for_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Python gives a second session the address that the first one had."""
    monkeypatch.setattr("thaw.pool.schedule.resolver.id", lambda _: 7, raising=False)
    with ForkPool("fake", workers=1, backend="inline") as pool:
        session = pool.session(seed=7)
        session.append("a document " * 40)
        lost = pool.fork(session, [" one", " two"], GREEDY, seed=1, snapshot="never")
        kept = [pool.fork(result, 1, GREEDY, seed=1, snapshot="never") for result in lost]
        worker = pool._fleet.named("worker-0")
        assert worker.life is not None
        pool._fleet.failed(worker, worker.life, EngineDied("ended for this test"))
        again = [pool.fork(result, 1, GREEDY, seed=1, policy="fast", snapshot="never") for result in lost]
        assert [bits(results) for results in again] == [bits(results) for results in kept]


# -- conversations


def test_a_conversation_goes_on_in_a_worker_of_its_own(tmp_path: Path) -> None:
    """Its messages travel to the worker and back, and through a round into the repository."""
    with thaw.open(tmp_path / "runs", create=True) as repo, ForkPool("fake", workers=1, repo=repo) as pool:
        trunk = pool.session(seed=7)
        first = trunk.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}], GREEDY)
        asked = trunk.engine.codec.render_chat(trunk.messages, add_generation_prompt=True, variables={"a": 1})
        assert isinstance(trunk.turns[0], ChatTurn) and len(asked) > trunk.num_tokens
        assert trunk.chat("and?", GREEDY, tools=[{"name": "weather"}]).num_dropped_sampled == 8
        told = trunk.messages
        assert [message["role"] for message in told] == ["system", "user", "assistant", "user", "assistant"]
        assert told[2] == first.message
        winner = pool.fork(trunk, 2, GREEDY)[1].session
        assert winner.messages[:4] == told[:4]
        winner.commit("chosen", branch="main")
        assert thaw.open(tmp_path / "runs").show("main").turns == winner.turns
        with pytest.raises(Unsupported, match="image_url"):
            trunk.chat([{"role": "user", "content": [{"type": "image_url"}]}], GREEDY)
