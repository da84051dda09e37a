"""Several engines behind one gateway: where requests run, what each computes, and what becomes of one that dies."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from test_process import served

import thaw
from gateway_stand import TOKEN, Gateway, Start
from thaw.cli.serving import Starting, opened
from thaw.core.errors import InvalidRequest
from thaw.gateway.settings import GatewaySettings

openai = pytest.importorskip("openai")
LONG = "a long story about a river, and who lives there. " * 40


def ask(client: Any, input: str, **more: Any) -> Any:
    return client.responses.create(model="fake", input=input, **{"max_output_tokens": 8, **more})


def at_once(n: int, do: Any) -> list[Any]:
    barrier = threading.Barrier(n)

    def one(i: int) -> Any:
        barrier.wait()
        return do(i)

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(one, range(n)))


def health(gateway: Gateway) -> Any:
    return httpx.get(f"{gateway.url}/health")


def series(gateway: Gateway, name: str) -> dict[str, float]:
    """Values of a series by its labels."""
    text = httpx.get(f"{gateway.url}/metrics", headers={"authorization": f"Bearer {TOKEN}"}).text
    lines = [line for line in text.splitlines() if line.startswith(name + "{")]
    return {line.partition("{")[2].partition("}")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_strangers_are_spread_and_kin_stay_together(start: Start) -> None:
    gateway = start(engines=2, step_s=0.02)
    client = gateway.openai()
    openings = [f"{letter} {LONG}" for letter in "abcdefgh"]
    firsts = at_once(8, lambda i: ask(client, openings[i]))
    homes = [first.thaw["engine"] for first in firsts]
    assert sorted(homes) == [0, 0, 0, 0, 1, 1, 1, 1]
    for first, home in zip(firsts, homes, strict=True):
        kid = ask(client, "On.", previous_response_id=first.id)
        assert kid.thaw["engine"] == home and kid.thaw["source"] == "live"
        assert kid.thaw["cached_tokens"] == first.usage.total_tokens - 1
    assert series(gateway, "thaw:engine_up") == {'engine="0"': 1.0, 'engine="1"': 1.0}
    live = series(gateway, "thaw:engine_live_sessions")
    assert sum(live.values()) == len(gateway.service.live) and min(live.values()) >= 4
    computed = series(gateway, "thaw:engine_prefilled_tokens_total")
    generated = series(gateway, "thaw:engine_generated_tokens_total")
    for number, forwarded in enumerate(gateway.forwarded_each):
        of = f'engine="{number}"'
        assert forwarded == computed[of] + generated[of] - 8  # the last token of each answer is not run


def test_a_prefix_at_first_sight_is_computed_once_over_all_engines(start: Start) -> None:
    gateway = start(engines=2, step_s=0.002)
    client = gateway.openai()
    replies = at_once(8, lambda i: ask(client, LONG + f"Question {i}"))
    read = gateway.num_forwarded - 8 * 7
    assert read < len(LONG) + 8 * 60, (read, len(LONG))
    assert len({reply.thaw["engine"] for reply in replies}) == 1


def test_a_crowded_engine_hands_over_what_another_one_can_load(start: Start) -> None:
    gateway = start(engines=2, step_s=0.02, settings=GatewaySettings(spread=2))
    client = gateway.openai()
    first = ask(client, LONG)
    before = gateway.num_forwarded
    kids = at_once(8, lambda i: ask(client, f"Go on {i}.", previous_response_id=first.id, max_output_tokens=40))
    assert {kid.thaw["engine"] for kid in kids} == {0, 1}
    assert {kid.thaw["cached_tokens"] for kid in kids} == {first.usage.total_tokens - 1}
    assert gateway.num_forwarded - before == sum(kid.thaw["prefilled_tokens"] + 39 for kid in kids)


def test_what_one_engine_stored_another_one_goes_on_with(start: Start) -> None:
    """In either order, and with the bytes that it would have had: a run on one engine alone says the same."""
    gateway = start(engines=2)
    client = gateway.openai()
    first = ask(client, LONG)
    alone = ask(client, "On.", previous_response_id=first.id, extra_body={"seed": 3})
    gateway.service.engines.all[first.thaw["engine"]].is_up = False
    moved = ask(client, "On.", previous_response_id=first.id, extra_body={"seed": 3})
    assert moved.thaw["engine"] != first.thaw["engine"] and moved.thaw["source"] == "live"
    assert moved.thaw["cached_tokens"] == first.usage.total_tokens - 1
    assert moved.output_text == alone.output_text


def test_a_stream_goes_on_in_another_engine_when_its_own_one_dies(start: Start) -> None:
    gateway = start(engines=2, step_s=0.005)
    client = gateway.openai()
    first = ask(client, LONG)
    whole: dict[str, Any] = {
        "input": "Go on.", "max_output_tokens": 80, "extra_body": {"seed": 3}, "previous_response_id": first.id
    }  # fmt: skip
    events = []
    for event in ask(client, stream=True, **whole):
        events.append(event)
        if len(events) == 30:
            gateway.engines[first.thaw["engine"]].close()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    told = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    done = events[-1].response
    assert done.output_text == told and done.usage.output_tokens == 80
    assert done.thaw["engine"] != first.thaw["engine"]
    assert ask(client, **whole).output_text == told
    state = health(gateway)
    assert state.status_code == 200 and state.json()["status"] == "degraded"
    assert {one["engine"]: one["up"] for one in state.json()["engines"]} == {
        first.thaw["engine"]: False, done.thaw["engine"]: True
    }  # fmt: skip


def test_one_that_died_is_brought_back_and_used_again(start: Start) -> None:
    gateway = start(engines=2, reconnect=lambda: thaw.load_engine("fake"))
    client = gateway.openai()
    gateway.engines[0].close()
    gateway.engines[1].close()
    for letter in "abcdefgh":
        assert ask(client, f"{letter} {LONG}").usage.output_tokens == 8
    for _ in range(500):
        if health(gateway).json()["status"] == "ok":
            break
        time.sleep(0.02)
    assert series(gateway, "thaw:engine_up") == {'engine="0"': 1.0, 'engine="1"': 1.0}
    assert series(gateway, "thaw:engine_replaced") == {'engine="0"': 1.0, 'engine="1"': 1.0}
    assert {ask(client, f"{letter} {LONG}").thaw["engine"] for letter in "ijkl"} == {0, 1}


def test_all_down_and_none_to_come_is_503(start: Start) -> None:
    gateway = start(engines=2)
    for engine in gateway.engines:
        engine.close()
    with pytest.raises(openai.InternalServerError) as refused:
        ask(gateway.openai(), "x")
    assert refused.value.status_code == 503 and refused.value.response.headers["retry-after"]
    assert health(gateway).status_code == 503 and health(gateway).json()["status"] == "waiting"


def test_engines_of_two_models_are_refused(start: Start) -> None:
    with thaw.load_engine("fake", seed=1) as other, pytest.raises(InvalidRequest, match=r"engine 1.*another model"):
        start(engine=other, engines=2)


def test_sessions_quotas_and_limits_count_over_all_engines(start: Start) -> None:
    from thaw.gateway.settings import Limits

    gateway = start(engines=2, settings=GatewaySettings(limits=Limits(live_sessions=3)))
    client = gateway.openai()
    for letter in "abcdef":
        ask(client, f"{letter} {LONG}")
    assert gateway.num_open(3) <= 3 and len(gateway.service.live) <= 3


# -- the command line

HOW = Starting(
    model=None, dtype=None, device=None, python=None, arena_nbytes=None, environments=(), arguments=()
)  # fmt: skip


@pytest.mark.parametrize(
    ("names", "workers", "how", "why"),
    [
        (("fake", "fake"), None, HOW, "start several with --workers"),
        (("http://x:1", "fake"), None, HOW, "start several with --workers"),
        (("http://x:1",), 2, HOW, "--workers starts its own engines"),
        (("fake", "fake"), 2, HOW, "--workers starts its own engines"),
        (("fake",), None, msgspec.structs.replace(HOW, arguments=("--x",)), "are for --workers"),
        (("fake",), 2, msgspec.structs.replace(HOW, arena_nbytes=1), "has no server"),
        (("fake",), 1, msgspec.structs.replace(HOW, environments=("A=1", "A=2")), "2 --worker-env for 1 workers"),
        (("fake",), 1, msgspec.structs.replace(HOW, environments=("A",)), "write NAME=VALUE"),
        (("vllm",), 1, msgspec.structs.replace(HOW, model="m", dtype="float16"), "write them after --"),
    ],
)
def test_options_that_do_not_go_together_are_refused_by_name(
    tmp_path: Path, names: tuple[str, ...], workers: int | None, how: Starting, why: str
) -> None:
    thaw.init(tmp_path / "runs").close()
    with pytest.raises(InvalidRequest, match=why), opened(str(tmp_path / "runs"), names, workers, how):
        pass


@pytest.mark.slow("starts processes")
def test_workers_of_a_process_share_one_repository(tmp_path: Path) -> None:
    thaw.init(tmp_path / "runs").close()
    with served(tmp_path / "runs", "--engine", "fake", "--workers", "2") as process:
        kin = at_once(2, lambda i: ask(process.client, f"{i} {LONG}", max_output_tokens=200))
        assert {one.thaw["engine"] for one in kin} == {0, 1}
        assert process.end() == 0
    with served(tmp_path / "runs", "--engine", "fake", "--workers", "3") as process:
        for one in kin:
            kid = ask(process.client, "On.", previous_response_id=one.id)
            assert kid.thaw["cached_tokens"] == one.usage.total_tokens - 1
