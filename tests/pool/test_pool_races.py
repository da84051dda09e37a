"""What happens at one moment of a pool: drained, closed and counted while a chunk is between its queue and a worker.

The moments are held open: a step that the race needs waits until the other side has come to its own.
"""

from __future__ import annotations

import gc
import itertools
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

import thaw
from thaw import Sampling
from thaw.core.errors import EngineDied, ThawError, TimedOut, Unsupported
from thaw.engines.base import Engine, GenerateRequest
from thaw.pool import ForkPool, PoolSession, Round
from thaw.pool.rpc.client import EngineProxy, RpcClient
from thaw.pool.rpc.connection import Connection
from thaw.pool.rpc.protocol import Booted
from thaw.pool.rpc.server import RpcServer
from thaw.pool.schedule.rates import Rates
from thaw.pool.workers import fleet
from thaw.pool.workers.worker import Worker
from thaw.repo.kept import Kept
from thaw.testing.laws.kit import until
from thaw.testing.laws.pool_kit import bits

GREEDY = Sampling(max_tokens=8, ignore_eos=True)
ENDLESS = Sampling(max_tokens=50_000, ignore_eos=True)
LIMIT_S = 20.0


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("THAW_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def many_switches() -> Iterator[None]:
    """Threads take turns a thousand times as often: a count that is not guarded loses some of its steps."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def document(pool: ForkPool) -> PoolSession:
    session = pool.session(seed=7)
    session.append("a document " * 40)
    return session


def engine_of(pool: ForkPool, name: str) -> Engine:
    life = pool._fleet.named(name).life
    assert life is not None
    return life.engine


class Held:
    """Makes a call wait at its door: `reached` when somebody is there, `go` lets everybody through."""

    def __init__(self, call: Callable[..., Any], times: int = 1) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        self._call, self._left = call, itertools.count(times, -1)

    def __call__(self, *args: Any, **how: Any) -> Any:
        if next(self._left) > 0:
            self.reached.set()
            assert self.go.wait(LIMIT_S)
        return self._call(*args, **how)


def beside(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


# -- a chunk between its queue and a worker


def test_a_chunk_that_is_being_judged_keeps_its_point_when_its_worker_is_drained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its batch failed, and what becomes of it is not yet known: it is in no queue and no worker runs it."""
    with ForkPool("fake", workers=2, backend="inline") as pool:
        session = document(pool)
        whole = pool.fork(session, 3, GREEDY, seed=1)
        held = Held(fleet.responds)
        monkeypatch.setattr("thaw.pool.schedule.scheduler.responds", held)
        engine, generate = engine_of(pool, session.worker), engine_of(pool, session.worker).generate

        def fail(requests: Any) -> Any:
            engine.generate = generate  # type: ignore[method-assign]
            raise RuntimeError("out of order, once")

        engine.generate = fail  # type: ignore[method-assign]
        session.append("more")
        round_ = pool.submit(session, 3, GREEDY, seed=1, snapshot="never")
        assert held.reached.wait(LIMIT_S)
        draining = beside(lambda: pool.drain(session.worker))
        time.sleep(0.3)
        held.go.set()
        results = round_.result(LIMIT_S)
        draining.join(LIMIT_S)
        assert all(result.ok for result in results) and bits(results) != bits(whole)
        assert {result.worker for result in results} == set(pool.workers), "in the worker that is left"


def test_a_round_that_comes_while_its_worker_is_drained_keeps_its_point() -> None:
    """It was accepted after the points of those that wait were looked through."""
    with ForkPool("fake", workers=2, backend="inline", max_batch=1) as pool:
        first, second = document(pool), document(pool)
        while second.worker != first.worker:
            second = document(pool)
        other = next(name for name in pool.workers if name != first.worker)
        busy = pool.submit(document(pool), 1, ENDLESS, worker=other)
        until(lambda: pool.stats().running == 1)
        waiting = pool.submit(first, 1, GREEDY, snapshot="never", worker=other)
        held = Held(pool._arena.capture)
        pool._arena.capture = held  # type: ignore[method-assign]
        draining = beside(lambda: pool.drain(first.worker))
        assert held.reached.wait(LIMIT_S)
        late = pool.submit(second, 1, GREEDY, snapshot="never")
        held.go.set()
        draining.join(LIMIT_S)
        busy.cancel()
        assert waiting.result(LIMIT_S)[0].ok and late.result(LIMIT_S)[0].ok


def test_results_that_are_stored_outlive_a_drain() -> None:
    with ForkPool("fake", workers=2, backend="inline") as pool:
        held = Held(pool._arena.capture)
        pool._arena.capture = held  # type: ignore[method-assign]
        result = pool.fork(document(pool), 1, GREEDY, store=True, snapshot="never")[0]
        assert held.reached.wait(LIMIT_S)
        draining = beside(lambda: pool.drain(result.worker))
        draining.join(0.3)
        held.go.set()
        draining.join(LIMIT_S)
        assert pool.fork(result, 1, GREEDY)[0].ok


def test_closing_answers_what_no_thread_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that was taken waits for a thread, where all of them are busy: it used to be dropped, and its round never
    ended."""
    monkeypatch.setattr("thaw.pool.pool.MAX_THREADS", 1)
    pool = ForkPool("fake", backend="inline")
    session = document(pool)
    engine = engine_of(pool, session.worker)
    engine.generate = held = Held(engine.generate)  # type: ignore[method-assign]
    rounds = [pool.submit(session, 1, ENDLESS) for _ in range(3)]
    assert held.reached.wait(LIMIT_S)
    until(lambda: pool.stats().running == 3)
    closing = beside(pool.close)
    until(lambda: pool._threads._shutdown)
    time.sleep(0.1)
    held.go.set()
    closing.join(LIMIT_S)
    for round_ in rounds:
        assert isinstance(round_.result(LIMIT_S, errors="return")[0].error, EngineDied)


def test_closing_answers_what_is_judged_just_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is found dead, and the pool's threads take nothing more."""
    pool = ForkPool("fake", backend="inline")
    session = document(pool)
    held = Held(lambda life: False)
    monkeypatch.setattr("thaw.pool.schedule.scheduler.responds", held)
    engine = engine_of(pool, session.worker)
    round_ = pool.submit(session, 2, ENDLESS, snapshot="never")
    until(lambda: pool.stats().running == 2)
    submit = pool._threads.submit

    def refuse(*_: Any) -> Any:
        raise RuntimeError("cannot schedule new futures after shutdown")

    engine.close()
    assert held.reached.wait(LIMIT_S)
    pool._threads.submit = refuse  # type: ignore[method-assign, assignment]
    held.go.set()
    results = beside(lambda: round_.result(LIMIT_S, errors="return"))
    time.sleep(0.2)
    pool._threads.submit = submit  # type: ignore[method-assign]
    pool.close()
    results.join(LIMIT_S)
    assert all(isinstance(result.error, ThawError) for result in round_.result(0, errors="return"))


def test_a_worker_that_is_drained_while_it_boots_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with ForkPool("fake", workers=2, backend="inline") as pool:
        held = Held(pool._backend.boot)
        monkeypatch.setattr(pool._backend, "boot", held)
        worker = pool._fleet.named("worker-0")
        assert worker.life is not None
        pool._fleet.failed(worker, worker.life, EngineDied("ended for this test"))
        assert held.reached.wait(LIMIT_S)
        pool.drain("worker-0")
        assert [w.state for w in pool.stats().workers] == ["gone", "ready"]
        held.go.set()
        time.sleep(0.3)
        assert [w.state for w in pool.stats().workers] == ["gone", "ready"]
        pool.drain("worker-0")
        assert [w.state for w in pool.stats().workers] == ["gone", "ready"], "draining it twice changes nothing"


def test_two_policies_at_once_are_set_one_after_the_other() -> None:
    """Nothing may run while one of them is brought in, and the first that is done used to let batches go on."""
    with ForkPool("fake", backend="inline") as pool:
        ids = pool.encode("a document " * 10)
        inside, seen, both = threading.Event(), [0], threading.Event()

        def slow(engine: Engine) -> None:
            inside.set()
            both.wait(0.5)
            seen.append(pool.stats().running)

        first = beside(lambda: pool.set_policy("1", update=slow))
        assert inside.wait(LIMIT_S)
        second = beside(lambda: pool.set_policy("2", update=lambda engine: None))
        round_ = pool.submit(ids, 4, ENDLESS)
        first.join(LIMIT_S)
        round_.cancel()
        second.join(LIMIT_S)
        assert seen == [0, 0] and pool.policy_version == "2"
        assert engine_of(pool, "worker-0").policy_version == "2"


def test_a_call_that_is_cancelled_before_the_engine_hears_of_it_is_cancelled() -> None:
    ours, theirs = socket.socketpair()
    with thaw.load_engine("fake") as engine:
        server = RpcServer(Connection(theirs))
        server._engine = engine
        serving = beside(server.serve)
        generate = engine.generate

        def begun(requests: Any) -> Any:
            """The engine's own handle takes a cancel from its first token on."""
            handle = generate(requests)
            next(iter(handle))
            return handle

        engine.generate = held = Held(begun)  # type: ignore[method-assign]
        client = RpcClient(Connection(ours), "worker-0")
        proxy = EngineProxy(client, Booted(info=engine.info, options={}, policy_version="0", pid=0))
        session = proxy.open()
        proxy.append(session, engine.codec.encode("a document", first=True)).result()
        handle = proxy.generate([GenerateRequest(session=session, sampling=ENDLESS)])
        assert held.reached.wait(LIMIT_S)
        handle.cancel()
        proxy.view(session)  # sent after the cancel, and answered: so that was read
        held.go.set()
        assert handle.result()[0].finish_reason == "abort"
        client.end("the test is over")
        serving.join(LIMIT_S)


def test_an_engine_in_another_process_says_that_it_has_what_messages_ask_for() -> None:
    ours, _theirs = socket.socketpair()
    with thaw.load_engine("fake") as engine:
        assert "sleep" in engine.info.capabilities
        info = msgspec.structs.replace(engine.info, capabilities=engine.info.capabilities | {"adapters"})
        client = RpcClient(Connection(ours), "worker-0")
        proxy = EngineProxy(client, Booted(info=info, options={}, policy_version="0", pid=0))
        assert proxy.info.capabilities == engine.info.capabilities - {"sleep"}
        for refused in (proxy.require_sleep, proxy.sleep, lambda: proxy.open(adapter="law")):
            with pytest.raises(Unsupported):
                refused()
        client.end("the test is over")


# -- a point that is pushed out of its worker


def num_sessions(engine: Engine) -> int:
    return len(engine._sessions)  # type: ignore[attr-defined]


def test_a_point_that_is_pushed_out_before_it_is_forked_is_forked_and_then_closed() -> None:
    """Its session used to be closed under the batch that had brought it, which then began again."""
    with ForkPool("fake", workers=1, backend="inline", residents=1) as pool:
        ids = [pool.encode(f"document {number} " * 20) for number in range(2)]
        engine = engine_of(pool, "worker-0")
        engine.fork = held = Held(engine.fork)  # type: ignore[method-assign]
        first = pool.submit(ids[0], 2, GREEDY, seed=1, snapshot="never", keep=False)
        assert held.reached.wait(LIMIT_S)
        assert pool.fork(ids[1], 2, GREEDY, seed=1, snapshot="never", keep=False)[0].ok
        life = pool._fleet.named("worker-0").life
        assert life is not None and life.num_residents() == 1
        until(lambda: num_sessions(engine) == 2, LIMIT_S)  # of the point that is there, and of the one that went
        held.go.set()
        assert {(result.ok, result.attempts) for result in first.result(LIMIT_S)} == {(True, 1)}
        del first
        until(lambda: num_sessions(engine) == 1, LIMIT_S)
        assert pool.fork(ids[0], 2, GREEDY, seed=1, snapshot="never")[0].decision.action == "prefill"  # type: ignore[union-attr]


def test_a_point_that_is_being_brought_is_not_pushed_out() -> None:
    """A second batch finds it where the first one puts it, however many others came meanwhile."""
    with ForkPool("fake", workers=1, backend="inline", residents=1, max_batch=2) as pool:
        ids = [pool.encode(f"document {number} " * 20) for number in range(3)]
        engine = engine_of(pool, "worker-0")
        engine.append = held = Held(engine.append)  # type: ignore[method-assign]
        rounds = [pool.submit(ids[0], 1, GREEDY, seed=1, snapshot="never")]
        assert held.reached.wait(LIMIT_S)
        assert all(pool.fork(tokens, 1, GREEDY, snapshot="never")[0].ok for tokens in ids[1:])
        rounds.append(pool.submit(ids[0], 1, GREEDY, seed=1, snapshot="never"))
        until(lambda: pool.stats().running == 2)
        time.sleep(0.1)
        held.go.set()
        results = [round_.result(LIMIT_S)[0] for round_ in rounds]
        assert [result.decision and result.decision.action for result in results] == ["prefill", "fork"]
        assert bits(results[:1]) == bits(results[1:])


def test_an_engine_that_ended_is_let_go_of_with_its_residents() -> None:
    with ForkPool("fake", workers=1, backend="inline") as pool:
        assert pool.fork(pool.encode("a document " * 20), 1, GREEDY, keep=False)[0].ok
        worker = pool._fleet.named("worker-0")
        life = worker.life
        assert life is not None and life.num_residents() == 1
        gone = weakref.ref(life)
        pool._fleet.failed(worker, life, EngineDied("ended for this test"))
        del life
        until(lambda: worker.incarnation == 2, LIMIT_S)
        until(lambda: (gc.collect(), gone() is None)[1], LIMIT_S)


# -- counts


def at_once(work: Callable[[], object], threads: int = 8) -> None:
    """Run `work` on many threads at the same time; raises what one of them raises."""
    start = threading.Barrier(threads)

    def run() -> None:
        start.wait()
        work()

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(run) for _ in range(threads)]:
            done.result()


class Racing(int):
    """A count whose every change takes long enough for another thread to come in between."""

    def __add__(self, other: int) -> Racing:
        value = int(self) + other
        time.sleep(0.0005)
        return Racing(value)

    def __sub__(self, other: int) -> Racing:
        return self + -other


def test_counts_are_right_however_many_threads_make_them() -> None:
    with ForkPool("fake", workers=1, backend="inline", max_batch=64) as pool:
        session = document(pool)
        worker = pool._fleet.named("worker-0")
        worker.num_branches, pool._scheduler.num_rounds = Racing(0), Racing(0)
        at_once(lambda: [pool.fork(session, 2, Sampling(max_tokens=1), snapshot="never") for _ in range(5)])
        stats = pool.stats()
        assert (stats.num_rounds, stats.num_branches, stats.workers[0].num_branches) == (40, 80, 80)


def test_retries_are_counted_however_many_fail_at_once() -> None:
    with ForkPool("fake", workers=1, backend="inline", retries=50) as pool:
        session = document(pool)
        engine = engine_of(pool, session.worker)
        generate, left = engine.generate, itertools.count(24, -1)

        def fail(requests: Any) -> Any:
            if next(left) > 0:
                raise RuntimeError("out of order")
            return generate(requests)

        pool._scheduler.num_retries = Racing(0)
        engine.generate = fail  # type: ignore[method-assign]
        at_once(lambda: pool.fork(session, 1, Sampling(max_tokens=1), snapshot="never"))
        assert pool.stats().num_retries == 24


def test_points_of_the_arena_are_counted_while_others_are_let_go_of() -> None:
    with ForkPool("fake", workers=1, backend="inline") as pool:
        session = document(pool)
        shared = pool._arena
        kept = [pool.snapshot(session)]

        def come_and_go() -> None:
            for _ in range(4):
                life = pool._fleet.named("worker-0").life
                assert life is not None
                shared.capture(life.contexts[shared.store.uuid], session.ref, Kept())
                shared.reclaim()

        at_once(come_and_go)
        until(lambda: shared.stats().num_points == len(kept))
        assert shared.stats().num_captures == 33
        shared.reclaim()
        assert len(list(shared.store.refs())) == 1, "and their bytes are reclaimed"


def test_a_pack_that_two_threads_spill_is_not_lost() -> None:
    """The second one used to find the link of the first, and to remove what it points to."""
    with ForkPool("fake", workers=2, backend="inline") as pool:
        session = document(pool)
        snapshot = pool.snapshot(session)
        whole = pool.fork(session, 1, GREEDY, seed=1)
        pool._arena.limit_nbytes = 1
        oldest = pool._arena._oldest
        listed = threading.Barrier(2)

        def both() -> Any:
            found = oldest()
            listed.wait(LIMIT_S)
            return found

        pool._arena._oldest = both  # type: ignore[method-assign]
        at_once(lambda: pool._arena.make_room(0), threads=2)
        pool._arena._oldest = oldest  # type: ignore[method-assign]
        assert pool.stats().arena.num_spills >= 1
        pool.drain(session.worker)
        assert bits(pool.fork(snapshot, 1, GREEDY, seed=1)) == bits(whole)


def test_statistics_are_of_one_moment_whatever_workers_do() -> None:
    """A worker that ended between two looks at it used to end the pool's monitor, and with it all time limits."""
    with ForkPool("fake", workers=1, backend="inline") as pool:
        worker = pool._fleet.named("worker-0")
        life, looks = worker.life, itertools.cycle([True, False])

        class Ending(Worker):
            """Its life ends after each look, but while the lock is held, under which alone workers change."""

            def __getattribute__(self, name: str) -> Any:
                if name == "life":
                    return life if pool._changed._is_owned() or next(looks) else None  # type: ignore[attr-defined]
                return super().__getattribute__(name)

        worker.__class__ = Ending
        assert pool._fleet.stats()[0].state == "ready"
        assert [found for _, found in pool._fleet.ready()] == [life]


def test_rates_are_read_while_they_are_measured(tmp_path: Path) -> None:
    rates = Rates("fake", "fake", "cpu", tmp_path)
    numbers = itertools.count()

    def measure() -> None:
        for _ in range(200):
            rates.load(f"tier-{next(numbers)}", 100, 1.0)

    def read() -> None:
        for _ in range(100):
            rates.summary()

    sides = itertools.cycle([measure, read])

    def either() -> None:
        next(sides)()

    at_once(either, threads=4)
    assert len(rates.summary()) >= 400


def test_a_callback_that_raises_harms_no_other_round() -> None:
    """It used to end the thread that called it: the monitor's, when a branch had run out of time."""

    def broken(round_: Round) -> None:
        raise ValueError("the caller's own fault")

    with ForkPool("fake", workers=1, backend="inline", max_batch=1) as pool:
        session = document(pool)
        running = pool.submit(session, 1, ENDLESS, worker="worker-0")
        until(lambda: pool.stats().running == 1)
        waiting = [pool.submit(session, 1, ENDLESS, timeout_s=0.2) for _ in range(3)]
        for round_ in waiting:
            round_.add_done_callback(broken)
        for round_ in waiting:
            assert isinstance(round_.result(LIMIT_S, errors="return")[0].error, TimedOut)
        running.cancel()


def test_a_count_that_is_not_guarded_is_wrong() -> None:
    """The check on the checks: it loses steps under `Racing`."""

    class Bare:
        count: int = Racing(0)

    def step() -> None:
        Bare.count += 1

    at_once(step)
    assert Bare.count < 8
