"""Whether an embedded engine sleeps. Who falls asleep waits for what was let in; who works is let in, or refused.

awake     work is let in
falling   nothing is let in any more; what was let in is awaited
asleep    the pages are gone, and the weights as far as the level says
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from thaw.core.errors import Busy, Conflict, EngineDied
from thaw.engines.embedded.backend import Backend


class Nap:
    """Safe from any thread."""

    def __init__(self, backend: Backend) -> None:
        self._name = backend.name
        self._changed = threading.Condition()
        self._inside = 0
        self._is_awake = True
        self._moving = False
        self._is_over = False

    def end(self) -> None:
        """The engine is closed, and wakes no more if it sleeps."""
        self._is_over = True

    def require_awake(self) -> None:
        """Raise `Busy` unless it is awake, and `EngineDied` where it was closed asleep."""
        if not self._is_awake:
            self._require_open()
            raise Busy(f"engine {self._name} is asleep, and does nothing until engine.wake() (repo.wake())")

    def _require_open(self) -> None:
        if self._is_over:
            raise EngineDied(f"engine {self._name} was closed while it slept; load it again")

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Around what looks at the weights outside of the driver. Raises `Busy` unless it is awake."""
        with self._changed:
            self.require_awake()
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def falling_asleep(self) -> Iterator[None]:
        """Around the way to sleep: on an error it is awake as before. Raises `Busy` where it sleeps already."""
        with self._changed:
            self.require_awake()
            self._is_awake, self._moving = False, True
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._inside)
            yield
        except BaseException:
            self._is_awake = True
            raise
        finally:
            self._moving = False

    @contextmanager
    def waking(self) -> Iterator[None]:
        """Around the way back; on an error it sleeps on. Raises `Conflict` where it does not sleep."""
        with self._changed:
            if self._is_awake or self._moving:
                raise Conflict(f"engine {self._name} does not sleep" if self._is_awake else "it is on its way; wait")
            self._require_open()
            self._moving = True
        try:
            yield
            self._is_awake = True
        finally:
            self._moving = False
