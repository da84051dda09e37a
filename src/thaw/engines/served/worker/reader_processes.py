"""The worker's end of its readers: processes that read packs into the arena, which is one memory that all have mapped.

Why processes: a thread that reads needs the interpreter after each blob, and an engine's scheduler or runner holds it.
Here a load is one message to the readers' head and one answer, and the worker waits for the interpreter twice.

What is verified, and how, is the same: a blob is laid into the arena only once it has the hash that names it. On an
answer, and when the line ends, no reader writes any more, so the memory of a load that failed may be used again.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import msgspec

from thaw.core.errors import StorageFailed
from thaw.data.fresh_process import with_this_thaw
from thaw.data.locations import StoreMount
from thaw.data.reader import ReadStats
from thaw.data.readers.orders import OrderLine, Placed, ReadAnswer, ReadOrder
from thaw.data.tiers.folder import SCHEME
from thaw.engines.error_kinds import made
from thaw.engines.served.worker.pinned_buffer import PinnedBuffer

log = logging.getLogger("thaw.served")
END_LIMIT_S = 5.0


def readable(mount: StoreMount) -> bool:
    """Whether readers read this store: one whose tiers are all folders. A far tier waits for the network, not for the
    interpreter, and has requests under way by itself."""
    return all(tier.url.startswith(SCHEME) for tier in mount.tiers)


class ReaderProcesses:
    """`count` processes and their head, which live as long as this process at most. Safe from any thread; loads are
    read one after the other, each by all readers.

    Raises `StorageFailed` when they do not start.
    """

    def __init__(self, count: int, arena: PinnedBuffer) -> None:
        self._count, self._arena, self._lock = count, arena, threading.Lock()
        self.most = count
        """Readers that take part in a load; none once it is closed."""
        self.loads, self.waits, self.lost = 0, 0, 0
        """Loads that were read, how often this process waited for them, and those given up because a reader died."""
        self._head: subprocess.Popen[bytes] | None = None
        self._line: OrderLine | None = self._start()

    @property
    def pid(self) -> int | None:
        """The head's; None while there is none."""
        return None if self._head is None else self._head.pid

    def read(self, mount: StoreMount, blobs: Sequence[Placed]) -> ReadStats | None:
        """All blobs into their places in the arena, each verified; raises as `stream_blobs` does. None: a reader or the
        head died meanwhile, or the head does not start. Not all blobs are there then: somebody else must read them."""
        began, order = time.perf_counter(), ReadOrder(mount, tuple(blobs), self.most)
        with self._lock:
            answer = self._ask(msgspec.msgpack.encode(order))
            self.loads, self.lost = self.loads + (not answer.lost), self.lost + answer.lost
        if answer.lost:
            log.warning("thaw: a reader of packs died in a load of %d blobs; threads read them instead", len(blobs))
            return None
        if answer.kind:
            raise made(answer.kind, answer.error)
        return ReadStats(answer.nbytes, time.perf_counter() - began, answer.hash_seconds)

    def _ask(self, order: bytes) -> ReadAnswer:
        if not self.most:
            return ReadAnswer(lost=True)  # closed while this load waited for another
        if self._head is not None and self._head.poll() is not None:
            self._end()
        try:
            line = self._line = self._line or self._start()
        except StorageFailed as error:
            log.warning("thaw: %s", error)
            return ReadAnswer(lost=True)
        before, message = line.waits, line.receive() if line.send(order) else None
        self.waits += line.waits - before
        if message is None:
            self._end()
            return ReadAnswer(lost=True)
        return msgspec.msgpack.decode(message, type=ReadAnswer)

    def _start(self) -> OrderLine:
        """A head that has forked its readers; begun clean, so that nothing of the accelerator is in it."""
        own, other = socket.socketpair()
        arguments = (os.getpid(), other.fileno(), self._arena.fd, self._count)
        with other:
            self._head = subprocess.Popen(
                [sys.executable, "-m", "thaw.data.readers.head", *map(str, arguments)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(other.fileno(), self._arena.fd),
                env=with_this_thaw(os.environ),
            )  # fmt: skip
        line = OrderLine(own)
        if line.receive() is None:
            self._line = line
            self._end()
            raise StorageFailed(f"{self._count} readers of packs did not start, the log says why; readers=0 needs none")
        return line

    def _end(self) -> None:
        if self._line is not None:
            self._line.close()
        if self._head is not None:
            try:
                self._head.wait(END_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._head.kill()
                self._head.wait()
        self._line = self._head = None

    def close(self) -> None:
        """On return the load that they were at is over, and the head and all readers are gone: nobody reads any more.
        Calling twice is fine."""
        self.most = 0
        with self._lock:
            self._end()
