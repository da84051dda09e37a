"""How a daemon is talked to: a connection for each question, authenticated, then as many frames as it takes."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from thaw.cluster.framing import read_frame, send_frame
from thaw.cluster.messages import ENCODE, Question, value_of
from thaw.cluster.secret import greet

CONNECT_S = 5.0
ANSWER_S = 30.0


@dataclass(frozen=True)
class Peer:
    """A daemon's address and the pool's secret."""

    host: str
    port: int
    secret: bytes

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
        sock = socket.create_connection((self.host, self.port), CONNECT_S)
        try:
            tuned(sock)
            greet(sock, self.secret)
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
