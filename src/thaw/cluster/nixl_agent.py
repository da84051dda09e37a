"""KV over NIXL, where both nodes have it and the pool asks for it: RDMA where there is some.

A daemon has one agent, and memory that is registered with it once: slots in which pieces of packs land, and slots from
which they are pushed. The daemon that needs a pack says where it may land, over the connection that its question came
by; the other one writes there (push: without RDMA reading is far slower) and says over the same connection which slot
is full; the slot is emptied into the file, hashed there as what comes over TCP is, and said to be free again.

Only the bytes of packs go this way. NIXL knows neither the pool's secret nor TLS: what lands is believed once its hash
is right, and not before.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any, BinaryIO

import msgspec

from thaw.cluster.framing import read_frame, send_frame
from thaw.cluster.messages import Landing
from thaw.core.errors import NotFound

SLOT_BYTES = 4 << 20
LANDING, STAGING = range(8), range(8, 12)
"""Slots for pieces that come, and for pieces that go."""
SLOTS_FOR_ONE = 4
"""Of a transfer, at most: the next pieces are written while the last ones are hashed."""
SILENT_S = 30.0
RETIRED_S = 60.0
"""A slot of a transfer that failed may still be written to: it is used again so much later."""
POLL_S = 0.0002


class FilledSlot(msgspec.Struct, frozen=True, kw_only=True):
    """Of the landing's slots, by number, with how many bytes."""

    slot: int
    nbytes: int


FILLED = msgspec.msgpack.Decoder(FilledSlot)
EMPTIED = msgspec.msgpack.Decoder(int)
ENCODE = msgspec.msgpack.Encoder().encode


class NixlAgent:
    """Safe from any thread: NIXL itself is called by one at a time."""

    def __init__(self) -> None:
        """Raises `NotFound` where NIXL is not installed, or cannot be used here."""
        try:
            from nixl._api import nixl_agent, nixl_agent_config, nixl_thread_sync_t
        except ImportError as error:
            raise NotFound(f"NIXL is not installed ({error}): pip install nixl") from None
        self._lock = threading.Lock()
        self._memory = mmap.mmap(-1, (len(LANDING) + len(STAGING)) * SLOT_BYTES)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        try:
            config = nixl_agent_config(backends=["UCX"], sync_mode=nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT)
            self._agent: Any = nixl_agent(secrets.token_hex(8), config)
            self._agent.register_memory([(self._address, len(self._memory), 0, "")], "DRAM", ["UCX"])
            self._metadata: bytes = self._agent.get_agent_metadata()
        except Exception as error:  # noqa: BLE001 - whatever it is, the node goes on without
            raise NotFound(f"NIXL cannot be used here: {type(error).__name__}: {error}") from None
        self._free = {"landing": list(LANDING), "staging": list(STAGING)}
        self._changed = threading.Condition()
        self._others: dict[bytes, str] = {}

    # -- in

    @contextlib.contextmanager
    def landing(self) -> Iterator[LandedBytes]:
        """Slots for one pack. Raises `TimeoutError` where none comes free."""
        slots = self._take("landing", SLOTS_FOR_ONE)
        try:
            yield LandedBytes(Landing(agent=self._metadata, slots=tuple(map(self._at, slots))), map(self._view, slots))
        except BaseException:
            later = threading.Timer(RETIRED_S, self._give_back, ("landing", slots))
            later.daemon = True
            later.start()
            raise
        self._give_back("landing", slots)

    # -- out

    def push(self, sock: socket.socket, file: BinaryIO, nbytes: int, landing: Landing) -> int:
        """The file's first bytes, into the landing. Raises `OSError`."""
        free, slots = list(range(len(landing.slots))), len(landing.slots)
        (own,) = self._take("staging", 1)
        view, sent = self._view(own), 0
        try:
            other = self._known(landing.agent)
            while sent < nbytes:
                got = file.readinto(view[: nbytes - sent])  # type: ignore[attr-defined]
                if not got:
                    break
                slot = free.pop() if free else _emptied(sock, slots)
                self._write(other, own, landing.slots[slot], got)
                send_frame(sock, ENCODE(FilledSlot(slot=slot, nbytes=got)))
                sent += got
            while len(free) < min(slots, -(-sent // SLOT_BYTES)):
                free.append(_emptied(sock, slots))
        finally:
            self._give_back("staging", [own])
        return sent

    def _known(self, metadata: bytes) -> str:
        """The other agent's name; it is made known once."""
        digest = sha256(metadata).digest()
        with self._lock, _as_os_errors("adding the other node's agent"):
            if digest not in self._others:
                name = self._agent.add_remote_agent(metadata)
                self._others[digest] = name.decode() if isinstance(name, bytes) else str(name)
            return self._others[digest]

    def _write(self, other: str, own: int, there: int, nbytes: int) -> None:
        """Done when the bytes are in the other's memory: NIXL flushes before it says so."""
        with _as_os_errors("a write"):
            with self._lock:
                ours = self._agent.get_xfer_descs([(self._at(own), nbytes, 0)], "DRAM")
                theirs = self._agent.get_xfer_descs([(there, nbytes, 0)], "DRAM")
                handle = self._agent.initialize_xfer("WRITE", ours, theirs, other, backends=["UCX"])
                state = self._agent.transfer(handle)
            try:
                until = time.monotonic() + SILENT_S
                while state == "PROC" and time.monotonic() < until:
                    time.sleep(POLL_S)
                    with self._lock:
                        state = self._agent.check_xfer_state(handle)
                if state != "DONE":
                    raise OSError(f"NIXL did not write {nbytes} bytes: {state} after {SILENT_S:.0f} s at most")
            finally:
                with self._lock:
                    self._agent.release_xfer_handle(handle)

    # -- slots

    def _at(self, slot: int) -> int:
        return self._address + slot * SLOT_BYTES

    def _view(self, slot: int) -> memoryview:
        return memoryview(self._memory)[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES]

    def _take(self, kind: str, most: int) -> list[int]:
        """At least one, at most so many."""
        with self._changed:
            if not self._changed.wait_for(lambda: bool(self._free[kind]), SILENT_S):
                raise TimeoutError(f"no {kind} slot for NIXL came free within {SILENT_S:.0f} s")
            taken, self._free[kind] = self._free[kind][:most], self._free[kind][most:]
            return taken

    def _give_back(self, kind: str, slots: list[int]) -> None:
        with self._changed:
            self._free[kind] += slots
            self._changed.notify_all()


def _emptied(sock: socket.socket, slots: int) -> int:
    """The next slot that the other side has emptied."""
    data = read_frame(sock)
    if data is None:
        raise ConnectionResetError("the other node ended while a pack was pushed to it")
    with _as_os_errors("reading what the other node said"):
        slot = EMPTIED.decode(data)
    if not 0 <= slot < slots:
        raise OSError(f"slot {slot} was said to be empty; there are {slots}")
    return slot


class LandedBytes:
    """A pack as it lands, read in order as from a socket."""

    def __init__(self, landing: Landing, views: Iterator[memoryview]) -> None:
        self.landing, self._views = landing, list(views)
        self._sock: socket.socket | None = None
        self._now, self._rest = 0, memoryview(b"")

    def reader(self, sock: socket.socket) -> Callable[[memoryview], bool]:
        """`sock`: where the other side says which slots are full."""
        self._sock = sock
        return self.read_into

    def read_into(self, view: memoryview) -> bool:
        """Fill `view`; False where the other side ended before. Raises `OSError`."""
        while len(view):
            if not len(self._rest) and not self._next():
                return False
            size = min(len(view), len(self._rest))
            view[:size] = self._rest[:size]
            view, self._rest = view[size:], self._rest[size:]
            if not len(self._rest):
                assert self._sock is not None
                send_frame(self._sock, ENCODE(self._now))
        return True

    def _next(self) -> bool:
        assert self._sock is not None
        data = read_frame(self._sock)
        if data is None:
            return False
        with _as_os_errors("reading what the other node said"):
            filled = FILLED.decode(data)
        if not 0 <= filled.slot < len(self._views) or not 0 < filled.nbytes <= SLOT_BYTES:
            raise OSError(f"{filled} was said to have landed in one of {len(self._views)} slots")
        self._now, self._rest = filled.slot, self._views[filled.slot][: filled.nbytes]
        return True


@contextlib.contextmanager
def _as_os_errors(what: str) -> Iterator[None]:
    """NIXL's errors have no class in common: they are those of its bindings."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"NIXL: {what} failed: {type(error).__name__}: {error}") from error


def agent_or_reason(wanted: bool) -> tuple[NixlAgent | None, str]:
    """The daemon's agent, None with the reason where there is none. UCX writes its warnings to standard output, which
    is not for them: meanwhile that is standard error."""
    if not wanted:
        return None, ""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        return NixlAgent(), ""
    except NotFound as error:
        return None, str(error)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
