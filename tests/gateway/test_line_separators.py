"""Streams whose text holds characters that end a line elsewhere, and not in a stream of events: from servers of
engines, and to clients. A model says them at any time, and the same ones again where a request runs again. And log
probabilities that are no numbers, which JSON has no word for."""

from __future__ import annotations

import asyncio
import json
import math
import re
import secrets
from typing import Any

import httpx
import pytest

from gateway_stand import TOKEN, Start
from thaw.core.errors import EngineDied
from thaw.engines.served import protocol
from thaw.engines.served.client import http as transports
from thaw.engines.served.client.http import HttpTransport
from thaw.engines.served.client.transport import Chunk, Submission
from thaw.engines.sglang.client.http import SglangHttpTransport
from thaw.engines.vllm.client.http import VllmHttpTransport
from thaw.gateway import reply

SEPARATORS = "\x85\u2028\u2029"
TEXT = f"a{SEPARATORS}b"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def vllm_events() -> bytes:
    """As vLLM writes them: JSON with its characters as they are."""
    told = {"choices": [{"text": TEXT, "token_ids": [5], "logprobs": None, "finish_reason": "length"}]}
    return b": a comment\r\n\r\ndata: " + json.dumps(told, ensure_ascii=False).encode() + b"\n\ndata: [DONE]\n\n"


def sglang_events() -> bytes:
    told = {
        "text": TEXT, "output_ids": [5],
        "meta_info": {
            "id": "1", "prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0,
            "finish_reason": {"type": "length", "length": 1}, "output_token_logprobs": [[-1.0, 5, None]],
        },
    }  # fmt: skip
    return b"data: " + json.dumps(told, ensure_ascii=False).encode() + b"\n\ndata: [DONE]\n\n"


async def heard(kind: type[HttpTransport[Any]], events: bytes, size: int) -> list[Chunk]:
    """What a client of a server hears that writes `size` bytes at a time."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        await reader.readexactly(int(length[1]) if length else 0)
        for start in range(0, len(HEAD + events), size):
            writer.write((HEAD + events)[start : start + size])
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = kind(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    client._open()
    run = protocol.Run(id=secrets.token_hex(16), record=secrets.token_hex(16))
    submission = Submission(run.id, [1, 2], {"max_tokens": 1, "max_new_tokens": 1}, None, run)
    try:
        return [chunk async for chunk in client.stream(submission)]
    finally:
        await client.close()
        server.close()


@pytest.mark.parametrize("size", [1, 7, 1 << 16])
@pytest.mark.parametrize(
    ("kind", "events"), [(VllmHttpTransport, vllm_events()), (SglangHttpTransport, sglang_events())]
)
def test_a_token_of_any_text_comes_from_an_engine(kind: type[HttpTransport[Any]], events: bytes, size: int) -> None:
    chunks = asyncio.run(heard(kind, events, size))
    assert [token for chunk in chunks for token in chunk.token_ids] == [5]
    assert chunks[-1].finish_reason == "length"


def test_a_line_as_httpx_ends_it_would_be_an_engine_that_died(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: so a request failed in each engine that ran it again with its seed."""

    async def lines(response: httpx.Response):  # type: ignore[no-untyped-def]
        async for line in response.aiter_lines():
            yield line.encode()

    monkeypatch.setattr(transports, "_lines", lines)
    with pytest.raises(EngineDied, match="what is not vLLM's"):
        asyncio.run(heard(VllmHttpTransport, vllm_events(), 1 << 16))


def test_a_stream_that_ends_inside_a_line_is_an_engine_that_died() -> None:
    with pytest.raises(EngineDied, match="ended in the middle"):
        asyncio.run(heard(VllmHttpTransport, vllm_events()[:60], 1 << 16))


@pytest.mark.parametrize("escaped", [True, False])
def test_clients_that_end_lines_elsewhere_read_each_event(
    start: Start, monkeypatch: pytest.MonkeyPatch, escaped: bool
) -> None:
    """As httpx does; the control says them as they are."""
    if not escaped:
        monkeypatch.setattr(reply, "LINE_ENDS", {})
    gateway = start()
    body = {"model": "fake", "prompt": TEXT, "max_tokens": 2, "stream": True, "echo": True}
    with httpx.stream(
        "POST", f"{gateway.url}/v1/completions", json=body, headers={"authorization": f"Bearer {TOKEN}"}
    ) as told:
        lines = [line[6:] for line in told.iter_lines() if line.startswith("data: {")]
    if not escaped:
        with pytest.raises(json.JSONDecodeError):
            [json.loads(line) for line in lines]
        return
    text = "".join(choice["text"] for line in lines for choice in json.loads(line)["choices"])
    assert text.startswith(TEXT)


def test_a_log_probability_that_is_no_number_ends_no_stream() -> None:
    logprobs = {"token_logprobs": [None], "top_logprobs": [{"token_id:5": None, "token_id:6": -1.5}]}
    told = {"choices": [{"text": "a", "token_ids": [5], "logprobs": logprobs, "finish_reason": "length"}]}
    (chunk,) = asyncio.run(heard(VllmHttpTransport, b"data: " + json.dumps(told).encode() + b"\n\n", 1 << 20))
    (own,), (((token, first), second),) = chunk.logprobs, chunk.tops
    assert (chunk.token_ids, token, second) == ((5,), 5, (6, -1.5)) and math.isnan(own) and math.isnan(first)
