"""Several jobs as one stream: the choices of a request, each delta with the number of its choice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from thaw.engines.base import Delta
from thaw.gateway.job import ReplyJob


async def merged(jobs: Sequence[ReplyJob]) -> AsyncIterator[tuple[int, Delta | None]]:
    """(choice, delta) as they come; (choice, None) once its deltas are over."""
    queue: asyncio.Queue[tuple[int, Delta | None]] = asyncio.Queue()

    async def pump(number: int, job: ReplyJob) -> None:
        async for delta in job.follow():
            queue.put_nowait((number, delta))
        queue.put_nowait((number, None))

    pumps = [asyncio.create_task(pump(i, job)) for i, job in enumerate(jobs)]
    try:
        left = len(jobs)
        while left:
            number, delta = await queue.get()
            left -= delta is None
            yield number, delta
    finally:
        for task in pumps:
            task.cancel()
