"""A handle that an engine's threads settle: what every verb that runs returns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from thaw.core.errors import TimedOut
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
        self._on_cancel = on_cancel
        self._cancelled = False

    @property
    def on_cancel(self) -> Callable[[], None] | None:
        """What stops the work. Set after `cancel` was called, it is called then: the work had not begun."""
        return self._on_cancel

    @on_cancel.setter
    def on_cancel(self, stop: Callable[[], None] | None) -> None:
        with self._changed:
            self._on_cancel = stop
            late = self._cancelled and not self._settled
        if late and stop is not None:
            stop()

    def result(self, timeout: float | None = None) -> T:
        with self._ended:
            if not self._ended.wait_for(lambda: self._settled, timeout):
                raise TimedOut(f"no result within {timeout} s; the work goes on (cancel() stops it)")
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    def cancel(self) -> None:
        with self._changed:
            self._cancelled = True
            stop = None if self._settled else self._on_cancel
        if stop is not None:
            stop()

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
