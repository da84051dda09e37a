"""The one bridge from thaw's blocking objects to asyncio: verbs run on threads, and what is under way is awaited.

    class AsyncThing(Awaited[Thing]):
        size = awaited(Thing.size)            # the same parameters, awaited
        fork = awaited_as(Thing.fork, AsyncThing, close)

Nothing is implemented twice: each awaited form calls the blocking one of `sync`, with its parameters. A task that is
cancelled while a verb has not begun takes it back; one that has begun runs to its end, and what it opened for nobody is
closed. Views among the arguments stand for what they show.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import os
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

from thaw.core.errors import ThawError

MAX_THREADS = 128
"""Verbs that wait at once; more wait for a thread."""
STARTERS = 4
"""Threads that do nothing but start others."""
MAX_IDLE = 32
IDLE_S = 10.0
"""So many threads of streams that are over wait so long for another stream, which then need not wait for a thread."""
P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")
U = TypeVar("U")
_END = object()
_threads: list[ThreadPoolExecutor] = []
_starters: list[ThreadPoolExecutor] = []
_idle: list[queue.SimpleQueue[Callable[[], object]]] = []
"""What threads of streams that are over wait at, the last one first."""


class Work(Protocol):
    """What a blocking verb began, and others may wait for."""

    def done(self) -> bool: ...
    def cancel(self) -> None: ...
    def add_done_callback(self, callback: Callable[[Any], object], /) -> None: ...


W = TypeVar("W", bound=Work)


def submit(do: Callable[[], T]) -> Future[T]:
    """Begin a blocking call on a thread of the bridge, with the caller's context variables."""
    if not _threads:
        _threads.append(ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="thaw-aio"))
    return _threads[0].submit(contextvars.copy_context().run, do)


def _run_beside(do: Callable[[], object]) -> Future[None] | None:
    """Run `do` on a thread of its own: one that has nothing to do, else a new one, whose start is returned."""
    try:
        _idle.pop().put(do)
    except IndexError:
        return _start(threading.Thread(target=_run_each, args=([do],), name="thaw-aio", daemon=True))
    return None


def _start(thread: threading.Thread) -> Future[None]:
    """Start a thread beside the event loop, which would wait until it runs: beside an engine that holds the
    interpreter's lock that is long. Verbs that fill all threads do not hold it up."""
    if not _starters:
        _starters.append(ThreadPoolExecutor(STARTERS, thread_name_prefix="thaw-aio-start"))
    return _starters[0].submit(thread.start)


def _run_each(first: list[Callable[[], object]]) -> None:
    """A thread's life: what it was started for, then what comes while it waits. What is over is not held."""
    mine: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
    first.pop()()
    while len(_idle) < MAX_IDLE:
        _idle.append(mine)
        try:
            mine.get(timeout=IDLE_S)()
        except queue.Empty:
            if _gives_up(mine):
                return
            mine.get()()


def _gives_up(mine: queue.SimpleQueue[Callable[[], object]]) -> bool:
    """False where somebody has chosen this thread at this moment."""
    try:
        _idle.remove(mine)
    except ValueError:
        return False
    return True


os.register_at_fork(after_in_child=_threads.clear)
os.register_at_fork(after_in_child=_starters.clear)
os.register_at_fork(after_in_child=_idle.clear)


async def call(do: Callable[..., T], /, *args: Any, **options: Any) -> T:
    """A blocking call, awaited."""
    return await _ended(_submit(do, args, options))


async def opened(discard: Callable[[T], object], do: Callable[..., T], /, *args: Any, **options: Any) -> T:
    """As `call`; `discard` closes an outcome that came when nobody waited any more."""
    begun = _submit(do, args, options)
    try:
        return await _ended(begun)
    except asyncio.CancelledError:
        begun.add_done_callback(functools.partial(_discard, discard))
        raise


def _submit(do: Callable[..., T], args: Iterable[object], options: Mapping[str, object]) -> Future[T]:
    return submit(functools.partial(do, *map(shown, args), **{name: shown(value) for name, value in options.items()}))


async def _ended(begun: Future[T]) -> T:
    return await asyncio.wrap_future(begun)


def _discard(discard: Callable[[T], object], begun: Future[T]) -> None:
    if not begun.cancelled() and begun.exception() is None:
        with contextlib.suppress(ThawError):
            discard(begun.result())


class Awaited(Generic[S]):
    """`sync`, awaited. The blocking object may be used beside it. Leaving its `async with` closes it."""

    def __init__(self, sync: S) -> None:
        self.sync = sync

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.sync!r}>"


def shown(value: object) -> object:
    """What a view shows; any other value as it is."""
    return value.sync if isinstance(value, Awaited) else value


def awaited(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """The awaited form of a verb: the same parameters, outcome and errors."""
    name = method.__name__

    @functools.wraps(method)
    async def verb(self: Any, /, *args: P.args, **options: P.kwargs) -> T:
        return await call(getattr(self.sync, name), *args, **options)

    return verb


def awaited_as(
    method: Callable[Concatenate[Any, P], T], wrap: Callable[[T], U], discard: Callable[[T], object]
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, U]]:
    """As `awaited`, the outcome wrapped. `discard`: how to close one that nobody waits for any more."""
    name = method.__name__

    @functools.wraps(method)
    async def verb(self: Any, /, *args: P.args, **options: P.kwargs) -> U:
        return wrap(await opened(discard, getattr(self.sync, name), *args, **options))

    return verb


def asked(of: type[S], ask: Callable[[S], T], doc: str = "") -> Callable[[Any], Coroutine[Any, Any, T]]:
    """The awaited form of a property."""

    async def verb(self: Awaited[S]) -> T:
        return await call(ask, self.sync)

    verb.__doc__ = doc or f"As the property of `{of.__name__}`."
    return verb


class Begun(Generic[W]):
    """Work that begins when it is first awaited. When the awaiting task is cancelled, so is the work."""

    def __init__(self, start: Callable[[], W]) -> None:
        self._start = start
        self._begun: Future[W] | None = None

    async def sync(self) -> W:
        """The blocking object; begins the work on first use."""
        if self._begun is None:
            self._begun = submit(self._start)
        try:
            return await asyncio.shield(asyncio.wrap_future(self._begun))
        except asyncio.CancelledError:
            if not self._begun.cancel():
                self._begun.add_done_callback(functools.partial(_discard, lambda work: work.cancel()))
            raise

    async def ended(self) -> W:
        """The blocking object, once it is done."""
        work = await self.sync()
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        work.add_done_callback(lambda _: wake(loop, done.set))
        try:
            await done.wait()
        except asyncio.CancelledError:
            work.cancel()
            raise
        return work

    async def done(self) -> bool:
        return (await self.sync()).done()

    async def add_done_callback(self, callback: Callable[[W], object]) -> None:
        """Call `callback` with the blocking object, in this event loop, once it is done."""
        loop = asyncio.get_running_loop()
        (await self.sync()).add_done_callback(lambda work: wake(loop, callback, work))

    async def __aenter__(self: U) -> U:
        await self.sync()  # type: ignore[attr-defined]
        return self

    async def __aexit__(self, *_: object) -> None:
        work = await self.sync()
        if not work.done():
            await call(work.cancel)


class _Mail(Generic[T]):
    """From one thread to one task of an event loop, which is woken once for all that comes while it does not wait."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[T] = deque()
        self._arrived = asyncio.Event()
        self._waits = False

    def put(self, item: T) -> bool:
        """From the thread; False when the loop is closed, and nobody waits any more."""
        self._items.append(item)
        if not self._waits:
            return not self._loop.is_closed()
        self._waits = False
        return wake(self._loop, self._arrived.set)

    async def get(self) -> T:
        while not self._items:
            self._arrived.clear()
            self._waits = True
            if not self._items:  # else it came before `put` could see that somebody waits
                await self._arrived.wait()
        self._waits = False
        return self._items.popleft()


async def each(items: Iterable[T]) -> AsyncIterator[T]:
    """What a blocking iterable yields, taken from it on a thread of its own; its error is raised here.

    Leaving early ends nothing but the view."""
    mail: _Mail[Any] = _Mail()
    failed: list[BaseException] = []

    def pump() -> None:
        try:
            for item in items:
                if not mail.put(item):
                    return
        except BaseException as error:  # noqa: BLE001 - raised again where the items are awaited
            failed.append(error)
        mail.put(_END)

    def started(begun: Future[None]) -> None:
        error = begun.exception()
        if error is not None:
            failed.append(error)
            mail.put(_END)

    beginning = _run_beside(pump)
    if beginning is not None:
        beginning.add_done_callback(started)
    while (item := await mail.get()) is not _END:
        yield item
    if failed:
        raise failed[0]


def wake(loop: asyncio.AbstractEventLoop, do: Callable[..., object], *args: object) -> bool:
    """Run `do` in the event loop; False when the loop is closed, and nobody waits any more."""
    try:
        loop.call_soon_threadsafe(do, *args)
    except RuntimeError:
        return False
    return True
