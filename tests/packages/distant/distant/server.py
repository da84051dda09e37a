"""The server: packs by name, in this process' memory. It counts, and fails as networks do when it is told.

faults     "down" answers 503, "cut" ends a reply half way, "short" sends too little and says so, "flip" changes one
           byte of a reply, "silent" answers nothing for longer than anybody waits
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("down", "cut", "short", "flip", "silent")
SILENCE_S = 60.0


class Vault(ThreadingHTTPServer):
    """`delay_s`: of each reply. `under_way_at_most`: requests at a time. `ranges`: (pack, begin, end) as read."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.packs: dict[str, bytes] = {}
        self.ranges: list[tuple[str, int, int]] = []
        self.fault, self.delay_s = "", 0.0
        self.under_way_at_most = self._under_way = 0
        self._lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"distant://127.0.0.1:{self.server_address[1]}"

    def forget(self) -> None:
        """Counts and faults of former tests."""
        self.ranges.clear()
        self.fault, self.delay_s, self.under_way_at_most = "", 0.0, 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self._under_way += 1
            self.under_way_at_most = max(self.under_way_at_most, self._under_way)
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Answers(BaseHTTPRequestHandler):
    server: Vault

    def do_HEAD(self) -> None:
        data = self.server.packs.get(self.path[1:])
        self._reply(404 if data is None else 200, b"", len(data or b""))

    def do_GET(self) -> None:
        data, span = self.server.packs[self.path[1:]], self.headers["Range"].removeprefix("bytes=").split("-")
        begin, end = int(span[0]), int(span[1]) + 1
        self.server.ranges.append((self.path[1:], begin, end))
        if self.server.fault == "silent":
            time.sleep(SILENCE_S)  # not counted: it goes on in the next tests
            return
        with self.server.counted():
            time.sleep(self.server.delay_s)
        self._range(data[begin:end])

    def do_PUT(self) -> None:
        data, name = self.rfile.read(int(self.headers["Content-Length"])), self.path[1:]
        there = name in self.server.packs
        if self.server.fault != "down":
            self.server.packs.setdefault(name, data)
        self._reply(503 if self.server.fault == "down" else 409 if there else 201, b"", 0)

    def _range(self, data: bytes) -> None:
        fault, half = self.server.fault, len(data) // 2
        if fault == "down":
            self._reply(503, b"", 0)
        elif fault == "cut":
            self._reply(206, data[:half], len(data))
        elif fault == "short":
            self._reply(206, data[:half], half)
        elif fault == "flip":
            self._reply(206, data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :], len(data))
        else:
            self._reply(206, data, len(data))

    def _reply(self, status: int, body: bytes, nbytes: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(nbytes))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, text: str, *values: object) -> None:
        return
