"""Several jobs as one stream: the choices of a request, their pieces with the number of the choice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from thaw.gateway.asked import SpokenPiece
from thaw.gateway.job import ReplyJob


async def merged(jobs: Sequence[ReplyJob]) -> AsyncIterator[tuple[int, Sequence[SpokenPiece] | None]]:
    """(choice, pieces that came together); (choice, None) once its pieces are over."""
    if len(jobs) == 1:
        async for some in jobs[0].follow():
            yield 0, some
        yield 0, None
        return
    queue: asyncio.Queue[tuple[int, Sequence[SpokenPiece] | None]] = asyncio.Queue()

    async def pump(number: int, job: ReplyJob) -> None:
        async for pieces in job.follow():
            queue.put_nowait((number, pieces))
        queue.put_nowait((number, None))

    pumps = [asyncio.create_task(pump(i, job)) for i, job in enumerate(jobs)]
    try:
        left = len(jobs)
        while left:
            number, news = await queue.get()
            left -= news is None
            yield number, news
    finally:
        for task in pumps:
            task.cancel()
