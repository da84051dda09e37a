"""Deltas of an engine's work, awaited, without the event loop ever waiting for a thread to start.

As `thaw.repo.bridge.each`, which starts its thread from the event loop: beside an engine in the same process that holds
the interpreter's lock, that took tens of milliseconds, in which no other stream went on.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable
from typing import Any, TypeVar

from thaw.repo.bridge import submit, wake

T = TypeVar("T")
_END = object()


async def each(items: Iterable[T]) -> AsyncIterator[T]:
    """What a blocking iterable yields, taken from it on a thread of its own; its error is raised here."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
    failed: list[BaseException] = []

    def pump() -> None:
        try:
            for item in items:
                if not wake(loop, queue.put_nowait, item):
                    return
        except BaseException as error:  # noqa: BLE001 - raised again where the items are awaited
            failed.append(error)
        wake(loop, queue.put_nowait, _END)

    submit(threading.Thread(target=pump, name="thaw-gateway-deltas", daemon=True).start)
    while (item := await queue.get()) is not _END:
        yield item
    if failed:
        raise failed[0]
