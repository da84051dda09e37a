"""`thaw serve` as a process: it parks at SIGTERM and continues with --restore; `kill -9` loses nothing acknowledged."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import thaw
from thaw.data.fresh_process import with_this_thaw
from thaw.repo import settings
from thaw.repo.settings import EngineSettings

openai = pytest.importorskip("openai")
for package in ("starlette", "uvicorn"):
    pytest.importorskip(package, reason="the extra [server] is not installed")
SOURCE = Path(__file__).resolve().parents[2] / "src"
TOKEN = "a-token-that-nobody-guesses"
LONG = "a long story about a river, and who lives there. " * 8


class Process:
    def __init__(self, folder: Path, *words: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.begun = subprocess.Popen(
            [sys.executable, "-m", "thaw.cli", "-C", str(folder), "serve", "--json", "--port", str(port), *words],
            env={**os.environ, "PYTHONPATH": str(SOURCE), "THAW_SERVE_TOKEN": TOKEN},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.begun.stdout is not None
        told = json.loads(self._until_brace(self.begun.stdout))
        assert told["token"] is None
        self.model = told["model"]
        self.client: Any = openai.OpenAI(base_url=f"{told['url']}/v1", api_key=TOKEN, max_retries=0, timeout=600)
        for _ in range(400):
            try:
                self.client.models.list()
                return
            except openai.APIConnectionError:
                time.sleep(0.02)
        raise AssertionError("it does not answer")

    @staticmethod
    def _until_brace(stream: Any) -> str:
        text = ""
        for line in stream:
            text += line
            if line.startswith("}"):
                return text
        raise AssertionError(text)

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.begun.send_signal(how)
        return self.begun.wait(60)


@contextmanager
def served(folder: Path, *words: str) -> Iterator[Process]:
    process = Process(folder, *words)
    try:
        yield process
    finally:
        if process.begun.poll() is None:
            process.end(signal.SIGKILL)
        for stream in (process.begun.stdout, process.begun.stderr):
            assert stream is not None
            stream.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository that remembers a slow fake engine."""
    path = tmp_path / "runs"
    with thaw.init(path) as repo:
        settings.remember(repo.store, EngineSettings(name="fake", options={"step_s": 0.004}))
    return path


def ask(client: Any, **more: Any) -> Any:
    return client.responses.create(model="fake", **{"input": LONG, "max_output_tokens": 8, **more})


@pytest.mark.slow("starts processes")
def test_sigterm_parks_and_restore_goes_on_as_if_nothing_had_been(folder: Path) -> None:
    whole: dict[str, Any] = {"max_output_tokens": 300, "extra_body": {"seed": 5, "stop": ["zzz"]}}
    with served(folder) as process:
        told = ask(process.client, background=True, **whole)
        before = []
        for event in process.client.responses.retrieve(told.id, stream=True):
            before.append(event)
            if len(before) == 40:
                break
        assert process.end() == 0
    with served(folder) as process:
        kept = process.client.responses.retrieve(told.id)
        assert kept.status == "incomplete" and kept.thaw["point"]
        assert process.end() == 0
    with served(folder, "--restore") as process:
        after = list(process.client.responses.retrieve(told.id, stream=True, starting_after=39))
        assert after[0].sequence_number == 40
        done = process.client.responses.retrieve(told.id)
        told_text = "".join(event.delta for event in [*before, *after] if event.type == "response.output_text.delta")
        assert done.output_text == told_text and done.usage.output_tokens == 300
        uninterrupted = ask(process.client, **whole)
        assert uninterrupted.output_text == done.output_text


@pytest.mark.slow("kills processes, 20 times")
def test_what_was_acknowledged_is_there_after_kill_9_and_goes_on(folder: Path) -> None:
    acknowledged: list[Any] = []
    cut: list[tuple[str, Any]] = []
    for round in range(20):
        with served(folder) as process:
            client = process.client
            for id, parent in cut:
                kept = client.responses.retrieve(id)
                assert kept.status == "incomplete" and kept.thaw["point"] == parent
                [last] = client.responses.retrieve(id, stream=True, starting_after=7)
                assert (last.type, last.sequence_number) == ("response.incomplete", 8)
            for reply in acknowledged:
                assert client.responses.retrieve(reply.id).output_text == reply.output_text
            last = acknowledged[-1] if acknowledged else None
            reply = ask(client, **({} if last is None else {"previous_response_id": last.id, "input": f"{round}"}))
            if last is not None:
                assert reply.thaw["cached_tokens"] == last.usage.total_tokens - 1
            acknowledged.append(reply)
            stream = ask(client, stream=True, max_output_tokens=2000, previous_response_id=reply.id, input="On.")
            seen = [event for _, event in zip(range(8), stream, strict=False)]
            cut.append((seen[0].response.id, reply.thaw["point"]))
            process.end(signal.SIGKILL)
            stream.close()


@pytest.mark.slow("starts processes")
def test_sigterm_parks_fifty_and_restore_finishes_each(folder: Path) -> None:
    """Those that run in the background and those that somebody reads, each from where it was."""
    num, length = 50, 40
    told: dict[str, str] = {}
    with served(folder) as process:
        asked = [
            ask(
                process.client, background=i % 2 == 0, stream=i % 2 == 1, max_output_tokens=length,
                input=f"{i} {LONG}", extra_body={"seed": i},
            )
            for i in range(num)
        ]  # fmt: skip
        ids = [one.id if i % 2 == 0 else next(iter(one)).response.id for i, one in enumerate(asked)]
        assert process.end() == 0
        for id, one in zip(ids, asked, strict=True):
            rest = [] if hasattr(one, "id") else list(one)
            told[id] = "".join(event.delta for event in rest if event.type == "response.output_text.delta")
            assert not rest or rest[-1].type != "response.completed"
    with served(folder, "--restore") as process:
        client = process.client
        unfinished = set(ids)
        ended = time.monotonic() + 60
        while unfinished and time.monotonic() < ended:
            time.sleep(0.2)
            unfinished -= {id for id in unfinished if client.responses.retrieve(id).usage.output_tokens == length}
        assert not unfinished
        for id in ids:
            done = client.responses.retrieve(id)
            assert done.output_text.startswith(told[id]) and done.incomplete_details.reason == "max_output_tokens"
        for i in (0, 1, 48, 49):
            whole = ask(client, max_output_tokens=length, input=f"{i} {LONG}", extra_body={"seed": i})
            assert whole.output_text == client.responses.retrieve(ids[i]).output_text


def test_no_key_is_in_the_words_of_the_process_or_in_what_it_says(folder: Path) -> None:
    with served(folder) as process:
        words = Path(f"/proc/{process.begun.pid}/cmdline").read_bytes()
        assert b"serve" in words and TOKEN.encode() not in words
        with pytest.raises(openai.AuthenticationError):
            process.client.with_options(api_key="another-secret-key").models.list()
        with pytest.raises(openai.BadRequestError):
            ask(process.client, extra_body={"nonsense": TOKEN})
        assert process.end() == 0
        assert process.begun.stdout is not None and process.begun.stderr is not None
        said = process.begun.stdout.read() + process.begun.stderr.read()
    assert TOKEN not in said and "another-secret-key" not in said


ARENAS = """
import ctypes, re, sys, threading
from thaw.gateway import server

if sys.argv[1] == "shared":
    server.share_memory()
libc, all_here = ctypes.CDLL(None), threading.Barrier(21)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
libc.fopen.argtypes = ctypes.c_char_p, ctypes.c_char_p
libc.malloc_info.argtypes = ctypes.c_int, ctypes.c_void_p
libc.fclose.argtypes = [ctypes.c_void_p]

def allocate():
    libc.malloc(1000)
    all_here.wait(30)

for thread in [threading.Thread(target=allocate) for _ in range(20)]:
    thread.start()
all_here.wait(30)
file = libc.fopen(sys.argv[2].encode(), b"w")
libc.malloc_info(0, file)
libc.fclose(file)
print(len(re.findall("<heap nr=", open(sys.argv[2]).read())))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="the C library is not glibc")
def test_threads_share_few_arenas_so_that_what_they_free_is_used_again(tmp_path: Path) -> None:
    """Without it each of them has one of its own, as far as the machine's cores allow."""

    def num_arenas(how: str) -> int:
        command = [sys.executable, "-c", ARENAS, how, str(tmp_path / how)]
        done = subprocess.run(command, env=with_this_thaw(os.environ), capture_output=True, check=True, timeout=60)
        return int(done.stdout)

    assert num_arenas("shared") <= 2 < num_arenas("each its own")
