"""Engines that seem dead and are not, that die as soon as they are joined, and that died while nothing ran there."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import httpx
import pytest

import thaw
from gateway_stand import Gateway, Start
from thaw.core.errors import EngineDied
from thaw.engines.base import Engine
from thaw.gateway import engines, job
from thaw.gateway.engines import told_in_log

openai = pytest.importorskip("openai")
LONG = "a long story about a river, and who lives there. " * 8
POISON = "zyzzyva"
CAUSE = "the server at http://127.0.0.1:1 failed (500: what a client said); its log says why"
NUM_RUNS = job.MAX_FAILURES + 1


def ask(client: Any, input: str, **more: Any) -> Any:
    return client.responses.create(model="fake", input=input, **{"max_output_tokens": 8, **more})


class Poisoned:
    """Makes engines that fail each generation whose prompt holds `POISON`, after some tokens of it if asked to."""

    def __init__(self, num_told: int = 0) -> None:
        self.num_failed = 0
        self._num_told = num_told

    def boot(self) -> Engine:
        engine = thaw.load_engine("fake", step_s=0.002)
        self.poison(engine)
        return engine

    def poison(self, engine: Engine) -> None:
        generate = engine.generate

        def failing(requests: Any) -> Any:
            if not any(POISON in request.prompt_text for request in requests):
                return generate(requests)
            self.num_failed += 1
            if not self._num_told:
                raise EngineDied(CAUSE)
            return _Dying(generate(requests), self._num_told)

        engine.generate = failing  # type: ignore[method-assign]


class _Dying:
    """A generation of which an engine gives `num` deltas."""

    def __init__(self, inner: Any, num: int) -> None:
        self._inner, self._left = inner, num

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __iter__(self) -> Any:
        for delta in self._inner:
            yield delta
            self._left -= 1
            if not self._left:
                self._inner.cancel()
                raise EngineDied(CAUSE)

    def result(self, timeout: float | None = None) -> Any:
        raise EngineDied(CAUSE)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits are short."""
    monkeypatch.setattr(job, "AGAIN_S", 0.01)
    monkeypatch.setattr(engines, "JOIN_AGAIN_S", 0.05)


def failed(gateway: Gateway, input: str, **more: Any) -> Any:
    with pytest.raises(openai.InternalServerError) as refused:
        ask(gateway.openai(), input, **more)
    return refused.value


def test_a_request_that_a_living_engine_fails_each_time_ends_and_others_go_on(
    start: Start, soon: None, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine is not joined anew for it, and a stream that ran meanwhile is not cut."""
    poisoned = Poisoned()
    gateway = start(engine=poisoned.boot(), reconnect=poisoned.boot)
    client = gateway.openai()
    beside = ask(client, LONG, stream=True, max_output_tokens=300)
    next(iter(beside))
    error = failed(gateway, f"{POISON} {LONG}")
    assert error.status_code == 503 and CAUSE in error.message and f"{NUM_RUNS} times" in error.message
    assert poisoned.num_failed == NUM_RUNS
    assert ask(client, "Something else.").usage.output_tokens == 8
    assert list(beside)[-1].response.usage.output_tokens == 300
    assert gateway.service.engines.all[0].num_restarts == 0
    assert httpx.get(f"{gateway.url}/health").json()["status"] == "ok"
    told = [record.getMessage() for record in caplog.records if record.name == "thaw.gateway"]
    assert sum("failed a request, and answers" in line for line in told) == NUM_RUNS
    assert not any("what a client said" in line for line in told)


def test_without_the_bound_it_would_run_for_ever(start: Start, soon: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test before."""
    monkeypatch.setattr(job, "MAX_FAILURES", 1 << 30)
    monkeypatch.setattr(job.Failures, "wait_s", lambda *_: 0.01)
    poisoned = Poisoned()
    gateway = start(engine=poisoned.boot(), reconnect=poisoned.boot)
    made = ask(gateway.openai(), f"{POISON} {LONG}", background=True)
    ended = time.monotonic() + 20
    while poisoned.num_failed < 5 * NUM_RUNS:
        assert time.monotonic() < ended
        time.sleep(0.01)
    assert gateway.openai().responses.retrieve(made.id).status == "in_progress"
    gateway.openai().responses.cancel(made.id)


def test_a_stream_that_is_failed_at_the_same_token_each_time_ends(start: Start, soon: None) -> None:
    """What was told is told once; then comes the error."""
    poisoned = Poisoned(num_told=5)
    gateway = start(engine=poisoned.boot(), reconnect=poisoned.boot)
    events = list(ask(gateway.openai(), f"{POISON} {LONG}", stream=True, extra_body={"seed": 3}))
    assert events[-1].type == "response.failed" and CAUSE in events[-1].response.error.message
    told = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    whole = start(name="other").openai()
    assert told and ask(whole, f"{POISON} {LONG}", extra_body={"seed": 3}).output_text.startswith(told)
    assert poisoned.num_failed == NUM_RUNS


def joined_dead() -> Engine:
    """One that can be joined, and is gone then."""
    engine = thaw.load_engine("fake")
    engine.close()
    return engine


@pytest.mark.parametrize("bounded", [True, False])
def test_engines_that_die_as_soon_as_they_are_joined_are_joined_ever_more_slowly(
    start: Start, monkeypatch: pytest.MonkeyPatch, bounded: bool
) -> None:
    """And the request ends. Not so without the waits: that is the control."""
    monkeypatch.setattr(job, "AGAIN_S", 0.01)
    monkeypatch.setattr(engines, "JOIN_AGAIN_S", 0.2 if bounded else 0.0)
    if not bounded:
        monkeypatch.setattr(job, "MAX_FAILURES", 1 << 30)
        monkeypatch.setattr(job.Failures, "wait_s", lambda *_: 0.01)
    joined = []

    def join() -> Engine:
        joined.append(time.monotonic())
        return joined_dead()

    gateway = start(reconnect=join)
    first = ask(gateway.openai(), LONG)
    gateway.engine.close()
    if not bounded:
        made = ask(gateway.openai(), "On.", previous_response_id=first.id, background=True)
        time.sleep(1.5)
        assert len(joined) > 3 * NUM_RUNS
        gateway.openai().responses.cancel(made.id)
        return
    error = failed(gateway, "On.", previous_response_id=first.id)
    assert error.status_code == 503 and f"{NUM_RUNS} times" in error.message
    assert len(joined) in (NUM_RUNS - 1, NUM_RUNS)
    waits = [later - sooner for sooner, later in pairwise(joined)]
    assert all(wait > 0.2 * 2**i for i, wait in enumerate(waits)), waits


def test_one_that_comes_back_well_is_used_again_and_its_lives_count_anew(start: Start, soon: None) -> None:
    dead = [joined_dead(), joined_dead()]
    gateway = start(reconnect=lambda: dead.pop() if dead else thaw.load_engine("fake"))
    client = gateway.openai()
    first = ask(client, LONG)
    gateway.engine.close()
    assert ask(client, "On.", previous_response_id=first.id).thaw["parent"] == first.thaw["point"]
    one = gateway.service.engines.all[0]
    assert one.num_restarts == 3 and one.life.num_done
    assert one.take_out() == 0.0


class Unreachable:
    """An engine whose client asks it for its model, as those of servers do."""

    def __init__(self) -> None:
        self.engine = thaw.load_engine("fake")
        self.num_asked = 0
        identity = self.engine.identity

        def asked(adapter: str | None = None) -> Any:
            self.num_asked += 1
            if self.engine._driver._closing:  # type: ignore[attr-defined]
                raise EngineDied("the server went away")
            return identity(adapter)

        self.engine.identity = asked  # type: ignore[method-assign]


def test_one_that_died_while_nothing_ran_is_noticed_by_a_request_without_a_point(start: Start, soon: None) -> None:
    """What is stored of its tokens is looked for before it has a place, and that asks the engine for its model."""
    unreachable = Unreachable()
    gateway = start(engine=unreachable.engine, reconnect=lambda: thaw.load_engine("fake"))
    client = gateway.openai()
    ask(client, LONG)
    unreachable.engine.close()
    before = unreachable.num_asked
    assert ask(client, f"Another one. {LONG}").usage.output_tokens == 8
    reply = client.completions.create(model="fake", prompt=LONG, max_tokens=4)
    assert reply.usage.completion_tokens == 4
    assert gateway.service.engines.all[0].num_restarts == 1
    assert unreachable.num_asked - before < 5


def in_loop(gateway: Gateway, do: Callable[[], Any]) -> Any:
    loop = next(iter(gateway.server.server_state.connections)).loop

    async def run() -> Any:
        return await do()

    return asyncio.run_coroutine_threadsafe(run(), loop).result(20)


def test_what_was_loaded_into_an_engine_that_was_replaced_meanwhile_is_not_gone_on_from(
    start: Start, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each request that names the point would run in an engine that is gone."""
    gateway = start(reconnect=lambda: thaw.load_engine("fake"))
    client = gateway.openai()
    first = ask(client, LONG)
    in_loop(gateway, gateway.service.live.clear)
    reached, let_go = threading.Event(), threading.Event()
    old, hydrate = gateway.engine, gateway.engine.hydrate

    def held(plan: Any) -> Any:
        done = hydrate(plan)
        done.result()
        reached.set()
        assert let_go.wait(20)
        return done

    monkeypatch.setattr(old, "hydrate", held)
    made = ask(client, "On.", previous_response_id=first.id, background=True)
    assert reached.wait(20)
    one = gateway.service.engines.all[0]

    async def replace() -> None:
        one.take_out()
        gateway.service.live.drop(one)
        await one.replace(None)

    in_loop(gateway, replace)
    let_go.set()
    ended = time.monotonic() + 20
    while (kept := client.responses.retrieve(made.id)).status == "in_progress":
        assert time.monotonic() < ended
        time.sleep(0.01)
    assert kept.usage.output_tokens == 8 and kept.thaw["parent"] == first.thaw["point"]
    assert all(entry.life is one.life for entry in gateway.service.live.of(one))
    assert ask(client, "And?", previous_response_id=first.id).usage.output_tokens == 8


def test_the_client_of_an_engine_that_is_gone_is_closed(
    start: Start, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once no request needs it."""
    monkeypatch.setattr(engines, "CLOSE_S", 0.05)
    joined: list[Engine] = []

    def join() -> Engine:
        engine = thaw.load_engine("fake")
        joined.append(engine)
        close = engine.close

        def closing() -> None:
            ended.append(engine)
            close()

        engine.close = closing  # type: ignore[method-assign]
        return engine

    ended: list[Engine] = []
    gateway = start(reconnect=join)
    client = gateway.openai()
    first = ask(client, LONG)
    for _ in range(3):
        gateway.service.engine._driver.close()  # type: ignore[attr-defined]
        assert ask(client, "On.", previous_response_id=first.id).usage.output_tokens == 8
    until = time.monotonic() + 20
    while len(ended) < 2:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert len(joined) == 3 and len(ended) == 2
    assert ask(client, "And?", previous_response_id=first.id).usage.output_tokens == 8


def test_what_a_server_said_is_in_no_log() -> None:
    assert told_in_log(EngineDied(CAUSE)) == "the server at http://127.0.0.1:1 failed (500); its log says why"
    assert logging.getLogger("thaw.gateway").name == engines.log.name
