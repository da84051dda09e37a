"""A transport whose engine lives on another event loop: one of the user's own program.

An engine's client belongs to the loop that it was first used on. Everything is done there, and what it brings is
handed over to thaw's loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from thaw.engines.served.client.transport import Chunk, Submission, Transport

T = TypeVar("T")


class ForeignLoopTransport(Transport):
    """`inner`, used on the loop `home` only."""

    def __init__(self, inner: Transport, home: asyncio.AbstractEventLoop) -> None:
        self._inner, self._home, self.stays = inner, home, inner.stays

    async def connect(self) -> None:
        await self._inner.connect()
        self.mail, self.facts = self._inner.mail, self._inner.facts

    async def stream(self, submission: Submission) -> AsyncIterator[Chunk]:
        here = asyncio.get_running_loop()
        news: asyncio.Queue[Chunk | BaseException | None] = asyncio.Queue()

        def tell(item: Chunk | BaseException | None) -> None:
            if not here.is_closed():
                here.call_soon_threadsafe(news.put_nowait, item)

        async def read() -> None:
            try:
                async for chunk in self._inner.stream(submission):
                    tell(chunk)
            except BaseException as error:
                tell(error)
                raise
            tell(None)

        reading = self._there(read())
        try:
            while (item := await news.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            reading.cancel()

    async def abort(self, name: str) -> None:
        await self._done(self._inner.abort(name))

    async def collective_rpc(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        return await self._done(self._inner.collective_rpc(method, args, kwargs))

    async def reload_weights(self, folder: str) -> None:
        await self._done(self._inner.reload_weights(folder))

    async def sleep(self, level: int) -> None:
        await self._done(self._inner.sleep(level))

    async def wake(self, level: int) -> None:
        await self._done(self._inner.wake(level))

    async def adapters(self) -> dict[str, str]:
        return await self._done(self._inner.adapters())

    async def load_adapter(self, name: str, folder: str) -> None:
        await self._done(self._inner.load_adapter(name, folder))

    async def post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        return await self._done(self._inner.post(route, body))

    async def close(self) -> None:
        await self._inner.close()

    def _there(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Begin it on the other loop."""
        return asyncio.run_coroutine_threadsafe(work, self._home)

    async def _done(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(self._there(work))
