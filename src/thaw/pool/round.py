"""A round under way: N branches of one point. Wait for all, take them as they end, stream, cancel.

A branch has exactly one result, whatever happened to the workers that ran it. Safe from any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator

from thaw.core.errors import Cancelled, ThawError, TimedOut
from thaw.engines.base import Delta
from thaw.pool.values import BranchDelta, BranchResult

log = logging.getLogger("thaw.pool")


class Round:
    """Made by `ForkPool.submit`. Leaving its `with` block cancels what still runs."""

    def __init__(self, size: int) -> None:
        self._changed = threading.Condition()
        self._results: list[BranchResult | None] = [None] * size
        self._order: list[int] = []
        self._deltas: list[BranchDelta] = []
        self._callbacks: list[Callable[[Round], object]] = []
        self._cancel: Callable[[int | None], None] | None = None
        self.submitted = time.perf_counter()
        self.num_dropped = 0
        """Results that came for a branch which had one: not given to anybody."""

    def __len__(self) -> int:
        return len(self._results)

    def result(self, timeout: float | None = None, *, errors: str = "raise") -> list[BranchResult]:
        """All results, in order of branches. Raises `TimedOut` after `timeout` seconds; the work goes on.

        When branches failed the first one's error is raised, after all have ended; with errors="return" it is in the
        result instead, and the others can be used.
        """
        with self._changed:
            if not self._changed.wait_for(self.done, timeout):
                raise TimedOut(f"{len(self) - len(self._order)} of {len(self)} branches still run after {timeout} s")
        results = [result for result in self._results if result is not None]
        failed = next((result.error for result in results if result.error is not None), None)
        if failed is not None and errors == "raise":
            raise failed
        return results

    def as_completed(self, timeout: float | None = None) -> Iterator[BranchResult]:
        """Results as branches end, failed ones too (`result.error`). Raises `TimedOut`, counted from this call."""
        ends = None if timeout is None else time.monotonic() + timeout
        for k in range(len(self)):
            yield self._nth(k, ends)

    def __iter__(self) -> Iterator[BranchDelta]:
        """Deltas as they come, from the round's beginning, until all branches have ended."""
        seen = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda seen=seen: len(self._deltas) > seen or self.done())  # type: ignore[misc]
                news = self._deltas[seen:]
            if not news:
                return
            yield from news
            seen += len(news)

    def cancel(self, index: int | None = None) -> None:
        """Stop one branch, or all: its result has `error` `Cancelled` and what was generated. Ended ones stay."""
        cancel = self._cancel
        if cancel is not None:
            cancel(index)

    def done(self) -> bool:
        return len(self._order) == len(self._results)

    def add_done_callback(self, callback: Callable[[Round], object]) -> None:
        """Call `callback(round)` once when all have ended, from a thread of the pool. What it raises is logged."""
        with self._changed:
            if not self.done():
                self._callbacks.append(callback)
                return
        self._call(callback)

    def __enter__(self) -> Round:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.done():
            self.cancel()

    # -- the pool's side

    def on_cancel(self, cancel: Callable[[int | None], None]) -> None:
        self._cancel = cancel

    def emit(self, index: int, attempt: int, delta: Delta) -> None:
        """News of a branch, from whichever worker runs it."""
        news = BranchDelta(
            index=index, attempt=attempt, token_ids=delta.token_ids, logprobs=delta.logprobs, text=delta.text,
            finish_reason=delta.finish_reason,
        )  # fmt: skip
        with self._changed:
            self._deltas.append(news)
            self._changed.notify_all()

    def settle(self, result: BranchResult) -> bool:
        """Set a branch's result; False when it has one already (the later one is dropped)."""
        with self._changed:
            if self._results[result.index] is not None:
                self.num_dropped += 1
                return False
            self._results[result.index] = result
            self._order.append(result.index)
            callbacks, self._callbacks = (self._callbacks, []) if self.done() else ([], self._callbacks)
            if self.done():
                self._cancel = None  # it refers to the jobs and they to this: results' sessions are to go with it
            self._changed.notify_all()
        for callback in callbacks:
            self._call(callback)
        return True

    def _call(self, callback: Callable[[Round], object]) -> None:
        """What it raises is the caller's own fault: it is told, and harms no other round of this thread."""
        try:
            callback(self)
        except Exception:
            log.exception("a callback of a round raised")

    def has(self, index: int) -> bool:
        return self._results[index] is not None

    def _nth(self, k: int, ends: float | None) -> BranchResult:
        with self._changed:
            left = None if ends is None else max(0.0, ends - time.monotonic())
            if not self._changed.wait_for(lambda: len(self._order) > k, left):
                raise TimedOut(f"{len(self) - len(self._order)} of {len(self)} branches still run")
            result = self._results[self._order[k]]
        assert result is not None
        return result


def stopped(reason: str, limit_s: float | None) -> ThawError:
    """The error of a branch that was stopped, not failed."""
    if reason == "timeout":
        return TimedOut(f"the branch did not end within {limit_s} s; it has what was generated until then")
    return Cancelled("cancelled by the caller; it has what was generated until then")
