"""Tenants: a key reaches its own namespace and nothing else; what is sent wrongly or too much is refused."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway_stand import TOKEN, Gateway, Start
from thaw.core.errors import Busy, InvalidRequest
from thaw.gateway import server as running
from thaw.gateway import tenants
from thaw.gateway.settings import GatewaySettings, Limits
from thaw.gateway.tenants import Quota, Tenant, Tenants, load

openai = pytest.importorskip("openai")
LONG = "a long story about a river, and who lives there. " * 8


def two(**quota: Any) -> Tenants:
    def digest(key: str) -> bytes:
        return hashlib.sha256(key.encode()).digest()

    return Tenants({digest("key-a"): Tenant("a", Quota(**quota), operator=True), digest("key-b"): Tenant("b", Quota())})


def respond(client: Any, **more: Any) -> Any:
    return client.responses.create(model="fake", **{"input": LONG, "max_output_tokens": 8, **more})


def test_nobody_reaches_matches_or_names_anothers(start: Start) -> None:
    """Each try is made by the owner as well, and succeeds there."""
    gateway = start(tenants=two())
    a, b = gateway.openai("key-a"), gateway.openai("key-b")
    mine = respond(a, extra_body={"thaw": {"branch": "main"}})
    conversation = a.conversations.create(items=[{"role": "user", "content": "x"}])
    tries: list[Any] = [
        lambda c: c.responses.retrieve(mine.id),
        lambda c: c.responses.input_items.list(mine.id).data,
        lambda c: respond(c, input="x", previous_response_id=mine.id),
        lambda c: respond(c, input="x", conversation=conversation.id),
        lambda c: c.conversations.retrieve(conversation.id),
        *(
            lambda c, point=point: respond(c, input="x", extra_body={"thaw": {"point": point}})
            for point in ("main", mine.thaw["point"], mine.thaw["point"][3:15], "main:turn=1")
        ),
        lambda c: c.responses.delete(mine.id),
    ]
    for attempt in tries:
        with pytest.raises(openai.NotFoundError):
            attempt(b)
    for attempt in tries:
        attempt(a)
    for crafted in ("@a/main", "../a", f"@a/{mine.id}", "a/main", "%40a/main"):
        with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
            respond(b, input="x", extra_body={"thaw": {"point": crafted}})


def test_anothers_prefix_is_read_as_if_it_were_not_there(start: Start) -> None:
    gateway = start(tenants=two())
    messages = [{"role": "user", "content": LONG}]
    first = gateway.openai("key-a").chat.completions.create(model="fake", messages=messages, max_tokens=4)
    other = gateway.openai("key-b").chat.completions.create(model="fake", messages=messages, max_tokens=4)
    mine = gateway.openai("key-a").chat.completions.create(model="fake", messages=messages, max_tokens=4)
    assert other.usage.prompt_tokens_details.cached_tokens == 0
    assert mine.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens - 1


def test_ids_that_are_guessed_find_nothing(start: Start) -> None:
    gateway = start(tenants=two())
    mine = respond(gateway.openai("key-a"))
    key = mine.id.removeprefix("resp_")
    guesses = [f"resp_{int(key, 16) ^ (1 << i):032x}" for i in range(128)]
    guesses += [key, "", "resp_", "resp_%", "resp_*", "' OR 1=1 --", "resp_" + "0" * 3000]
    with httpx.Client(base_url=gateway.url, headers={"authorization": "Bearer key-b"}) as client:
        for guess in (mine.id, *guesses):
            assert client.get(f"/v1/responses/{guess}").status_code in (404, 405)


def test_without_a_key_nothing_is_answered(gateway: Gateway) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}, {"authorization": f"Basic {TOKEN}"}):
        for path in ("/v1/models", "/metrics"):
            assert httpx.get(gateway.url + path, headers=headers).status_code == 401
    assert httpx.get(gateway.url + "/health").json() == {"status": "ok"}
    assert httpx.get(gateway.url + "/v1/models", headers={"x-api-key": TOKEN}).status_code == 200


def test_a_page_that_was_led_here_by_another_name_is_not_answered(start: Start) -> None:
    gateway = start(settings=GatewaySettings(hosts=("my.host",)))
    for host, status in (("evil.example", 421), ("my.host", 200), ("my.host:99", 200), ("localhost:1", 200), ("", 421)):
        headers = {"authorization": f"Bearer {TOKEN}", "host": host}
        if host:
            assert httpx.get(gateway.url + "/v1/models", headers=headers).status_code == status


def test_metrics_are_an_operators(start: Start) -> None:
    gateway = start(tenants=two())
    respond(gateway.openai("key-b"))
    assert httpx.get(gateway.url + "/metrics", headers={"x-api-key": "key-b"}).status_code == 403
    told = httpx.get(gateway.url + "/metrics", headers={"x-api-key": "key-a"}).text
    assert 'thaw:prompt_tokens_total{branch="",tenant="b"}' in told


def test_a_quota_ends_with_429_and_when_to_come_again(start: Start) -> None:
    gateway = start(tenants=two(tokens_per_minute=100))
    respond(gateway.openai("key-a"))
    with pytest.raises(openai.RateLimitError) as refused:
        respond(gateway.openai("key-a"))
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
    respond(gateway.openai("key-b"))


def test_a_quota_of_bytes_and_of_sessions(start: Start) -> None:
    gateway = start(tenants=two(bytes=1000), name="bytes")
    respond(gateway.openai("key-a"))
    with pytest.raises(openai.RateLimitError):
        respond(gateway.openai("key-a"))
    gateway = start(tenants=two(sessions=2), name="sessions")
    with pytest.raises(openai.RateLimitError):
        gateway.openai("key-a").completions.create(model="fake", prompt="x", n=3)


def post(gateway: Gateway, body: bytes, **headers: str) -> httpx.Response:
    return httpx.post(
        gateway.url + "/v1/responses", content=body, headers={"authorization": f"Bearer {TOKEN}", **headers}, timeout=20
    )


def test_bodies_too_large_too_slow_or_broken_cost_themselves_alone(start: Start) -> None:
    gateway = start(settings=GatewaySettings(limits=Limits(body_nbytes=10_000, body_s=0.5)))
    assert post(gateway, b"x" * 10_001).status_code == 413
    assert post(gateway, b"").status_code == 400
    for broken in (b"{", b"[1]", b"\xff\xfe", b"[" * 5000, b'{"input": "x", "model": 7}', b'{"input": NaN}'):
        assert post(gateway, broken).status_code == 400
    with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2]))) as slow:
        head = f"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
        slow.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        respond(gateway.openai(), input="hi")
        assert b" 408 " in slow.recv(1000)
    with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2]))) as smuggled:
        both = f"{head}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /v1/models HTTP/1.1\r\n\r\n"
        smuggled.sendall(both.encode())
        assert b" 200 " not in smuggled.recv(4000)
    respond(gateway.openai(), input="hi")


def test_more_requests_than_the_limit_are_told_to_come_again(start: Start) -> None:
    gateway = start(settings=GatewaySettings(limits=Limits(requests=2)), step_s=0.01)
    client = gateway.openai()
    streams = [respond(client, stream=True, max_output_tokens=400) for _ in range(2)]
    with pytest.raises(openai.InternalServerError) as refused:
        respond(client)
    assert refused.value.status_code == 503 and refused.value.response.headers["retry-after"]
    for stream in streams:
        stream.close()
    for _ in range(200):
        if gateway.service.num_running == 0:
            break
        time.sleep(0.02)
    respond(client)


def test_no_key_prompt_or_answer_is_in_any_log(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "audit.log"
    running.keep_audit(str(path))
    try:
        gateway = start()
        reply = respond(gateway.openai(), input="the secret river")
        post(gateway, b"{", **{"x-api-key": "another-secret-key"})
        httpx.get(gateway.url + "/v1/models", headers={"x-api-key": "another-secret-key"})
    finally:
        for handler in list(running.audit.handlers):
            running.audit.removeHandler(handler)
    out, err = capfd.readouterr()
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith(("thaw", "uvicorn")))
    told = path.read_text()
    for secret in (TOKEN, "another-secret-key", "secret river", reply.output_text):
        assert all(secret not in text for text in (out, err, ours, told))
    lines = [json.loads(line) for line in told.splitlines()]
    assert lines[0]["response"] == reply.id and lines[0]["key"] == hashlib.sha256(TOKEN.encode()).hexdigest()[:8]
    assert [line["status"] for line in lines] == [200, 400, 401]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_tenants_responses_are_kept_as_long_as_its_entry_says(start: Start, tmp_path: Path) -> None:
    """Those of others stay, and so does what has a name; its KV counts until gc can free it."""
    path = tmp_path / "keys.json"
    listed = [{"namespace": "a", "keys": ["key-a"], "keep_days": 0}, {"namespace": "b", "keys": ["key-b"]}]
    path.touch(0o600)
    path.write_text(json.dumps(listed))
    gateway = start(tenants=load(path))
    a, b = gateway.openai("key-a"), gateway.openai("key-b")
    theirs = respond(b)
    named, loose = respond(a, extra_body={"thaw": {"branch": "main"}}), respond(a, input=f"loose {LONG}")
    stored = gateway.service.ledger.nbytes("a")
    assert asyncio.run(gateway.service.sweep()) == 2
    for one in (named, loose):
        with pytest.raises(openai.NotFoundError):
            a.responses.retrieve(one.id)
    assert stored > gateway.service.ledger.nbytes("a") > stored // 2
    assert b.responses.retrieve(theirs.id).output_text == theirs.output_text
    assert respond(a, input="x", extra_body={"thaw": {"point": "main"}}).thaw["parent"] == named.thaw["point"]
    b.responses.delete(theirs.id)
    asyncio.run(gateway.service.sweep())
    assert gateway.service.ledger.nbytes("a") == 0
    with pytest.raises(openai.NotFoundError):
        respond(a, input="x", extra_body={"thaw": {"point": loose.thaw["point"]}})
    assert gateway.repo.within("a").resolve("main").commit == named.thaw["point"]
    path.write_text(json.dumps([{**listed[0], "keep_days": -1}]))
    with pytest.raises(InvalidRequest, match="keep_days"):
        load(path)


def test_a_keys_file_is_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    listed = [{"namespace": "acme", "keys": [f"sha256:{hashlib.sha256(b'k1').hexdigest()}", "k2"]}]
    path.write_text(json.dumps(listed))
    path.chmod(0o644)
    with pytest.raises(InvalidRequest, match="0600"):
        load(path)
    path.chmod(0o600)
    found = load(path)
    assert found.of_key("k1")[0] is found.of_key("k2")[0] and found.of_key("k1")[0].namespace == "acme"
    for wrong in ([], [{"namespace": "", "keys": ["x"]}], [{"namespace": "a", "keys": ["sha256:1"]}], {"a": 1},
                  [{"namespace": "a", "keys": ["x"]}, {"namespace": "b", "keys": ["x"]}]):  # fmt: skip
        path.write_text(json.dumps(wrong))
        with pytest.raises(InvalidRequest):
            load(path)


def test_a_repository_has_one_gateway(gateway: Gateway) -> None:
    with pytest.raises(Busy), running.opened(gateway.repo, tenants.single("x"), GatewaySettings()):
        pass


def test_a_hit_on_anothers_prefix_cannot_be_told_by_its_time(start: Start) -> None:
    """Prompts that another tenant has stored take as long as ones that nobody has."""
    gateway = start(tenants=two())
    a, b = gateway.openai("key-a"), gateway.openai("key-b")
    known = [f"{LONG} {i}" for i in range(30)]
    for prompt in known:
        a.completions.create(model="fake", prompt=prompt, max_tokens=1)
    times: dict[bool, list[float]] = {True: [], False: []}
    for i in range(30):
        for stored in (True, False) if i % 2 else (False, True):
            prompt = known[i] if stored else f"{LONG[::-1]} {i}"[: len(known[i])]
            begun = time.perf_counter()
            b.completions.create(model="fake", prompt=prompt, max_tokens=1)
            times[stored].append(time.perf_counter() - begun)
    wins = sum((x < y) + 0.5 * (x == y) for x in times[True] for y in times[False])
    assert 0.25 < wins / (len(times[True]) * len(times[False])) < 0.75


def test_it_speaks_tls(start: Start, tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl here to make a certificate")
    pem, key = tmp_path / "pem", tmp_path / "key"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", pem, "-days", "1", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True,
    )  # fmt: skip
    gateway = start(settings=GatewaySettings(certificate=str(pem), certificate_key=str(key)))
    url = gateway.url.replace("http://127.0.0.1", "https://localhost")
    with httpx.Client(verify=ssl.create_default_context(cafile=str(pem)), trust_env=False) as client:
        assert client.get(f"{url}/v1/models", headers={"x-api-key": TOKEN}).status_code == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{gateway.url}/v1/models", headers={"x-api-key": TOKEN})
