"""The driver: one thread that owns all sessions and runs work step by step.

`call(fn)` runs `fn` at the next step boundary; `start(task)` adds a task whose `step()` is called in turn with the
others' until it says it is finished. Nothing else ever touches a session, so there are no locks around sessions.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from thaw.core.errors import Cancelled, EngineDied, TimedOut
from thaw.engines.base import Delta, Handle

T = TypeVar("T")


class Promise(Handle[T], Generic[T]):
    """The one implementation of `Handle`: settled once, by the engine's threads."""

    def __init__(self, on_cancel: Callable[[], None] | None = None) -> None:
        lock = threading.Lock()
        self._changed = threading.Condition(lock)
        self._ended = threading.Condition(lock)  # apart, so that a delta wakes nobody who waits for the end alone
        self._deltas: list[Delta] = []
        self._value: T | None = None
        self._error: BaseException | None = None
        self._settled = False
        self._callbacks: list[Callable[[Handle[T]], object]] = []
        self.on_cancel = on_cancel

    def result(self, timeout: float | None = None) -> T:
        with self._ended:
            if not self._ended.wait_for(lambda: self._settled, timeout):
                raise TimedOut(f"no result within {timeout} s; the work goes on (cancel() stops it)")
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    def cancel(self) -> None:
        if self.on_cancel is not None and not self._settled:
            self.on_cancel()

    def done(self) -> bool:
        return self._settled

    def __iter__(self) -> Iterator[Delta]:
        seen = 0
        while True:
            news, ended = self._wait_for_news(seen)
            yield from news
            seen += len(news)
            if ended and not news:
                break
        if self._error is not None:
            raise self._error

    def _wait_for_news(self, seen: int) -> tuple[list[Delta], bool]:
        with self._changed:
            self._changed.wait_for(lambda: self._settled or len(self._deltas) > seen)
            return self._deltas[seen:], self._settled

    def add_done_callback(self, callback: Callable[[Handle[T]], object]) -> None:  # type: ignore[override]
        with self._changed:
            if not self._settled:
                self._callbacks.append(callback)
                return
        callback(self)

    def emit(self, delta: Delta) -> None:
        with self._changed:
            self._deltas.append(delta)
            self._changed.notify_all()

    def settle(self, value: T | None = None, error: BaseException | None = None) -> None:
        """Set the outcome; later calls are ignored."""
        with self._changed:
            if self._settled:
                return
            self._value, self._error, self._settled = value, error, True
            callbacks, self._callbacks = self._callbacks, []
            self._changed.notify_all()
            self._ended.notify_all()
        for callback in callbacks:
            callback(self)


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
