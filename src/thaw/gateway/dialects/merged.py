"""Several jobs as one stream: the choices of a request, each piece with the number of its choice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from thaw.gateway.asked import SpokenPiece
from thaw.gateway.job import ReplyJob


async def merged(jobs: Sequence[ReplyJob]) -> AsyncIterator[tuple[int, SpokenPiece | None]]:
    """(choice, piece) as they come; (choice, None) once its pieces are over."""
    if len(jobs) == 1:
        async for one in jobs[0].follow():
            yield 0, one
        yield 0, None
        return
    queue: asyncio.Queue[tuple[int, SpokenPiece | None]] = asyncio.Queue()

    async def pump(number: int, job: ReplyJob) -> None:
        async for piece in job.follow():
            queue.put_nowait((number, piece))
        queue.put_nowait((number, None))

    pumps = [asyncio.create_task(pump(i, job)) for i, job in enumerate(jobs)]
    try:
        left = len(jobs)
        while left:
            number, piece = await queue.get()
            left -= piece is None
            yield number, piece
    finally:
        for task in pumps:
            task.cancel()
