"""A line between two processes: messages with their length before them, over a socket pair."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

from thaw.pool.rpc.protocol import ENCODER, Call, Reply

MAX_MESSAGE_BYTES = 1 << 30


class Connection:
    """One end of the socket pair. `send` from any thread; `receive` from one."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    def send(self, message: Call | Reply) -> None:
        """Raises `OSError` when the other side is gone."""
        data = ENCODER.encode(message)
        with self._lock:
            self._sock.sendall(struct.pack("<I", len(data)) + data)

    def receive(self) -> bytes | None:
        """The next message, None at the end."""
        head = self._exactly(4)
        if head is None:
            return None
        (nbytes,) = struct.unpack("<I", head)
        return None if nbytes > MAX_MESSAGE_BYTES else self._exactly(nbytes)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _exactly(self, nbytes: int) -> bytes | None:
        data = bytearray(nbytes)
        view, got = memoryview(data), 0
        while got < nbytes:
            try:
                n = self._sock.recv_into(view[got:])
            except OSError:
                return None
            if n == 0:
                return None
            got += n
        return bytes(data)
