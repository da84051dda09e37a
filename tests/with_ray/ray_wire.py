"""What a listener on the network sees: a proxy that passes bytes on, and keeps them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from thaw.cluster.daemon import DaemonAddress


class RecordingProxy:
    """`seen`: all bytes of all connections, by direction: 0 from callers, 1 from the daemon."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host, self.port = self._listener.getsockname()[:2]
        self.seen = (bytearray(), bytearray())
        threading.Thread(target=self._serve, daemon=True).start()

    def has(self, data: bytes) -> bool:
        return any(data in seen for seen in self.seen)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                daemon = socket.create_connection(self._target)
                for way, (one, other) in enumerate(((caller, daemon), (daemon, caller))):
                    threading.Thread(target=self._carry, args=(way, one, other), daemon=True).start()

    def _carry(self, way: int, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.seen[way].extend(data)
                target.sendall(data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def recorded(address: DaemonAddress) -> Iterator[RecordingProxy]:
    """A proxy in front of a daemon."""
    proxy = RecordingProxy((address.host, address.port))
    try:
        yield proxy
    finally:
        proxy.close()
