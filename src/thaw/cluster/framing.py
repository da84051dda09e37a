"""Messages over a socket: four bytes of length, then so many bytes. Longer ones than the limit are not read."""

from __future__ import annotations

import socket
import struct

MAX_FRAME_BYTES = 1 << 20


def send_frame(sock: socket.socket, data: bytes) -> None:
    sock.sendall(struct.pack("<I", len(data)) + data)


def read_frame(sock: socket.socket) -> bytes | None:
    """The next message; None at the end. Raises `OSError` for one that is too long, and what the socket raises."""
    head = read_exactly(sock, 4)
    if head is None:
        return None
    (nbytes,) = struct.unpack("<I", head)
    if nbytes > MAX_FRAME_BYTES:
        raise OSError(f"a message of {nbytes} bytes was announced; at most {MAX_FRAME_BYTES} are read")
    return read_exactly(sock, nbytes)


def read_exactly(sock: socket.socket, nbytes: int) -> bytes | None:
    """So many bytes; None where the other side ended before. Raises `OSError`."""
    data = bytearray(nbytes)
    return bytes(data) if read_into(sock, memoryview(data)) else None


def read_into(sock: socket.socket, view: memoryview) -> bool:
    """Fill `view`; False where the other side ended before. Raises `OSError`."""
    while len(view):
        got = sock.recv_into(view)
        if got == 0:
            return False
        view = view[got:]
    return True
