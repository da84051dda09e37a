"""Queues, requests and checkpoints for asyncio: views over the blocking ones (`thaw.repo.bridge`), from `thaw.aio`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from thaw.engines.base import Policy
from thaw.repo.aio import AsyncRepository, AsyncSession
from thaw.repo.bridge import Awaited, awaited, call, each, opened
from thaw.snapshot.manifest import EngineSnapshot
from thaw.snapshot.migration import Migrated
from thaw.snapshot.migration import migrate as migrate_sessions
from thaw.snapshot.outputs import OutputPiece
from thaw.snapshot.queue import DEFAULT_NUM_SEQS, RequestQueue
from thaw.snapshot.request import QueuedRequest
from thaw.snapshot.restoring import RestoredEngine
from thaw.snapshot.restoring import restore as restore_engine
from thaw.snapshot.ring import CheckpointRing
from thaw.snapshot.ring import restore_checkpoint as restore_newest
from thaw.snapshot.take import DEFAULT_NAME
from thaw.snapshot.take import snapshot as take_snapshot


class AsyncQueuedRequest(Awaited[QueuedRequest]):
    """`QueuedRequest`, awaited. What is in memory is the blocking one's: `request.sync.text`."""

    result = awaited(QueuedRequest.result)
    cancel = awaited(QueuedRequest.cancel)

    async def stream(self, offset: int = 0, *, seen: Sequence[int] | None = None) -> AsyncIterator[OutputPiece]:
        """As `QueuedRequest.stream`. Leaving it early ends the view, not the request."""
        async for piece in each(self.sync.stream(offset, seen=seen)):
            yield piece


class AsyncRequestQueue(Awaited[RequestQueue]):
    """`RequestQueue`, awaited."""

    drain = awaited(RequestQueue.drain)
    undrain = awaited(RequestQueue.undrain)
    wait = awaited(RequestQueue.wait)
    close = awaited(RequestQueue.close)

    async def submit(
        self,
        session: AsyncSession,
        prompt: str = "",
        sampling: object = None,
        *,
        token_ids: Sequence[int] | None = None,
        id: str | None = None,
        priority: int = 0,
    ) -> AsyncQueuedRequest:
        """As `RequestQueue.submit`."""
        made = await call(self.sync.submit, session, prompt, sampling, token_ids=token_ids, id=id, priority=priority)
        return AsyncQueuedRequest(made)

    def request(self, id: str) -> AsyncQueuedRequest:
        """As `RequestQueue.request`, which asks neither disk nor engine."""
        return AsyncQueuedRequest(self.sync.request(id))

    async def __aenter__(self) -> AsyncRequestQueue:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncCheckpointRing(Awaited[CheckpointRing]):
    """`CheckpointRing`, awaited."""

    checkpoint = awaited(CheckpointRing.checkpoint)
    close = awaited(CheckpointRing.close)

    async def __aenter__(self) -> AsyncCheckpointRing:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def request_queue(repo: AsyncRepository, *, max_num_seqs: int = DEFAULT_NUM_SEQS) -> AsyncRequestQueue:
    """As `RequestQueue`."""
    return AsyncRequestQueue(RequestQueue(repo.sync, max_num_seqs=max_num_seqs))


async def checkpoint_ring(queue: AsyncRequestQueue, **options: Any) -> AsyncCheckpointRing:
    """As `CheckpointRing`."""
    return AsyncCheckpointRing(await opened(CheckpointRing.close, CheckpointRing, queue, **options))


async def snapshot(
    repo: AsyncRepository, name: str = DEFAULT_NAME, *, queue: AsyncRequestQueue | None = None, replace: bool = False
) -> EngineSnapshot:
    """As `thaw.snapshot.snapshot`."""
    return await call(take_snapshot, repo, name, queue=queue, replace=replace)


async def restore(
    repo: AsyncRepository,
    name: str = DEFAULT_NAME,
    *,
    fork: bool = False,
    max_num_seqs: int | None = None,
    policy: Policy = "exact",
) -> RestoredEngine:
    """As `thaw.snapshot.restore`; its queue and sessions are blocking ones (`AsyncRequestQueue(back.queue)`)."""
    return await call(restore_engine, repo, name, fork=fork, max_num_seqs=max_num_seqs, policy=policy)


async def restore_checkpoint(
    repo: AsyncRepository, *, fork: bool = False, max_num_seqs: int | None = None, policy: Policy = "exact"
) -> RestoredEngine:
    """As `thaw.snapshot.restore_checkpoint`; see `restore`."""
    return await call(restore_newest, repo, fork=fork, max_num_seqs=max_num_seqs, policy=policy)


async def migrate(
    source: AsyncRequestQueue,
    destination: AsyncRequestQueue,
    sessions: Sequence[AsyncSession] | None = None,
    *,
    remote: str | None = None,
) -> list[Migrated]:
    """As `thaw.snapshot.migrate`."""
    wanted = None if sessions is None else [one.sync for one in sessions]
    return await call(migrate_sessions, source, destination, wanted, remote=remote)
