"""A server whose answers come faster than its client reads them: what is asked meanwhile is not left waiting."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from thaw.engines.served import protocol
from thaw.engines.served.client.channel import EngineChannel
from thaw.engines.served.client.transport import Chunk, Submission
from thaw.engines.served.mailbox import SCHEDULER, Mailbox
from thaw.engines.served.protocol import EngineFacts
from thaw.engines.vllm.client.http import VllmHttpTransport

STREAMS, EVENTS = 8, 600
TAKE_S = 0.0005
"""What a token costs the client, besides its way through HTTP: text, stop conditions, whoever listens."""
SERVER = """
import asyncio, contextlib, json, sys
from pathlib import Path
answers, events = Path(sys.argv[1]), int(sys.argv[2])
token = {"token_ids": [5], "logprobs": {"token_logprobs": [-0.5], "top_logprobs": [None]}, "finish_reason": None}

def event(**more):
    return b"data: " + json.dumps({"choices": [{**token, **more}]}).encode() + b"\\n\\n"

async def serve(reader, writer):
    head = await reader.readuntil(b"\\r\\n\\r\\n")
    length = next(int(line[15:]) for line in head.split(b"\\r\\n") if line.lower().startswith(b"content-length:"))
    message = json.loads(await reader.readexactly(length))["kv_transfer_params"]["thaw"]
    writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Type: text/event-stream\\r\\nConnection: close\\r\\n\\r\\n")
    if message["op"] == "run":
        writer.write(event() * events + event(finish_reason="stop") + b"data: [DONE]\\n\\n")
    (answers / f".{message['id']}").write_text("{}")
    (answers / f".{message['id']}").rename(answers / f"{message['id']}.{'s' if message['op'] == 'run' else 0}")
    with contextlib.suppress(ConnectionError):
        if message["op"] != "run":
            await reader.read()  # held until the client lets go
        else:
            await writer.drain()
    writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""
"""Has all tokens of an answer ready at once, and answers commands by mail, as an engine with thaw in it."""


@pytest.fixture
def mail(tmp_path: Path) -> Mailbox:
    mail = Mailbox(tmp_path / "mail")
    facts = EngineFacts(
        protocol=protocol.VERSION, thaw="", version="", pid=os.getpid(), model="", dtype="", max_model_len=1,
        max_logprobs=1, block_size=1, num_blocks=1, world_size=1, prefix_caching=True, runner="",
        vocab_size=1, eos_token_ids=(),
    )  # fmt: skip
    mail.post(SCHEDULER, facts)
    return mail


@pytest.fixture
def url(mail: Mailbox) -> Iterator[str]:
    command = [sys.executable, "-c", SERVER, str(mail.folder / "answers"), str(EVENTS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        server.kill()


async def spoken(url: str, mail: Mailbox) -> tuple[float, float, int]:
    """(seconds of three commands, of all streams, tokens that had been taken when the commands were answered)."""
    transport = VllmHttpTransport(url)
    transport._open()
    facts = mail.engine_facts()
    assert facts is not None
    transport.mail, transport.facts = mail, facts
    dialect: Any = SimpleNamespace(one_token={"max_tokens": 1}, num_cached=lambda chunk: None)
    talk = EngineChannel(transport, dialect)
    taken = [0] * STREAMS

    async def run(number: int) -> None:
        def take(chunk: Chunk) -> bool:
            taken[number] += len(chunk.token_ids)
            ends = time.perf_counter() + TAKE_S
            while time.perf_counter() < ends:
                pass
            return True

        message = protocol.Run(id=secrets.token_hex(16), record=secrets.token_hex(16))
        await talk.run(Submission(message.id, [0], {}, None, message), take)

    began = time.perf_counter()
    runs = [asyncio.create_task(run(i)) for i in range(STREAMS)]
    while not all(taken):
        await asyncio.sleep(0.001)
    asked = time.perf_counter()
    for _ in range(3):
        await talk.command(protocol.Look(id=secrets.token_hex(16)))
    answered, read = time.perf_counter() - asked, sum(taken)
    await asyncio.gather(*runs)
    assert taken == [EVENTS + 1] * STREAMS
    whole = time.perf_counter() - began
    await transport.close()
    return answered, whole, read


@pytest.mark.slow("fills streams")
def test_a_command_does_not_wait_until_streams_have_been_read(url: str, mail: Mailbox) -> None:
    answered, whole, read = asyncio.run(spoken(url, mail))
    assert read < STREAMS * EVENTS / 2, f"3 commands took {answered:.2f} of {whole:.2f} s"
