"""The pool for asyncio: the same objects, awaited.

    pool = await thaw.aio.pool("vllm", model="path/to/model", workers=2)
    results = await pool.fork(point, 16, sampling)
    async with pool.submit(point, prompts, sampling) as round:
        async for result in round.as_completed(): ...

A thin view over `thaw.repo.bridge`: waiting is done on threads, `.sync` is the blocking object behind each. A task that
is cancelled while it awaits a round cancels the round.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator
from typing import Any

from thaw.pool.arguments import Branches
from thaw.pool.pool import ForkPool
from thaw.pool.round import Round
from thaw.pool.session import PoolSession
from thaw.pool.values import BranchDelta, BranchResult
from thaw.repo.aio import AsyncSession
from thaw.repo.bridge import Awaited, Begun, asked, awaited, call, each, opened, shown


async def pool(*args: Any, **options: Any) -> AsyncForkPool:
    """As `ForkPool`: boots or joins its workers. `repo` may be an `AsyncRepository`."""
    return AsyncForkPool(await opened(ForkPool.close, ForkPool, *args, **options))


class AsyncRound(Begun[Round]):
    """A round under way: await it for all results, or iterate. Leaving its `async with` cancels what still runs."""

    async def result(self, *, errors: str = "raise") -> list[BranchResult]:
        """All results, in order; as `Round.result`. When the awaiting task is cancelled, so is the round."""
        return (await self.ended()).result(errors=errors)

    def __await__(self) -> Generator[object, None, list[BranchResult]]:
        return self.result().__await__()

    async def as_completed(self, timeout: float | None = None) -> AsyncIterator[BranchResult]:
        """As `Round.as_completed`."""
        begun = await self.sync()
        async for result in each(begun.as_completed(timeout)):
            yield result

    async def __aiter__(self) -> AsyncIterator[BranchDelta]:
        begun = await self.sync()
        async for delta in each(begun):
            yield delta

    async def cancel(self, index: int | None = None) -> None:
        """As `Round.cancel`."""
        begun = await self.sync()
        await call(begun.cancel, index)

    async def __aenter__(self) -> AsyncRound:
        await self.sync()
        return self


class AsyncForkPool(Awaited[ForkPool]):
    """`ForkPool`, awaited. A session of `thaw.aio` is a point as well."""

    info = asked(ForkPool, lambda pool: pool.info)
    workers = asked(ForkPool, lambda pool: pool.workers)
    policy_version = asked(ForkPool, lambda pool: pool.policy_version)
    snapshot = awaited(ForkPool.snapshot)
    encode = awaited(ForkPool.encode)
    decode = awaited(ForkPool.decode)
    render_chat = awaited(ForkPool.render_chat)
    set_policy = awaited(ForkPool.set_policy)
    add_worker = awaited(ForkPool.add_worker)
    drain = awaited(ForkPool.drain)
    stats = awaited(ForkPool.stats)
    close = awaited(ForkPool.close)

    def submit(self, point: object, branches: Branches, sampling: object = None, **how: Any) -> AsyncRound:
        """As `ForkPool.submit`; begins when it is first awaited."""
        return AsyncRound(lambda: self.sync.submit(shown(point), branches, sampling, **how))

    async def fork(
        self, point: object, branches: Branches, sampling: object = None, *, errors: str = "raise", **how: Any
    ) -> list[BranchResult]:
        """As `ForkPool.fork`."""
        return await self.submit(point, branches, sampling, **how).result(errors=errors)

    async def session(self, point: object = None, *, seed: int | None = None, at: int | None = None) -> AsyncSession:
        """As `ForkPool.session`."""
        made: PoolSession = await opened(PoolSession.close, self.sync.session, point, seed=seed, at=at)
        return AsyncSession(made)

    async def __aenter__(self) -> AsyncForkPool:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
