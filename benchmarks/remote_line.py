"""A line of a fixed rate before a server on this host: a TCP relay that lets so many bytes a second through.

    with line(port, megabytes_s) as front: …       # what connects to `front` reaches `port`

All connections share the rate, which is for what the server sends. Bytes move from socket to socket inside the kernel,
in a process of its own, so the line takes little of the cores that are measured. No latency is added.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

STEP = 256 << 10
"""Bytes that are let through together, at most."""
BURST_S = 0.002
"""What a pause leaves to be used later, at most."""


class Allowance:
    """So many bytes a second, for all threads together."""

    def __init__(self, nbytes_s: float) -> None:
        self._nbytes_s, self._free_at, self._lock = nbytes_s, time.monotonic(), threading.Lock()

    def take(self, nbytes: int) -> None:
        """Returns when they may pass."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - BURST_S) + nbytes / self._nbytes_s
            wait = self._free_at - now
        if wait > 0:
            time.sleep(wait)


def _pass_on(source: socket.socket, target: socket.socket, allowance: Allowance | None) -> None:
    out, into = os.pipe()
    fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, STEP)
    try:
        with contextlib.suppress(OSError):
            while got := os.splice(source.fileno(), into, STEP):
                if allowance is not None:
                    allowance.take(got)
                while got:
                    got -= os.splice(out, target.fileno(), got)
    finally:
        os.close(out)
        os.close(into)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def serve(port: int, megabytes_s: float) -> None:
    """Never returns. Says which port it listens on."""
    allowance = Allowance(megabytes_s * 1e6)
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        print(server.getsockname()[1], flush=True)
        while True:
            near, _ = server.accept()
            far = socket.create_connection(("127.0.0.1", port))
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_pass_on, args=(near, far, None), daemon=True).start()
            threading.Thread(target=_pass_on, args=(far, near, allowance), daemon=True).start()


@contextlib.contextmanager
def line(port: int, megabytes_s: float) -> Iterator[int]:
    command = [sys.executable, __file__, str(port), str(megabytes_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


if __name__ == "__main__":
    serve(int(sys.argv[1]), float(sys.argv[2]))
