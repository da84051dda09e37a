"""`python -m thaw.data.readers.head WORKER LINE ARENA COUNT`: the head of an engine's readers.

A process of its own, begun clean by the engine's worker, without torch and without the engine: WORKER is the worker's
pid, LINE and ARENA are descriptors that it handed down. It forks COUNT readers and gives each of them a part of an
order at a time. It answers an order once, when no reader works at it any more. A reader that has died is replaced. It
ends, and its readers with it, when the worker closes the line or dies.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import selectors
import signal
import socket
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from thaw.data.readers import reader
from thaw.data.readers.orders import OrderLine, Placed, ReadAnswer, ReadOrder

LOOK_S = 1.0
"""So often it looks whether the worker lives, whose end of the line a child of it may hold open."""
_L = TypeVar("_L", bound="OrderLine | _Reader")
PARTS = 4
"""Parts of an order for each reader, so that none is left with much when the others are done."""


@dataclass(frozen=True)
class _Reader:
    pid: int
    line: OrderLine

    def fileno(self) -> int:
        return self.line.fileno()


class Head:
    def __init__(self, worker: int, line: OrderLine, arena: memoryview, count: int) -> None:
        self._worker, self._line, self._arena = worker, line, arena
        self._readers: list[_Reader] = []
        while len(self._readers) < count:
            self._readers.append(self._fork())

    def serve(self) -> None:
        """Until the worker is gone. Then no reader is left."""
        orders = msgspec.msgpack.Decoder(ReadOrder)
        try:
            self._line.send(msgspec.msgpack.encode(ReadAnswer()))
            while self._is_ordered() and (message := self._line.receive()) is not None:
                self._line.send(msgspec.msgpack.encode(self._carry_out(orders.decode(message))))
        finally:
            for one in self._readers:
                _end(one)

    def _is_ordered(self) -> bool:
        """Waits for an order; False when the worker has died. Readers that died while there was nothing to do are
        replaced."""
        while True:
            lines: list[OrderLine | _Reader] = [self._line, *self._readers]
            ready = _readable(lines, LOOK_S)
            for line in ready:
                if isinstance(line, _Reader):
                    self._replace(line)
            if self._line in ready:
                return True
            if os.getppid() != self._worker:
                return False

    def _carry_out(self, order: ReadOrder) -> ReadAnswer:
        takes = self._readers[: max(1, order.most)]
        parts, idle, busy = deque(_parts(order, len(takes))), list(takes), list[_Reader]()
        whole = ReadAnswer()
        while busy or (parts and not (whole.kind or whole.lost)):
            while parts and idle and not (whole.kind or whole.lost):
                one = idle.pop()
                one.line.send(msgspec.msgpack.encode(parts.popleft()))  # of one that died, nothing comes back
                busy.append(one)
            for one in _readable(busy):
                busy.remove(one)
                idle.append(one)
                whole = _joined(whole, self._heard(one))
        return whole

    def _heard(self, one: _Reader) -> ReadAnswer:
        message = one.line.receive()
        if message is not None:
            return msgspec.msgpack.decode(message, type=ReadAnswer)
        self._replace(one)
        return ReadAnswer(lost=True)

    def _replace(self, one: _Reader) -> None:
        _end(one)
        self._readers[self._readers.index(one)] = self._fork()

    def _fork(self) -> _Reader:
        own, other = socket.socketpair()
        head, pid = os.getpid(), os.fork()
        if pid:
            other.close()
            return _Reader(pid, OrderLine(own))
        try:
            own.close()
            for one in self._readers:
                one.line.close()
            reader.serve(OrderLine(other), self._arena, head)
        except Exception:  # noqa: BLE001 - the head sees it end, and the log why
            traceback.print_exc()
        finally:
            os._exit(0)


def _parts(order: ReadOrder, count: int) -> Iterable[ReadOrder]:
    """The order in parts of about equal bytes, each of blobs that lie near one another."""
    blobs = sorted(order.blobs, key=lambda blob: (blob[0].pack, blob[0].offset))
    each = sum(place.nbytes for place, _ in blobs) // (PARTS * count) + 1
    part, nbytes = list[Placed](), 0
    for blob in blobs:
        part.append(blob)
        nbytes += blob[0].nbytes
        if nbytes >= each:
            yield msgspec.structs.replace(order, blobs=tuple(part))
            part, nbytes = [], 0
    if part:
        yield msgspec.structs.replace(order, blobs=tuple(part))


def _joined(whole: ReadAnswer, part: ReadAnswer) -> ReadAnswer:
    """The first error stays."""
    if whole.kind:
        return whole
    return msgspec.structs.replace(
        part,
        nbytes=whole.nbytes + part.nbytes,
        hash_seconds=whole.hash_seconds + part.hash_seconds,
        lost=whole.lost or part.lost,
    )


def _readable(lines: Sequence[_L], limit_s: float | None = None) -> list[_L]:
    """Those that have something to say, or have ended; waits until one has."""
    with selectors.PollSelector() as selector:
        for line in lines:
            selector.register(line, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(limit_s)]  # type: ignore[misc]


def _end(one: _Reader) -> None:
    """On return the process is gone, and writes nothing any more."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(one.pid, signal.SIGKILL)
    os.waitpid(one.pid, 0)
    one.line.close()


def main() -> None:
    worker, line, arena, count = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the worker says when it is over
    memory = memoryview(mmap.mmap(arena, os.fstat(arena).st_size))
    import concurrent.futures.thread  # noqa: F401 - once, before readers are forked

    Head(worker, OrderLine(socket.socket(fileno=line)), memory, count).serve()


if __name__ == "__main__":
    main()
