"""Requests side by side. With one worker they are made by the caller's thread, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")
SMALL_REQUESTS = 16
"""Small objects that are read at a time."""


def mapped(do: Callable[[S], T], items: Sequence[S], workers: int = SMALL_REQUESTS) -> list[T]:
    """`do` of each item, in order. The first error is raised, when nothing is under way any more."""
    if workers <= 1 or len(items) <= 1:
        return [do(item) for item in items]
    with ThreadPoolExecutor(min(workers, len(items)), thread_name_prefix="thaw-remote") as pool:
        return list(pool.map(do, items))


def ahead(do: Callable[[S], T], items: Iterable[S], weigh: Callable[[S], int], room: int, workers: int) -> Iterator[T]:
    """`do` of each item, in order, computed ahead: no more than `room` of weight is under way, waits to be taken or was
    taken last, or two items: while one is used, the next is under way. Closing the iterator waits for that."""
    if workers <= 1:
        yield from map(do, items)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="thaw-remote") as pool:
        waiting: deque[tuple[int, Future[T]]] = deque()
        weight = 0
        try:
            for item in items:
                heavy = weigh(item)
                while len(waiting) > 1 and weight + heavy > room:
                    done, future = waiting.popleft()
                    yield future.result()
                    del future
                    weight -= done
                waiting.append((heavy, pool.submit(do, item)))
                weight += heavy
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            for _, future in waiting:
                future.cancel()
