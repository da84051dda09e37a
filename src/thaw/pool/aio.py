"""The pool for asyncio: the same objects, awaited.

    pool = await thaw.aio.pool("vllm", model="path/to/model", workers=2)
    results = await pool.fork(point, 16, sampling)
    async with pool.submit(point, prompts, sampling) as round:
        async for result in round.as_completed(): ...

A thin view: waiting is done on threads, `.sync` is the blocking object behind each. A task that is cancelled while it
awaits a round cancels the round.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterable
from typing import Any, TypeVar

from thaw.pool.asking import Branches
from thaw.pool.pool import ForkPool
from thaw.pool.round import Round
from thaw.pool.snapshot import Snapshot
from thaw.pool.values import BranchDelta, BranchResult

T = TypeVar("T")
_END = object()


async def pool(*args: Any, **options: Any) -> AsyncForkPool:
    """As `ForkPool`: boots or joins its workers."""
    return AsyncForkPool(await asyncio.to_thread(ForkPool, *args, **options))


class AsyncRound:
    """A round under way: await it for all results, or iterate. Leaving its `async with` cancels what still runs."""

    def __init__(self, start: Callable[[], Round]) -> None:
        self._start = start
        self._round: asyncio.Task[Round] | None = None

    async def sync(self) -> Round:
        """The blocking round; begins it on first use (a full queue is waited for)."""
        if self._round is None:
            self._round = asyncio.ensure_future(asyncio.to_thread(self._start))
        try:
            return await asyncio.shield(self._round)
        except asyncio.CancelledError:
            self._round.add_done_callback(_cancel_begun)
            raise

    async def result(self, *, errors: str = "raise") -> list[BranchResult]:
        """All results, in order; as `Round.result`. When the awaiting task is cancelled, so is the round."""
        begun = await self.sync()
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        begun.add_done_callback(lambda _: _call(loop, done.set))
        try:
            await done.wait()
        except asyncio.CancelledError:
            begun.cancel()
            raise
        return begun.result(errors=errors)

    def __await__(self) -> Generator[object, None, list[BranchResult]]:
        return self.result().__await__()

    async def as_completed(self) -> AsyncIterator[BranchResult]:
        begun = await self.sync()
        async for result in _each(begun.as_completed()):
            yield result

    async def __aiter__(self) -> AsyncIterator[BranchDelta]:
        begun = await self.sync()
        async for delta in _each(begun):
            yield delta

    async def cancel(self, index: int | None = None) -> None:
        begun = await self.sync()
        await asyncio.to_thread(begun.cancel, index)

    async def __aenter__(self) -> AsyncRound:
        await self.sync()
        return self

    async def __aexit__(self, *_: object) -> None:
        begun = await self.sync()
        if not begun.done():
            await asyncio.to_thread(begun.cancel)


class AsyncForkPool:
    """`ForkPool`, awaited, for the verbs that take time. The others are on `.sync`."""

    def __init__(self, sync: ForkPool) -> None:
        self.sync = sync

    def submit(self, point: object, branches: Branches, sampling: object = None, **how: Any) -> AsyncRound:
        """As `ForkPool.submit`; begins when it is first awaited."""
        return AsyncRound(lambda: self.sync.submit(point, branches, sampling, **how))

    async def fork(
        self, point: object, branches: Branches, sampling: object = None, *, errors: str = "raise", **how: Any
    ) -> list[BranchResult]:
        return await self.submit(point, branches, sampling, **how).result(errors=errors)

    async def snapshot(self, point: object, *, at: int | None = None) -> Snapshot:
        return await asyncio.shield(asyncio.to_thread(self.sync.snapshot, point, at=at))

    async def set_policy(self, version: str, **how: Any) -> None:
        await asyncio.shield(asyncio.to_thread(self.sync.set_policy, version, **how))

    async def add_worker(self, engine: Any = None) -> str:
        return await asyncio.shield(asyncio.to_thread(self.sync.add_worker, engine))

    async def drain(self, name: str) -> None:
        await asyncio.shield(asyncio.to_thread(self.sync.drain, name))

    async def close(self) -> None:
        await asyncio.to_thread(self.sync.close)

    async def __aenter__(self) -> AsyncForkPool:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def _each(items: Iterable[T]) -> AsyncIterator[T]:
    """What a blocking iterable yields, taken from it on a thread. Leaving early ends nothing but the view."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def pump() -> None:
        for item in items:
            if not _call(loop, queue.put_nowait, item):
                return
        _call(loop, queue.put_nowait, _END)

    threading.Thread(target=pump, name="thaw-aio", daemon=True).start()
    while (item := await queue.get()) is not _END:
        yield item


def _cancel_begun(begun: asyncio.Task[Round]) -> None:
    if not begun.cancelled() and begun.exception() is None:
        begun.result().cancel()


def _call(loop: asyncio.AbstractEventLoop, fn: Callable[..., object], *args: object) -> bool:
    """Run `fn` in the event loop; False when the loop is closed, and nobody waits any more."""
    try:
        loop.call_soon_threadsafe(fn, *args)
    except RuntimeError:
        return False
    return True
