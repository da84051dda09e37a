"""Work under way, as the caller sees it: a thin view of the engine's handle.

Iterate for deltas as they come; `result()` waits for the end. Leaving the loop early does not stop the work: `cancel()`
does, or leaving the `with` block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

from thaw.core.errors import ThawError, TimedOut
from thaw.engines.base import Completion, Delta, Handle

if TYPE_CHECKING:
    from thaw.repo.admission import EngineWork

T = TypeVar("T")


class Stream(Generic[T]):
    """Deltas of one generation. Iterating again gives the same deltas again. Safe from any thread."""

    def __init__(
        self,
        handle: Handle[list[Completion]],
        finish: Callable[[list[Completion]], T],
        failed: Callable[[], None] = lambda: None,
        work: EngineWork | None = None,
    ) -> None:
        """`finish` makes the outcome, each time that it is asked for; `failed` is called where there is none. `work`:
        the generation as a drain sees it."""
        self.handle = handle
        self._finish = finish
        self._failed = failed
        self._work = work

    def __iter__(self) -> Iterator[Delta]:
        """The deltas. Raises `Drained` behind the last one where a drain cut it short."""
        yield from self.handle
        if self._work is not None:
            self._work.check(self.handle.result())

    def result(self, timeout: float | None = None) -> T:
        """The outcome. Raises `TimedOut` after `timeout` seconds (the work goes on), `Cancelled` after `cancel`, and
        `Drained`, with the point to continue from, where a drain cut it short."""
        try:
            done = self.handle.result(timeout)
        except TimedOut:
            raise
        except ThawError:
            self._failed()
            raise
        outcome = self._finish(done)
        if self._work is not None:
            self._work.check(done, timeout)
        return outcome

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
