"""An operator frees a gateway's accelerator and takes it back: conversations and answers go on as they were."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from test_draining import answering, finished
from test_tenants import two

import thaw
from gateway_stand import TOKEN, Gateway, Start
from thaw.cli.app import run
from thaw.core.errors import EngineDied, Unsupported
from thaw.engines.base import Engine
from thaw.engines.embedded.engine import EmbeddedEngine
from thaw.gateway.problems import RETRY_AFTER_S
from thaw.repo.bridge import call

openai = pytest.importorskip("openai")
KEY = {"Authorization": f"Bearer {TOKEN}"}


def slept(gateway: Gateway, timeout_s: float = 60.0) -> httpx.Response:
    """What is answered once it sleeps, however slow the machine is."""
    return httpx.post(f"{gateway.url}/admin/sleep", headers=KEY, json={"timeout_s": timeout_s}, timeout=120)


def cli(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = run(["engine", *words, "--api-key", TOKEN, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_gateway_that_slept_goes_on_to_the_same_answers(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    gateway = start(step_s=0.003)
    client = gateway.openai()
    whole = finished(gateway, answering(gateway, extra_body={"seed": 5}).id)
    asked: dict[str, Any] = {"model": "fake", "max_output_tokens": 8, "extra_body": {"seed": 7}}
    first = client.responses.create(input="one", **asked)
    expected = client.responses.create(input="two", previous_response_id=first.id, **asked).output_text
    cut = answering(gateway, extra_body={"seed": 5})
    code, told = cli(capsys, "sleep", gateway.url, "--level", "2")
    assert code == 0 and told["asleep"] and told["level"] == 2
    assert told["parked"][0]["id"] == cut.id and told["sessions"]
    assert httpx.get(f"{gateway.url}/health").json()["status"] == "asleep"
    with pytest.raises(openai.InternalServerError, match="asleep"):
        client.responses.create(model="fake", input="another")
    for words in (("sleep", gateway.url), ("drain", gateway.url), ("drain", gateway.url, "--undo")):
        assert cli(capsys, *words)[0] == 4
    code, told = cli(capsys, "wake", gateway.url)
    assert code == 0 and not told["missed"] and told["resumed"] == 1
    assert finished(gateway, cut.id) == whole
    assert client.responses.create(input="two", previous_response_id=first.id, **asked).output_text == expected
    assert httpx.get(f"{gateway.url}/health").json()["status"] == "ok"
    assert cli(capsys, "wake", gateway.url)[0] == 4


def test_a_gateway_that_is_stopped_while_it_sleeps_is_restored(start: Start) -> None:
    from thaw.gateway.settings import GatewaySettings

    gateway = start(step_s=0.003, name="same")
    whole = finished(gateway, answering(gateway, extra_body={"seed": 5}).id)
    cut = answering(gateway, extra_body={"seed": 5})
    assert httpx.post(f"{gateway.url}/admin/sleep", headers=KEY).json()["asleep"]
    gateway.close()
    again = start(settings=GatewaySettings(restore=True), name="same")
    assert finished(again, cut.id) == whole


def test_where_an_engine_cannot_sleep_the_gateway_goes_on(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = start(step_s=0.003)
    whole = finished(gateway, answering(gateway, extra_body={"seed": 5}).id)

    def cannot(self: EmbeddedEngine, *, level: int) -> None:
        raise Unsupported("started without it")

    monkeypatch.setattr(EmbeddedEngine, "sleep", cannot)
    cut = answering(gateway, extra_body={"seed": 5})
    code, told = cli(capsys, "sleep", gateway.url)
    assert code == 2 and "started without it" in told["error"]["message"]
    assert finished(gateway, cut.id) == whole, "it was parked, and is resumed"
    assert httpx.get(f"{gateway.url}/health").json()["status"] == "ok"


def soon(holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + 60
    while not holds() and time.monotonic() < until:
        time.sleep(0.01)
    return holds()


def all_up(gateway: Gateway) -> bool:
    return soon(lambda: len(gateway.service.engines.up) == len(gateway.engines))


def lose(gateway: Gateway, number: int) -> None:
    """That engine, and the gateway has noticed."""
    gateway.engines[number].close()
    asked, until = 0, time.monotonic() + 60
    while len(gateway.service.engines.up) == len(gateway.engines):
        assert time.monotonic() < until
        gateway.openai().responses.create(model="fake", input=f"{asked}", max_output_tokens=4)
        asked += 1


def test_an_engine_that_died_asleep_keeps_no_other_one_asleep(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    gateway = start(engines=2, reconnect=lambda: thaw.load_engine("fake"))
    assert cli(capsys, "sleep", gateway.url)[0] == 0
    gateway.engines[0].close()
    code, told = cli(capsys, "wake", gateway.url)
    assert code == 8 and "engine 0 is gone" in told["missed"][0]["why"] and not gateway.service.asleep
    assert gateway.openai().responses.create(model="fake", input="on", max_output_tokens=4).output_text
    assert all_up(gateway), "it is brought back"


def test_an_engine_that_cannot_wake_yet_sleeps_on_and_the_others_are_awake(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = start(engines=2)
    assert cli(capsys, "sleep", gateway.url)[0] == 0

    def cannot() -> None:
        raise MemoryError("others have it")

    with monkeypatch.context() as at_first:
        at_first.setattr(gateway.engines[0], "wake", cannot)
        assert httpx.delete(f"{gateway.url}/admin/sleep", headers=KEY, timeout=120).status_code == 500
    assert [one.repo.sync.is_asleep for one in gateway.service.engines.all] == [True, False]
    assert gateway.service.asleep
    assert cli(capsys, "wake", gateway.url)[0] == 0
    assert gateway.openai().responses.create(model="fake", input="on", max_output_tokens=4).output_text


@pytest.mark.parametrize("dies", [True, False])
def test_why_it_could_not_sleep_is_told_where_another_engine_does_not_wake(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dies: bool
) -> None:
    """One that is gone holds nobody up; one that lives keeps the gateway asleep until it can be woken."""
    gateway = start(step_s=0.003, engines=2)
    first, second = gateway.engines
    with monkeypatch.context() as at_first:

        def cannot(*, level: int) -> None:
            if dies:
                first.close()
            raise Unsupported("started without it")

        def stays() -> None:
            raise MemoryError("others have it")

        at_first.setattr(second, "sleep", cannot)
        if not dies:
            at_first.setattr(first, "wake", stays)
        cut = answering(gateway)
        code, told = cli(capsys, "sleep", gateway.url)
        assert code == 2 and "started without it" in told["error"]["message"]
        assert gateway.service.asleep is not dies
    if not dies:
        assert cli(capsys, "wake", gateway.url)[1]["resumed"] == 1
    assert finished(gateway, cut.id)


def test_an_engine_that_was_down_is_not_booted_while_it_sleeps(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    can_boot, booted = threading.Event(), threading.Event()

    def boot() -> Engine:
        if not can_boot.is_set():
            raise EngineDied("not yet")
        booted.set()
        return thaw.load_engine("fake")

    gateway = start(engines=2, reconnect=boot)
    lose(gateway, 0)
    assert cli(capsys, "sleep", gateway.url)[0] == 0
    can_boot.set()
    assert not booted.wait(2 * RETRY_AFTER_S)
    assert cli(capsys, "wake", gateway.url)[0] == 0
    assert all_up(gateway)


def test_an_engine_that_is_being_booted_sleeps_with_the_others(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    boots, may_end = threading.Event(), threading.Event()

    def boot() -> Engine:
        boots.set()
        may_end.wait(120)
        return thaw.load_engine("fake")

    gateway = start(engines=2, reconnect=boot)
    lose(gateway, 0)
    with ThreadPoolExecutor(1) as beside:
        try:
            assert boots.wait(20)
            late = slept(gateway, 1.0)
            assert late.status_code == 409 and "booted" in late.json()["error"]["message"]
            assert not gateway.service.asleep and not gateway.service.engines.up[0].repo.sync.is_asleep
            sleeping = beside.submit(slept, gateway)
            assert soon(lambda: gateway.service.asleep)
        finally:
            may_end.set()
        assert sleeping.result().status_code == 200
    assert [one.repo.sync.is_asleep for one in gateway.service.engines.up] == [True, True]
    assert cli(capsys, "wake", gateway.url)[0] == 0


def test_nobody_turns_back_a_sleep_that_is_under_way(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway, begun, may_end = start(), threading.Event(), threading.Event()
    park_all = gateway.service.park_all

    async def slowly(limit: float) -> list[str]:
        begun.set()
        await call(may_end.wait)
        return await park_all(limit)

    monkeypatch.setattr(gateway.service, "park_all", slowly)
    with ThreadPoolExecutor(1) as beside:
        sleeping = beside.submit(slept, gateway)
        try:
            assert begun.wait(20)
            for words in (("wake",), ("drain", "--undo"), ("drain",), ("sleep",)):
                code, told = cli(capsys, words[0], gateway.url, *words[1:])
                assert code == 4 and "ask again soon" in told["error"]["message"]
            assert gateway.service.asleep
        finally:
            may_end.set()
        assert sleeping.result().json()["asleep"]
    assert all(one.repo.sync.is_asleep for one in gateway.service.engines.all)
    code, told = cli(capsys, "drain", gateway.url, "--undo")
    assert code == 4 and "wake it" in told["error"]["message"]
    assert cli(capsys, "wake", gateway.url)[0] == 0
    assert gateway.openai().responses.create(model="fake", input="on", max_output_tokens=4).output_text


def test_only_operators_put_it_to_sleep(start: Start) -> None:
    gateway = start(tenants=two())
    for headers, status in (({}, 401), ({"Authorization": "Bearer key-b"}, 403)):
        for method in ("POST", "DELETE"):
            assert httpx.request(method, f"{gateway.url}/admin/sleep", headers=headers).status_code == status
    assert not gateway.service.asleep


@pytest.mark.parametrize("body", [b"[]", b'{"level": 0}', b'{"level": 3}', b'{"timeout_s": 0}', b'{"other": 1}'])
def test_a_body_that_is_none_is_refused(start: Start, body: bytes) -> None:
    gateway = start()
    assert httpx.post(f"{gateway.url}/admin/sleep", headers=KEY, content=body).status_code == 400
    assert not gateway.service.draining
