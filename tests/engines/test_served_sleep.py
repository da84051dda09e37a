"""Sleep of a served engine, without one: what the client waits for, and what keeps the engine awake."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from served_stand import Joined, joined
from thaw.core.errors import Busy
from thaw.engines import load_engine
from thaw.engines.base import HydratePlan
from thaw.engines.served import protocol
from thaw.engines.served.protocol import Answer
from thaw.testing.laws.kit import Lab, until
from thaw.testing.plans import capture_plan, mount_at

LIMIT_S = 10.0


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


@pytest.fixture
def plan(lab: Lab) -> HydratePlan:
    with load_engine("fake") as engine:
        return lab.plan(lab.capture(engine, lab.begin(engine, 300)))


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Joined]:
    with joined(tmp_path / "mail") as found:
        yield found


def asleep_beside(client: Joined, work: Any) -> None:
    """Sleep is asked for in the middle of `work`, and follows when that is over."""
    until(lambda: any(isinstance(message, client.stand.slow or ()) for message in client.stand.heard), LIMIT_S)
    sleeping = threading.Thread(target=client.engine.sleep, daemon=True)
    sleeping.start()
    time.sleep(0.2)
    assert client.stand.slept == [] and not work.done()
    with pytest.raises(Busy, match="asleep"):
        client.engine.open()
    client.go_on()
    sleeping.join(LIMIT_S)
    assert client.stand.slept == [1]


def test_it_waits_for_a_session_that_is_being_hydrated(client: Joined, plan: HydratePlan) -> None:
    client.stand.slow = protocol.Fill
    work = client.engine.hydrate(plan)
    asleep_beside(client, work)
    assert work.result(LIMIT_S).proof.num_cached_tokens == plan.num_kv
    client.engine.wake()


def test_it_waits_for_a_capture(client: Joined, plan: HydratePlan, lab: Lab) -> None:
    """Whatever comes of it."""
    session = client.engine.hydrate(plan).result(LIMIT_S).session
    client.stand.slow = protocol.Write
    work = client.engine.capture(session, capture_plan(lab.mount, plan.num_kv, 1))
    asleep_beside(client, work)
    until(work.done, LIMIT_S)
    client.engine.wake()


def test_it_waits_while_the_weights_are_hashed(client: Joined) -> None:
    client.stand.slow = protocol.Look
    with ThreadPoolExecutor(1) as threads:
        asleep_beside(client, threads.submit(client.engine.identity))
    client.engine.wake()


def test_what_was_asked_for_before_and_begins_later_is_refused(client: Joined, plan: HydratePlan) -> None:
    """The loop gets to it after the sleep: it is held up as long."""
    held = threading.Event()
    client.engine._loop.inner.call_soon_threadsafe(held.wait, LIMIT_S)
    work = client.engine.hydrate(plan)
    client.engine._asleep = 1
    held.set()
    with pytest.raises(Busy, match="asleep"):
        work.result(LIMIT_S)
    assert client.of(protocol.Fill) == []


def test_nothing_under_way_keeps_it_awake(client: Joined, plan: HydratePlan) -> None:
    client.engine.hydrate(plan).result(LIMIT_S)
    client.engine.sleep()
    client.engine.wake()
    assert client.stand.slept == [1]


def test_a_session_of_another_client_that_runs_keeps_it_awake(client: Joined) -> None:
    """The engine counts it: this client does not know of it."""
    client.stand.answer = lambda _: Answer(counts={"running": 2})
    with pytest.raises(Busy, match="vLLM works for others: 2 requests"):
        client.engine.sleep()
    assert client.stand.slept == [] and client.engine.open(), "and it is awake"
    client.stand.answer = client.stand.agree
    client.engine.sleep()
    assert client.stand.slept == [1]


def test_what_its_owner_would_change_waits_until_it_is_awake(client: Joined) -> None:
    """The scheduler of a vLLM that sleeps begins no command, and a worker without its memory runs nothing safely."""
    client.engine.sleep()
    for use in (client.engine.switch, lambda: client.engine.collective_rpc("anything")):
        with pytest.raises(Busy, match="asleep"):
            use()
    client.engine.wake()
    client.engine.switch()
    assert len(client.of(protocol.Switch)) == 1
