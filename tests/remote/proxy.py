"""An HTTP proxy before an object store that does to requests what networks, load balancers and busy stores do.

`StoreProxy` listens on a port of its own and passes everything on, signatures included, until it is told what to do
with which requests:

    proxy.on("PUT", "refs/", Fault(lose=True))              the write is made, its answer never comes
    proxy.on("GET", "packs/", Fault(status=503), times=2)   twice, then all is well
    proxy.shaken(dice, 0.2)                                 a fifth of all requests goes wrong in some way

What happened is counted, by the fault's name.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

CODES = {409: "ConditionalRequestConflict", 412: "PreconditionFailed", 500: "InternalError", 503: "SlowDown"}


@dataclass(frozen=True)
class Fault:
    """What happens to one request. Nothing set: it is passed on as it is."""

    drop: bool = False
    """The connection closes before the request is passed on."""
    lose: bool = False
    """The request is passed on, and the connection closes without its answer."""
    delay_s: float = 0.0
    status: int = 0
    """Answered with this, and not passed on (unless `made`)."""
    made: bool = False
    """With `status`: passed on all the same."""
    cut: float = 1.0
    """This part of the answer's body comes, then the connection closes."""
    without: tuple[str, ...] = ()
    """Headers, in lower case, that the store does not get to see."""

    @property
    def name(self) -> str:
        if self.status:
            return f"{self.status}{' made' if self.made else ''}"
        named = {"drop": self.drop, "lose": self.lose, "cut": self.cut < 1, "without": bool(self.without)}
        return next((name for name, is_so in named.items() if is_so), "delay" if self.delay_s else "none")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]
    """By names in lower case."""
    nbytes: int


@dataclass
class _Rule:
    matches: Callable[[Request], bool]
    fault: Fault
    left: int


@dataclass
class StoreProxy:
    """Made by `proxied`."""

    upstream: str
    endpoint: str = ""
    requests: list[Request] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    _rules: list[_Rule] = field(default_factory=list)
    _shake: Callable[[Request], Fault | None] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    writing: threading.Lock = field(default_factory=threading.Lock)
    """One write at a time is passed on: moto looks at a condition, and writes after that."""

    def on(self, method: str, part: str, fault: Fault, *, times: int = 1) -> None:
        """`fault` for the next `times` requests of this method with `part` in their path."""
        self._rules.append(_Rule(lambda asked: asked.method == method and part in asked.path, fault, times))

    def shaken(self, dice: random.Random, rate: float, *kinds: Fault) -> None:
        """A part `rate` of all requests meets one of `kinds`, by the dice."""

        def shake(_: Request) -> Fault | None:
            return dice.choice(kinds) if dice.random() < rate else None

        self._shake = shake

    def calm(self) -> None:
        """Passes everything on from now, and forgets what was counted."""
        with self._lock:
            self._rules.clear()
            self.requests.clear()
            self.faults.clear()
            self._shake = None

    def count(self, method: str, part: str) -> int:
        return sum(asked.method == method and part in asked.path for asked in list(self.requests))

    def met(self, request: Request) -> Fault:
        with self._lock:
            self.requests.append(request)
            found = next((rule for rule in self._rules if rule.left and rule.matches(request)), None)
            if found is not None:
                found.left -= 1
                fault: Fault | None = found.fault
            else:
                fault = self._shake(request) if self._shake else None
            if fault is not None:
                self.faults[fault.name] += 1
            return fault or Fault()


@contextlib.contextmanager
def proxied(upstream: str, port: int, certificate: Path | None = None) -> Iterator[StoreProxy]:
    """A proxy before `upstream`, as long as the block. `certificate`: a PEM file with its key; it speaks TLS then."""
    proxy = StoreProxy(upstream, f"{'https' if certificate else 'http'}://127.0.0.1:{port}")
    server = _Server(("127.0.0.1", port), _Handler)
    server.proxy = proxy
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: StoreProxy

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is none."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        fault = self.server.proxy.met(Request(self.command, self.path, headers, len(body)))
        if fault.delay_s:
            time.sleep(fault.delay_s)
        if fault.drop:
            self._close()
        elif fault.status and not fault.made:
            self._say(fault.status)
        else:
            self._passed_on(body, fault)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any

    def _passed_on(self, body: bytes, fault: Fault) -> None:
        upstream = http.client.HTTPConnection(urlsplit(self.server.proxy.upstream).netloc, timeout=30)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in fault.without:
                    upstream.putheader(name, value)
            with self.server.proxy.writing if self.command == "PUT" else contextlib.nullcontext():
                upstream.endheaders(body)
                answer = upstream.getresponse()
                data = answer.read()
        finally:
            upstream.close()
        if fault.status:
            self._say(fault.status)
        elif fault.lose:
            self._close()
        else:
            self._answer(answer, data, fault.cut)

    def _answer(self, answer: http.client.HTTPResponse, data: bytes, cut: float) -> None:
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server", "content-length"):
                self.send_header(name, value)
        declared = answer.getheader("Content-Length")
        self.send_header("Content-Length", declared if self.command == "HEAD" and declared else str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: int(len(data) * cut)])
        if cut < 1:
            self._close()

    def _say(self, status: int) -> None:
        code = CODES.get(status, "Fault")
        data = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>by the proxy</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _close(self) -> None:
        """Without another word: a reset rather than an end, as from a load balancer that restarts."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
