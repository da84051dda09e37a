"""What an engine's worker, the head of its readers and a reader say to one another: an order, and how it went.

One message each way for a load, whatever its number of blobs. Bytes of KV never travel this way.
"""

from __future__ import annotations

import socket
from typing import TypeAlias

import msgspec

from thaw.data.locations import BlobLocation, StoreMount

HEADER = 4
"""Bytes before each message that say how long it is."""
AT_ONCE = 1 << 16
BUFFER = 4 << 20
"""What a socket may hold of an order that nobody has taken yet, as far as the system allows it."""


class BlobRows(msgspec.Struct, frozen=True, array_like=True):
    """Where part of a blob goes: `layers` × `planes` rows of `row_nbytes`. A row begins in the blob at `source` +
    layer × `layer_step` + plane × `plane_step`, and in the arena at `place` + (layer × planes + plane) × `row_step`."""

    layers: int
    planes: int
    row_nbytes: int
    source: int
    layer_step: int
    plane_step: int
    place: int
    row_step: int


Placed: TypeAlias = "tuple[BlobLocation, tuple[BlobRows, ...]]"


class ReadOrder(msgspec.Struct, frozen=True, array_like=True):
    """Read these blobs, and lay each one that has the hash that names it where it belongs. `most`: readers that take
    part."""

    mount: StoreMount
    blobs: tuple[Placed, ...]
    most: int


class ReadAnswer(msgspec.Struct, frozen=True, array_like=True):
    """All of it is there, or what was wrong: the `kind` of an error of thaw's and its text. From then on nothing of the
    order is written any more. `lost`: a reader died, and the order was not carried out."""

    nbytes: int = 0
    hash_seconds: float = 0.0
    kind: str = ""
    error: str = ""
    lost: bool = False


class OrderLine:
    """A socket to one other process, for whole messages: an order one way, then its answer the other.

    `waits`: how often this end has called the system to send or to receive, each time letting go of the interpreter.
    """

    def __init__(self, own: socket.socket) -> None:
        self._socket, self.waits = own, 0
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: bytes) -> bool:
        """False: nobody is at the other end."""
        self.waits += 1
        try:
            self._socket.sendall(len(message).to_bytes(HEADER, "little") + message)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def receive(self) -> bytes | None:
        """Waits for a message. None: nobody is at the other end, nor will be."""
        found, end = bytearray(), HEADER
        while len(found) < end:
            more = self._some()
            if not more:
                return None
            found += more
            if end == HEADER <= len(found):
                end += int.from_bytes(found[:HEADER], "little")
        return bytes(found[HEADER:])

    def _some(self) -> bytes:
        self.waits += 1
        try:
            return self._socket.recv(AT_ONCE)
        except ConnectionResetError:
            return b""

    def close(self) -> None:
        self._socket.close()
