"""What the benchmarks of `thaw serve` share: a gateway in a process of its own, and a client that adds little."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import thaw
from thaw.engines.base import Engine

WORDS = ("river", "stone", "night", "letter", "harbour", "window", "garden", "silver", "morning", "road", "quiet")


class Served:
    """A gateway that answers. `pid` is its process."""

    def __init__(self, begun: subprocess.Popen[bytes], port: int) -> None:
        self._begun, self.port, self.pid = begun, port, begun.pid

    def client(self, key: str = "t") -> Client:
        return Client(self.port, key)

    def rss_nbytes(self) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


class Client:
    """One connection that stays open; no SDK between the clock and the gateway."""

    def __init__(self, port: int, key: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    def connect(self) -> None:
        """Anew: a gateway closes connections that asked for nothing for some seconds."""
        self._connection.close()
        self._connection.connect()
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self._connection.request("POST", f"/v1/{path}", json.dumps(body), self._headers)
        reply = self._connection.getresponse()
        told = json.loads(reply.read())
        if reply.status != 200:
            raise SystemExit(f"{path}: {reply.status} {told}")
        found: dict[str, Any] = told
        return found

    def events(self, path: str, body: dict[str, Any]) -> Iterator[tuple[float, dict[str, Any]]]:
        """Each event of a stream, and when it was there."""
        self._connection.request("POST", f"/v1/{path}", json.dumps({**body, "stream": True}), self._headers)
        reply = self._connection.getresponse()
        if reply.status != 200:
            raise SystemExit(f"{path}: {reply.status} {reply.read()!r}")
        while line := reply.readline():
            if line.startswith(b"data: {"):
                yield time.perf_counter(), json.loads(line[6:])

    def close(self) -> None:
        self._connection.close()


@contextmanager
def served(folder: Path, engine: Sequence[str], *words: str) -> Iterator[Served]:
    """`engine`: the words of `thaw serve` that name it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "thaw.cli", "-C", str(folder), "serve", "--port", str(port), *engine, *words]
    begun = subprocess.Popen(command, env={**os.environ, "THAW_SERVE_TOKEN": "t"}, stdout=subprocess.DEVNULL)
    try:
        _wait(begun, port)
        yield Served(begun, port)
    finally:
        begun.send_signal(signal.SIGTERM)
        begun.wait(120)


def _wait(begun: subprocess.Popen[bytes], port: int) -> None:
    while begun.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit("the gateway ended before it answered")


def text(rng: random.Random, num_characters: int) -> str:
    """New from its first word on."""
    words = [f"{rng.getrandbits(64):x}"]
    while sum(map(len, words)) + len(words) < num_characters:
        words.append(rng.choice(WORDS))
    return " ".join(words)[:num_characters]


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def repository(folder: Path, engine: Engine, num_commits: int) -> None:
    """One with so many commits, each of a short session of its own, on no branch; those that it has already count."""
    with thaw.open(folder, engine=engine, create=True) as repo:
        missing = num_commits - len(list(repo.store.commits()))
        for i in range(missing):
            if i % 1000 == 0:
                print(f"{missing - i} commits to make", flush=True)
            with repo.session() as session:
                session.append(token_ids=[(i >> shift) % 250 for shift in (0, 4, 8)])
                session.commit(f"commit {i}")
