"""Work under way, as the caller sees it: a thin view of the engine's handle.

Iterate for deltas as they come; `result()` waits for the end. Leaving the loop early does not stop the work: `cancel()`
does, or leaving the `with` block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from thaw.core.errors import ThawError, TimedOut
from thaw.engines.base import Completion, Delta, Handle

T = TypeVar("T")


class Stream(Generic[T]):
    """Deltas of one generation. Iterating again gives the same deltas again. Safe from any thread."""

    def __init__(
        self,
        handle: Handle[list[Completion]],
        finish: Callable[[list[Completion]], T],
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        """`finish` makes the outcome, each time that it is asked for; `failed` is called where there is none."""
        self.handle = handle
        self._finish = finish
        self._failed = failed

    def __iter__(self) -> Iterator[Delta]:
        return iter(self.handle)

    def result(self, timeout: float | None = None) -> T:
        """The outcome. Raises `TimedOut` after `timeout` seconds (the work goes on), `Cancelled` after `cancel`."""
        try:
            done = self.handle.result(timeout)
        except TimedOut:
            raise
        except ThawError:
            self._failed()
            raise
        return self._finish(done)

    def cancel(self) -> None:
        """Stop at the next step boundary; the session keeps the tokens it has."""
        self.handle.cancel()

    def done(self) -> bool:
        return self.handle.done()

    def add_done_callback(self, callback: Callable[[Stream[T]], object]) -> None:
        """Call `callback(stream)` once it has ended, from a thread of the engine's."""
        self.handle.add_done_callback(lambda _: callback(self))

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.done():
            self.cancel()
