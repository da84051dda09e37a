"""Work that follows a commit and that nobody waits for: on a thread, one piece at a time in a process.

A commit that asked for it has returned. Work that fails is a warning, and a later commit asks again; a process that
is killed in it leaves a repository as good as before. The thread ends with its work; a process waits for it at its end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


class Upkeep:
    """Of one open store. Any thread may use it; in a process that was forked off none of its work runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._pid = os.getpid()

    def begin(self, work: Callable[[], None]) -> None:
        """Runs `work`, which warns instead of raising, soon; not at all where something runs already or after
        `close`."""
        self._after_fork()
        with self._lock:
            if self._closed or (self._thread is not None and self._thread.is_alive()):
                return
            thread = threading.Thread(target=work, name="thaw-upkeep")
            try:
                thread.start()
            except RuntimeError:  # no more threads, or the process is ending: a later commit asks again
                return
            self._thread = thread

    def wait(self) -> None:
        """Until what runs is done."""
        self._after_fork()
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def close(self) -> None:
        """Waits for what runs; nothing begins afterwards. Idempotent."""
        self._after_fork()
        with self._lock:
            self._closed = True
        self.wait()

    def _after_fork(self) -> None:
        if self._pid != os.getpid():
            self._lock, self._thread, self._pid = threading.Lock(), None, os.getpid()
