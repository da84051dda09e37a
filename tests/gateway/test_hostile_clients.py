"""Bodies that are large, strange or dear: refused by name, before they have cost much, while others are served."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from gateway_stand import TOKEN, Gateway, Start
from thaw.gateway import bodies
from thaw.gateway.problems import ApiError
from thaw.gateway.settings import GatewaySettings, Limits

openai = pytest.importorskip("openai")
NUM = 30_000_000


def post(gateway: Gateway, path: str, body: bytes | dict[str, Any], token: str = TOKEN) -> httpx.Response:
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"authorization": f"Bearer {token}"}
    return httpx.post(f"{gateway.url}/v1/{path}", content=sent, headers=headers, timeout=60)


class Heart:
    """Beats in the gateway's event loop; `longest`: seconds of processor time that this process took between two beats,
    on the loop's thread or on one that kept the interpreter from it.

    Processor time, since a machine that runs other things stretches the clock's."""

    def __init__(self) -> None:
        self.longest, self.stopped = 0.0, False


@contextmanager
def beating(gateway: Gateway) -> Iterator[Heart]:
    heart, last = Heart(), float("inf")
    with httpx.Client() as client:
        client.get(f"{gateway.url}/health")
        loop = next(iter(gateway.server.server_state.connections)).loop  # type: ignore[union-attr]

        def beat() -> None:
            nonlocal last
            now = time.process_time()
            heart.longest, last = max(heart.longest, now - last), now
            if not heart.stopped:
                loop.call_later(0.002, beat)

        loop.call_soon_threadsafe(beat)
        yield heart
        heart.stopped = True


DEAR = {
    "text": b'{"messages": [{"role": "user", "content": "' + b"x, " * (NUM // 3) + b'"}]}',
    "keys": b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {'
    + b",".join(b'"k%d":1' % i for i in range(NUM // 12))
    + b"}}",
    "objects": b'{"messages": [' + b"{}," * (NUM // 3) + b"{}]}",
    "messages": b'{"messages": [' + b",".join([b'{"role":"user","content":"x"}'] * (NUM // 30)) + b"]}",
    "stops": b'{"messages": [{"role": "user", "content": "x"}], "stop": [' + b'"a",' * (NUM // 4) + b'"a"]}',
}


@pytest.mark.parametrize("kind", DEAR)
def test_thirty_megabytes_are_refused_while_a_stream_flows(start: Start, kind: str) -> None:
    """What was mended kept the loop for a whole second, or tokenised the text."""
    gateway = start(step_s=0.002)
    events: list[Any] = []
    stream = gateway.openai().responses.create(model="fake", input="hi", max_output_tokens=300, stream=True)
    reading = threading.Thread(target=lambda: events.extend(stream))
    reading.start()
    before = gateway.num_forwarded
    with beating(gateway) as heart:
        refused = post(gateway, "chat/completions", DEAR[kind])
    assert refused.status_code == 400, refused.text[:200]
    assert len(refused.content) < 3000
    reading.join(60)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert heart.longest < 0.25
    assert gateway.num_forwarded - before < 400


def test_the_price_of_a_body_is_that_of_its_values() -> None:
    """Commas in text cost nothing, nor do quotes and backslashes at its ends; the same outside of strings does."""
    text = json.dumps({"input": '", {"a": [1, 2]} \\" \\\\' * 1000 + "\\"}).encode()
    bodies.require_cheap(text, 100)
    with pytest.raises(ApiError, match="too many values"):
        bodies.require_cheap(b'{"input": "x\\\\", "a": [' + b"1," * 200 + b'"\\""]}', 100)
    ids = json.dumps({"prompt": list(range(1_000_000)), "max_tokens": 1}).encode()
    bodies.require_cheap(ids, Limits().body_values)


def test_one_tenant_leaves_room_for_the_bodies_of_others(start: Start) -> None:
    from test_tenants import two

    gateway = start(tenants=two(), settings=GatewaySettings(limits=Limits(bodies_nbytes=4 << 20)))
    port = int(gateway.url.rpartition(":")[2])
    import socket
    from contextlib import ExitStack

    head = "POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer key-a\r\n"
    with ExitStack() as stack:
        for _ in range(4):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            slow.sendall(f"{head}Content-Length: 1000000\r\n\r\n{{".encode())
        while gateway.service.bodies._held["a"] < 2_000_000:
            time.sleep(0.01)
        time.sleep(0.1)
        assert gateway.service.bodies._held["a"] == 2_000_000
        large = {"input": "x", "max_output_tokens": 1, "metadata": {"large": "x" * 1_000_000}}
        refused = post(gateway, "responses", large, "key-a")
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert post(gateway, "responses", large, "key-b").status_code == 200
        assert post(gateway, "responses", {"input": "x", "max_output_tokens": 1}, "key-a").status_code == 200
    for _ in range(200):
        if not gateway.service.bodies._held:
            break
        time.sleep(0.02)
    assert post(gateway, "responses", large, "key-a").status_code == 200


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
RESPONSE: dict[str, Any] = {"input": "x", "max_output_tokens": 1}


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("chat/completions", {**CHAT, "stop": ["y" * 5000]}, "stop"),
        ("chat/completions", {**CHAT, "stop": [f"x{i}" for i in range(100)]}, "stop"),
        ("chat/completions", {**CHAT, "stop_token_ids": list(range(5000))}, "stop_token_ids"),
        ("chat/completions", {**CHAT, "logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
        ("chat/completions", {**CHAT, "response_format": "json"}, "response_format"),
        ("responses", {**RESPONSE, "text": {"format": "json"}}, "text.format"),
        ("responses", {**RESPONSE, "text": {"format": ["json"]}}, "text.format"),
        ("responses", {"input": [{"type": ["message"], "role": "user", "content": "x"}]}, "input[0]"),
        ("completions", {"prompt": "x", "max_tokens": 1, "stop": ["y" * 5000]}, "stop"),
    ],
)
def test_what_is_strange_or_dear_is_refused_by_name(
    gateway: Gateway, path: str, body: dict[str, Any], named: str
) -> None:
    refused = post(gateway, path, body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == named
    assert len(refused.content) < 1000


def test_tokens_are_counted_within_the_quota_of_running_requests(start: Start) -> None:
    """As is the tokenising of a prompt, before there is a job for it."""
    from test_tenants import two

    gateway = start(tenants=two(sessions=1), step_s=0.01)
    stream = gateway.openai("key-a").responses.create(model="fake", input="x", max_output_tokens=200, stream=True)
    next(iter(stream))
    body = {"messages": [{"role": "user", "content": "x"}]}
    assert post(gateway, "messages/count_tokens", body, "key-a").status_code == 429
    assert post(gateway, "completions", {"prompt": "x"}, "key-a").status_code == 429
    assert post(gateway, "messages/count_tokens", body, "key-b").status_code == 200
    stream.close()
