"""Several captures or hydrates at a time: each waits for the engine and for the disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from thaw.core.errors import ThawError

WORKERS = 4
S = TypeVar("S")
T = TypeVar("T")


def each(do: Callable[[S], T], items: Sequence[S]) -> list[T | ThawError]:
    """`do` of each, in order; what it raises stands in its place."""

    def one(item: S) -> T | ThawError:
        try:
            return do(item)
        except ThawError as error:
            return error

    with ThreadPoolExecutor(WORKERS, thread_name_prefix="thaw-each") as pool:
        return list(pool.map(one, items))
