"""An event loop on a thread of its own. All that the client of one engine knows is owned by it: every verb is a
coroutine there, and its caller waits on the caller's own thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from thaw.core.errors import EngineDied
from thaw.engines.promise import Promise

T = TypeVar("T")


class LoopThread:
    """`name` is the engine's. `inner` runs until `stop`; `closed`: nothing new is begun."""

    def __init__(self, name: str) -> None:
        self.inner = asyncio.new_event_loop()
        self.closed = False
        self._name = name
        self._tasks: set[asyncio.Task[Any]] = set()
        threading.Thread(target=self._serve, name=f"thaw-{name}", daemon=True).start()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the loop and wait; a call from the loop's own thread would never end."""
        if self.closed:
            work.close()
            raise self._gone()
        return asyncio.run_coroutine_threadsafe(work, self.inner).result()

    def begin(self, work: Callable[[Promise[T]], Coroutine[Any, Any, T]]) -> Promise[T]:
        """Run on the loop; what comes of it settles the promise, which `work` is given to emit to."""
        promise: Promise[T] = Promise()

        async def run() -> None:
            try:
                promise.settle(await work(promise))
            except asyncio.CancelledError:
                promise.settle(error=EngineDied(f"engine {self._name} was closed while this was under way"))
            except BaseException as error:  # noqa: BLE001 - handed to the caller
                promise.settle(error=error)

        if self.closed:
            raise self._gone()
        self.inner.call_soon_threadsafe(self.spawn, run)
        return promise

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Begin it, from the loop's own thread. Nobody waits for it; `end` ends it."""
        task = self.inner.create_task(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def end(self) -> None:
        """Cancel all that was begun, and wait until it has ended."""
        self.closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def stop(self) -> None:
        """The loop and its thread end, after what stands in the loop's queue already."""
        self.inner.call_soon_threadsafe(self.inner.stop)

    def _gone(self) -> EngineDied:
        return EngineDied(f"engine {self._name} is closed; load it again")

    def _serve(self) -> None:
        asyncio.set_event_loop(self.inner)
        try:
            self.inner.run_forever()
        finally:
            self.inner.run_until_complete(self.inner.shutdown_asyncgens())
            self.inner.close()


async def soon(fn: Callable[[], T]) -> T:
    """A plain function as work for the loop."""
    return fn()
