"""The driver: one thread that owns all sessions and runs work step by step.

`call(fn)` runs `fn` at the next step boundary; `start(task)` adds a task whose `step()` is called in turn with the
others' until it says it is finished. Nothing else ever touches a session, so there are no locks around sessions.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from typing import Protocol

from thaw.core.errors import Cancelled, EngineDied
from thaw.engines.promise import Promise, T


class Task(Protocol):
    """Work of several steps. `step` returns True while there is more; `fail` is told why it will not go on."""

    def step(self) -> bool: ...

    def fail(self, error: BaseException) -> None: ...


class Driver:
    def __init__(self, name: str) -> None:
        self._name = name
        self._wake = threading.Condition()
        self._calls: collections.deque[tuple[Callable[[], object], Promise[object]]] = collections.deque()
        self._tasks: collections.deque[Task] = collections.deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"thaw-{name}", daemon=True)
        self._thread.start()

    def call(self, fn: Callable[[], T]) -> Promise[T]:
        """Run `fn` on the driver's thread at the next step boundary."""
        promise: Promise[T] = Promise()
        with self._wake:
            if self._closing:
                raise EngineDied(f"engine {self._name} is closed; load it again")
            self._calls.append((fn, promise))  # type: ignore[arg-type]
            self._wake.notify()
        return promise

    def start(self, task: Task) -> None:
        """Add a task. Only from the driver's own thread (inside a `call`)."""
        self._tasks.append(task)

    def on_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        if not self.on_thread():
            self._thread.join()

    def _run(self) -> None:
        while self._wait():
            while self._calls:
                self._answer(*self._calls.popleft())
            if self._tasks:
                self._step(self._tasks.popleft())
        self._end()

    def _wait(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._calls or self._tasks)
            return not self._closing

    @staticmethod
    def _answer(fn: Callable[[], object], promise: Promise[object]) -> None:
        try:
            promise.settle(fn())
        except BaseException as error:  # noqa: BLE001 - the caller gets it, whatever it is
            promise.settle(error=error)

    def _step(self, task: Task) -> None:
        try:
            if task.step():
                self._tasks.append(task)
        except BaseException as error:  # noqa: BLE001 - one task's failure is its own
            task.fail(error)

    def _end(self) -> None:
        error = EngineDied(f"engine {self._name} was closed while this was under way; load it again and hydrate")
        for task in self._tasks:
            task.fail(error)
        for _, promise in self._calls:
            promise.settle(error=error)
        self._tasks.clear()
        self._calls.clear()


def cancelled() -> Cancelled:
    return Cancelled("cancelled by the caller; the session keeps the tokens it has")
