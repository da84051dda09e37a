"""How a daemon is talked to: a connection for each question, authenticated, then as many frames as it takes."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from thaw.cluster.framing import read_frame, send_frame
from thaw.cluster.messages import ENCODE, Question, value_of
from thaw.cluster.secret import StrangerError, greet
from thaw.cluster.tls import PoolTls

CONNECT_S = 5.0
ANSWER_S = 30.0


@dataclass(frozen=True)
class Peer:
    """A daemon's address, the pool's secret, and its TLS where it has that."""

    host: str
    port: int
    secret: bytes
    tls: PoolTls | None = None

    def ask(self, question: Question, limit_s: float = ANSWER_S) -> Any:
        """The answer's value. Raises `OSError` where the daemon is gone (`StrangerError`: it is another pool's), and
        the error that it answered with."""
        return value_of(self.ask_raw(ENCODE(question), limit_s))

    def ask_raw(self, data: bytes, limit_s: float = ANSWER_S) -> bytes:
        with self.connected() as sock:
            sock.settimeout(limit_s)
            return exchange(sock, data)

    @contextlib.contextmanager
    def connected(self) -> Iterator[socket.socket]:
        sock = self.connect()
        try:
            yield sock
        finally:
            sock.close()

    def connect(self) -> socket.socket:
        """An authenticated connection, without a time limit. Raises `OSError`."""
        sock, binding = socket.create_connection((self.host, self.port), CONNECT_S), b""
        try:
            tuned(sock)
            if self.tls is not None:
                sock, binding = self.tls.call(sock)
            greet(sock, self.secret, binding)
        except ssl.SSLError as error:  # of TLS 1.3 the daemon refuses a certificate only while the proof is awaited
            sock.close()
            where = f"{self.host}:{self.port}"
            raise StrangerError(f"no TLS of this pool's with what answers at {where}: {error}") from None
        except BaseException:
            sock.close()
            raise
        return sock


def exchange(sock: socket.socket, data: bytes) -> bytes:
    """Send a question and read its answer. Raises `OSError`."""
    send_frame(sock, data)
    answer = read_frame(sock)
    if answer is None:
        raise ConnectionResetError("the node's daemon ended while this was asked")
    return answer


def tuned(sock: socket.socket) -> None:
    """Small messages go at once; a peer that vanished without a word is noticed in about a minute."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
