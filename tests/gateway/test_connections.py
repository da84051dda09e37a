"""Clients that are slow, ambiguous or many, as bytes on a socket: each costs itself alone, and the rest is served."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from gateway_stand import TOKEN, Gateway, Start
from thaw.gateway.settings import GatewaySettings, Limits

AUTHORIZED = f"Host: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
BODY = b'{"input": "hi", "max_output_tokens": 2}'


@contextmanager
def connected(gateway: Gateway, timeout_s: float = 20.0) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2])), timeout=timeout_s) as client:
        yield client


def until_closed(client: socket.socket) -> bytes:
    """All that comes until the gateway hangs up. Raises where it does not in time."""
    parts = []
    try:
        while part := client.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def answered(client: socket.socket) -> bytes:
    """One reply, read to its end."""
    with client.makefile("rb") as file:
        status, length = file.readline(), 0
        while (line := file.readline()) != b"\r\n":
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        file.read(length)
    return status


def served(gateway: Gateway) -> None:
    made = gateway.openai().responses.create(model="fake", input="hi", max_output_tokens=2)
    assert made.usage.output_tokens == 2


def post(*lines: str, body: bytes = BODY, length: bool = True) -> bytes:
    told = [*lines, *([f"Content-Length: {len(body)}"] if length else [])]
    head = f"POST /v1/responses HTTP/1.1\r\n{AUTHORIZED}" + "".join(f"{line}\r\n" for line in told)
    return f"{head}\r\n".encode() + body


SMUGGLED = b"GET /v1/models HTTP/1.1\r\n" + AUTHORIZED.encode() + b"\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        post("Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
        post("Transfer-Encoding: chunked", body=b"27\r\n" + BODY + b"\r\n0\r\n\r\n", length=False),
        post("Transfer-Encoding: chunked", body=b"1\r\n{\r\n" * 40_000 + b"0\r\n\r\n", length=False),
        post("Content-Length: 5"),
        post("Transfer-Encoding: xchunked"),
        post("X-A: b\nX-C: d"),
        post("Host: evil.example"),
        b"GET /v1/models HTTP/1.1\n" + AUTHORIZED.encode() + b"\r\n",
        b"GET /v1/models HTTP/1.1\r\n" + AUTHORIZED.encode() + b"X-A: b\n\n",
    ],
    ids=["both", "chunked", "tiny-chunks", "two-lengths", "encoding", "bare-lf", "two-hosts", "first-line", "end"],
)  # fmt: skip
def test_a_request_that_could_be_read_as_two_is_none(gateway: Gateway, sent: bytes) -> None:
    """And what was smuggled behind it is not answered either."""
    before = gateway.num_forwarded
    with connected(gateway) as client:
        client.sendall(sent + SMUGGLED)
        told = until_closed(client)
    assert told.startswith(b"HTTP/1.1 400 ") and told.count(b"HTTP/1.1") == 1 and b" 200 " not in told
    assert gateway.num_forwarded == before
    served(gateway)


def test_headers_may_come_in_any_pieces(gateway: Gateway) -> None:
    """The control of the test above: a body may have any line ends, wherever the pieces part."""
    body = b'{"input":\n"hi",\n\n"max_output_tokens": 2}'
    whole = post(body=body)
    head = whole.index(b"\r\n\r\n")
    for cut in (1, 22, 23, 24, head - 1, head, head + 1, head + 2, head + 3, head + 4, head + 14):
        with connected(gateway) as client:
            for _ in range(2):
                client.sendall(whole[:cut])
                time.sleep(0.01)
                client.sendall(whole[cut:])
                assert answered(client) == b"HTTP/1.1 200 OK\r\n", cut


def test_headers_that_do_not_come_are_not_waited_for(start: Start) -> None:
    gateway = start(settings=GatewaySettings(limits=Limits(head_s=0.3)))
    begun = time.monotonic()
    with connected(gateway) as silent, connected(gateway) as slow, connected(gateway) as second:
        second.sendall(SMUGGLED)
        assert answered(second) == b"HTTP/1.1 200 OK\r\n"
        for client in (slow, second):
            client.sendall(b"GET /v1/models HT")
        served(gateway)
        for client in (silent, slow, second):
            assert until_closed(client) == b""
    assert time.monotonic() - begun < 10


def test_a_body_behind_a_refusal_is_not_waited_for(start: Start) -> None:
    """Without a key, a byte now and then would keep a connection for good."""
    gateway = start(settings=GatewaySettings(limits=Limits(body_s=0.5)))
    with connected(gateway) as client:
        client.sendall(b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
        assert b" 401 " in client.recv(1 << 16)
        ended = time.monotonic() + 10
        with pytest.raises(OSError):
            while time.monotonic() < ended:
                client.sendall(b" ")
                time.sleep(0.05)


def reads_nothing(gateway: Gateway, sent: bytes) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", int(gateway.url.rpartition(":")[2])))
    client.sendall(sent)
    return client


def test_a_client_that_stops_reading_its_stream_is_hung_up_on(start: Start) -> None:
    """Its job ends as if it had gone away; what was generated until then is kept."""
    gateway = start(settings=GatewaySettings(limits=Limits(stall_s=0.5)), step_s=0.005)
    ask = {"input": "hi", "max_output_tokens": 10_000, "stream": True, "metadata": {"large": "x" * 8_000_000}}
    with reads_nothing(gateway, post(body=json.dumps(ask).encode())):
        ended = time.monotonic() + 20
        while gateway.service.num_running == 0:
            assert time.monotonic() < ended
            time.sleep(0.01)
        served(gateway)
        while gateway.service.num_running:
            assert time.monotonic() < ended
            time.sleep(0.05)
    assert gateway.num_forwarded < 8_000


def test_a_client_that_reads_no_reply_is_hung_up_on(start: Start) -> None:
    gateway = start(settings=GatewaySettings(limits=Limits(stall_s=0.5)), step_s=0)
    made = gateway.openai().conversations.create(items=[{"role": "user", "content": "x" * 6_000_000}])
    sent = f"GET /v1/conversations/{made.id}/items HTTP/1.1\r\n{AUTHORIZED}\r\n".encode()
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(reads_nothing(gateway, sent))
        ended = time.monotonic() + 20
        while sum(one.transport.get_write_buffer_size() > 1 << 20 for one in connections(gateway)) < 2:
            assert time.monotonic() < ended
            time.sleep(0.01)
        while any(one.transport.get_write_buffer_size() for one in connections(gateway)):
            assert time.monotonic() < ended
            time.sleep(0.05)


def connections(gateway: Gateway) -> list[Any]:
    return list(gateway.server.server_state.connections)


def test_of_too_many_connections_the_longest_idle_go_first(start: Start) -> None:
    """A flood of connections that ask for nothing takes no place from those that do."""
    gateway = start(settings=GatewaySettings(limits=Limits(connections=20)), step_s=0.005)
    stream = gateway.openai().responses.create(model="fake", input="hi", max_output_tokens=100, stream=True)
    first = next(iter(stream))
    with ExitStack() as stack:
        flood = [stack.enter_context(connected(gateway)) for _ in range(60)]
        served(gateway)
        assert len(connections(gateway)) <= 20
        assert until_closed(flood[0]) == b""
    events = [first, *stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.usage.output_tokens == 100
