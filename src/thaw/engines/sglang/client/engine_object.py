"""In process: an `sglang.Engine` of the user's own program. Its scheduler is a process of its own; its front end lives
on one event loop of this one.

`engine.generate` runs that loop for as long as the call takes, an `async` program runs it all the time. So whatever
thaw asks is begun on that loop; while thaw waits and nobody else runs the loop, a thread does. Between verbs it is the
caller's again. A call of the caller's that begins while thaw's thread runs the loop is refused by Python ("already
running"): so wait for a verb before the next call of the engine's own.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import AsyncIterator, Coroutine
from typing import Any, ClassVar, TypeVar

import msgspec

from thaw.core.canonical import prepare
from thaw.core.errors import EngineDied, InvalidRequest, NotFound, TimedOut, Unsupported
from thaw.engines.served.client.foreign_loop import ForeignLoopTransport
from thaw.engines.served.client.http import HELLO_LIMIT_S
from thaw.engines.served.client.mailbox_check import shared_mail
from thaw.engines.served.client.transport import Chunk, Submission, Transport
from thaw.engines.served.http_errors import error_text
from thaw.engines.sglang.client import wire
from thaw.engines.sglang.client.engine import RELEASE, RESUME

T = TypeVar("T")
PAUSE_S = 0.002
"""How often a loop is looked at that its owner runs."""
STEP_S = 0.0005
"""How often the thread is looked at that is about to let go of a loop."""
WHO = "this sglang.Engine"


class EngineObjectTransport(ForeignLoopTransport):
    """The `Engine` stays when this ends."""

    always_served: ClassVar[bool] = False

    def __init__(self, engine: Any) -> None:
        home = home_of(engine)
        super().__init__(FrontEnd(engine.tokenizer_manager), home)
        self._driver = LoopDriver(home)

    async def connect(self) -> None:
        await self._done(self._inner.connect())
        self.mail, self.facts = self._inner.mail, self._inner.facts

    async def close(self) -> None:
        await asyncio.to_thread(self._driver.close)

    async def stream(self, submission: Submission) -> AsyncIterator[Chunk]:
        try:
            async with contextlib.aclosing(super().stream(submission)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    yield chunk
        finally:
            await self._driver.let_go()

    def _there(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return self._driver.wait_for(super()._there(work))

    async def _done(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await super()._done(work)
        finally:
            await self._driver.let_go()


class FrontEnd(Transport):
    """SGLang's own front end (its tokenizer manager), used on its own loop only."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    async def connect(self) -> None:
        try:
            said = wire.facts(await asyncio.wait_for(self._first(wire.hello()), HELLO_LIMIT_S))
        except (TimeoutError, asyncio.TimeoutError):
            raise TimedOut(f"{WHO} did not answer within {HELLO_LIMIT_S:.0f} s") from None
        if "mail" not in said:
            raise NotFound(f'{WHO} runs without thaw\'s cache: make it with Engine(radix_cache_backend="thaw", …)')
        self.mail, self.facts = shared_mail(said, WHO)

    async def _first(self, fields: dict[str, Any]) -> wire.StreamEvent:
        async for out in self._generate(fields):
            return _read(out)
        raise EngineDied(f"{WHO} ended a request without an answer")

    def _generate(self, fields: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        from sglang.srt.managers.io_struct import GenerateReqInput

        outs: AsyncIterator[dict[str, Any]] = self._manager.generate_request(GenerateReqInput(**fields), None)
        return outs

    async def stream(self, submission: Submission) -> AsyncIterator[Chunk]:
        seen = 0
        try:
            async for out in self._generate(wire.request(submission)):
                news = _read(out)
                meta = news.meta_info or wire.Meta()
                yield wire.chunk(news, meta, seen)
                seen = max(seen, meta.completion_tokens)
        except ValueError as error:
            raise InvalidRequest(f"SGLang refused the request: {error_text(error)}") from None

    async def abort(self, name: str) -> None:
        """Ask for its end; the stream then ends by itself, with what the engine says."""
        self._manager.abort_request(name)

    async def post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """What the server's route of that name stands for. Raises `InvalidRequest` when SGLang says no."""
        if route == "/flush_cache":
            done = await self._manager.flush_cache()
            success, message = done.success, done.message
        elif route == "/update_weights_from_disk":
            from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

            success, message, _ = await self._manager.update_weights_from_disk(UpdateWeightFromDiskReqInput(**body))
        elif route in (RELEASE, RESUME):
            from sglang.srt.managers import io_struct

            kind = io_struct.ReleaseMemoryOccupationReqInput
            if route == RESUME:
                kind = io_struct.ResumeMemoryOccupationReqInput
            await getattr(self._manager, route[1:])(kind(**body), None)
            return {}
        else:
            return await super().post(route, body)
        if not success:
            raise InvalidRequest(f"SGLang refused {route[1:]}: {message or 'it gave no reason'}")
        return {"success": True, "message": message}

    async def close(self) -> None:
        return


class LoopDriver:
    """A thread that runs a loop which nobody runs, while somebody waits for what was begun on it."""

    def __init__(self, home: asyncio.AbstractEventLoop) -> None:
        self._home = home
        self._wake = threading.Condition()
        self._waited_for: set[concurrent.futures.Future[Any]] = set()
        self._closed = False
        self._has_it = False
        self._thread = threading.Thread(target=self._serve, name="thaw-sglang-loop", daemon=True)
        self._thread.start()

    def wait_for(self, future: concurrent.futures.Future[T]) -> concurrent.futures.Future[T]:
        """Have the loop run until `future` is done."""
        with self._wake:
            self._waited_for.add(future)
            self._wake.notify()
        future.add_done_callback(self._done)
        return future

    async def let_go(self) -> None:
        """Until the loop is its owner's again (who may call as soon as a verb has ended), or wanted anew."""
        while self._has_it and not self._is_wanted():
            await asyncio.sleep(STEP_S)

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._tell()
        self._thread.join()

    def _done(self, future: concurrent.futures.Future[Any]) -> None:
        with self._wake:
            self._waited_for.discard(future)
        self._tell()

    def _tell(self) -> None:
        """Perhaps the loop may be let go, after what stands in its queue already (a request that is cancelled)."""
        if not self._home.is_closed():
            self._home.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        if not self._is_wanted():
            self._home.call_soon(self._let_go)

    def _let_go(self) -> None:
        """Stop the loop where this thread runs it; its owner's run is not ours to stop."""
        if threading.current_thread() is self._thread and not self._is_wanted():
            self._home.stop()

    def _is_wanted(self) -> bool:
        with self._wake:
            return bool(self._waited_for) and not self._closed

    def _serve(self) -> None:
        while self._wait():
            if self._home.is_closed():
                self._give_up()
            elif self._home.is_running() or not self._run():
                with self._wake:
                    self._has_it = False
                    self._wake.wait_for(lambda: self._closed or not self._waited_for, PAUSE_S)

    def _wait(self) -> bool:
        """Until the loop is wanted, and from then on it is this thread's; False when this ends."""
        with self._wake:
            self._has_it = False
            self._wake.wait_for(lambda: self._waited_for or self._closed)
            self._has_it = not self._closed
            return self._has_it

    def _run(self) -> bool:
        """Run the loop until nobody wants it. False: its owner was there first."""
        self._tell()  # whoever wanted it may have got it from a run of the owner's, just now
        try:
            self._home.run_forever()
        except RuntimeError:
            return False
        return True

    def _give_up(self) -> None:
        with self._wake:
            left, self._waited_for = self._waited_for, set()
        for future in left:
            if not future.done():
                future.set_exception(EngineDied(f"the event loop of {WHO} was closed; make a new Engine"))


def home_of(engine: Any) -> asyncio.AbstractEventLoop:
    """The loop that it belongs to: the one of its first request, else the one that it was made for. Raises
    `InvalidRequest` where thaw could not wait for it."""
    manager = engine.tokenizer_manager
    if manager is None:
        raise Unsupported(f"{WHO} has no front end here: attach on the first node, where requests are made")
    home: asyncio.AbstractEventLoop = manager.event_loop or engine.loop
    if home.is_closed():
        raise InvalidRequest(f"the event loop that {WHO} was used on is closed; make a new Engine")
    try:
        here = asyncio.get_running_loop()
    except RuntimeError:
        return home
    if here is home:
        raise InvalidRequest(
            f"{WHO} runs on the event loop that attach was called on, and would wait for itself; "
            "call it on another thread: await asyncio.to_thread(thaw.attach, engine)"
        )
    if manager.event_loop is None:
        raise InvalidRequest(
            f"{WHO} has answered no request yet, so which event loop it belongs to is not known; await one "
            "async_generate first, then: await asyncio.to_thread(thaw.attach, engine)"
        )
    return home


def _read(out: dict[str, Any]) -> wire.StreamEvent:
    try:
        prepare(wire.StreamEvent)
        return msgspec.convert(out, wire.StreamEvent)
    except msgspec.ValidationError as error:
        raise EngineDied(f"SGLang sent what is not known: {error}") from None
