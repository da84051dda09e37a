"""An operator drains the gateway while it works: responses are parked, sessions have points, nothing begins, and all of
it goes on afterwards."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import pytest
from test_tenants import two

from gateway_stand import TOKEN, Gateway, Start
from thaw.cli.app import run

openai = pytest.importorskip("openai")
KEY = {"Authorization": f"Bearer {TOKEN}"}


def answering(gateway: Gateway, **more: Any) -> Any:
    """A stored response in the background that has begun to answer."""
    made = gateway.openai().responses.create(
        model="fake", input="a river", background=True, max_output_tokens=400, **more
    )
    ended = time.monotonic() + 20
    while len([one for job in gateway.service.jobs.values() for one in job._pieces]) < 3:
        assert time.monotonic() < ended
        time.sleep(0.002)
    return made


def finished(gateway: Gateway, id: str) -> str:
    """Its text, once nothing runs any more."""
    ended = time.monotonic() + 60
    while gateway.service.num_running or gateway.service.jobs:
        assert time.monotonic() < ended
        time.sleep(0.005)
    return str(gateway.openai().responses.retrieve(id).output_text)


def cli(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = run(["engine", "drain", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_drained_gateway_goes_on_to_the_same_answer(
    start: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THAW_SERVE_TOKEN", TOKEN)
    gateway = start(step_s=0.003)
    client = gateway.openai()
    whole = finished(gateway, answering(gateway, extra_body={"seed": 5}).id)
    cut = answering(gateway, extra_body={"seed": 5})
    code, told = cli(capsys, gateway.url)
    assert code == 0 and told["complete"] and told["drained"]
    (parked,) = told["parked"]
    assert parked["id"] == cut.id and parked["point"] in {one["point"] for one in told["sessions"]}
    assert client.responses.retrieve(cut.id).status == "incomplete"
    assert httpx.get(f"{gateway.url}/health").json()["status"] == "drained"
    with pytest.raises(openai.InternalServerError, match="drained"):
        client.responses.create(model="fake", input="another")
    assert cli(capsys, gateway.url)[0] == 4
    code, told = cli(capsys, gateway.url, "--undo")
    assert (code, told["resumed"]) == (0, 1)
    assert finished(gateway, cut.id) == whole
    assert client.responses.create(model="fake", input="another", max_output_tokens=3).status
    assert cli(capsys, gateway.url, "--undo")[1] == {"url": gateway.url, "drained": False, "was": False, "resumed": 0}


def test_a_stopped_gateway_that_was_drained_is_restored(start: Start) -> None:
    from thaw.gateway.settings import GatewaySettings

    gateway = start(step_s=0.003, name="same")
    whole = finished(gateway, answering(gateway, extra_body={"seed": 5}).id)
    cut = answering(gateway, extra_body={"seed": 5})
    assert httpx.post(f"{gateway.url}/admin/drain", headers=KEY).json()["complete"]
    gateway.close()
    again = start(settings=GatewaySettings(restore=True), name="same")
    assert finished(again, cut.id) == whole


def test_what_is_not_captured_is_named_and_the_exit_code_says_so(
    start: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = start(step_s=0.002)
    answering(gateway)
    held, real = threading.Event(), gateway.engine.capture

    def late(*args: Any) -> Any:
        held.wait(30)
        return real(*args)

    monkeypatch.setattr(gateway.engine, "capture", late)
    code, told = cli(capsys, gateway.url, "--timeout", "0.6", "--api-key", TOKEN)
    held.set()
    assert code == 8 and not told["complete"] and "within" in told["missed"][0]["why"]


def test_only_operators_drain(start: Start) -> None:
    gateway = start(tenants=two())
    for headers, status in (({}, 401), ({"Authorization": "Bearer key-b"}, 403)):
        for method in ("POST", "DELETE"):
            assert httpx.request(method, f"{gateway.url}/admin/drain", headers=headers).status_code == status
    assert not gateway.service.draining


@pytest.mark.parametrize("body", [b"[]", b'{"timeout_s": 0}', b'{"timeout_s": 1e9}', b'{"other": 1}', b"\xff"])
def test_a_body_that_is_none_is_refused(gateway: Gateway, body: bytes) -> None:
    answer = httpx.post(f"{gateway.url}/admin/drain", headers=KEY, content=body)
    assert answer.status_code == 400 and not gateway.service.draining


def test_an_address_without_a_gateway_is_named(capsys: pytest.CaptureFixture[str], gateway: Gateway) -> None:
    for url, code, said in (
        ("http://127.0.0.1:9", 8, "no gateway answers"),
        (f"{gateway.url}/v1/models/../nothing", 2, "not a `thaw serve`"),
        ("ftp://x", 2, "address"),
    ):
        found, told = cli(capsys, url)
        assert found == code and said in told["error"]["message"]


def test_a_key_that_is_missing_or_wrong_is_answered_with_how_to_give_one(
    capsys: pytest.CaptureFixture[str], gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("THAW_SERVE_TOKEN", "THAW_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for words, said in (((), "none was given"), (("--api-key", "thaw-other"), "not known there")):
        code, told = cli(capsys, gateway.url, *words)
        message = told["error"]["message"]
        assert code == 2 and said in message and "THAW_SERVE_TOKEN" in message and "--api-key" in message
    assert not gateway.service.draining
