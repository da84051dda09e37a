"""Closes sessions that nobody holds any more: asked for at any point of the program, done by a thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from queue import SimpleQueue


class Reaper:
    """Whoever asks takes no lock, for Python's collector may run a finalizer at any point of any thread: where that is
    within an executor's `submit`, a second `submit` would wait for ever for the lock that its own thread holds."""

    def __init__(self, io: Executor) -> None:
        self._io = io
        self._asked: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="thaw-pool-reaper", daemon=True)
        self._thread.start()

    def soon(self, close: Callable[[], object]) -> None:
        """Have `close` called; from a finalizer too."""
        self._asked.put(close)

    def end(self) -> None:
        """What was asked for by now is handed on, and nothing after it."""
        self._asked.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (close := self._asked.get()) is not None:
            with contextlib.suppress(RuntimeError):  # the interpreter ends
                self._io.submit(close)
            del close  # it has its engine, which may have ended: nothing of it is to stay here until the next one comes
