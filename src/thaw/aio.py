"""thaw for asyncio: the same objects, awaited.

    repo = await thaw.aio.open("runs", engine=engine)
    s = await repo.session("main")
    async for delta in s.stream("Question?"): ...
    await s.commit("asked")

A thin view: generation awaits the engine's handle, and everything that waits for a disk runs the blocking verb on a
thread. Nothing is implemented twice; `.sync` is the blocking object behind each, and may be used beside it. Cancelling
a task that awaits a generation cancels it at the next step boundary; a commit that has begun runs to its end.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from thaw.engines.base import Completion, Delta, Engine, Policy, SessionView
from thaw.repo import repository as blocking
from thaw.repo.chat import ChatResult
from thaw.repo.commit import CommitResult, Expect
from thaw.repo.group import Group
from thaw.repo.messages import Messages, Tool
from thaw.repo.report import VerifyReport
from thaw.repo.repository import PointLike, Repository
from thaw.repo.session import Session
from thaw.repo.settings import EngineSettings
from thaw.repo.stream import Stream
from thaw.store import Ref

if TYPE_CHECKING:
    from thaw.pool.aio import AsyncForkPool

T = TypeVar("T")
_END = object()


async def open(
    path: str | Path, *, engine: Engine | EngineSettings | None = None, create: bool | None = None
) -> AsyncRepository:
    """As `thaw.open`."""
    return AsyncRepository(await asyncio.to_thread(blocking.open, path, engine=engine, create=create))


async def init(path: str | Path, *, engine: Engine | EngineSettings | None = None) -> AsyncRepository:
    """As `thaw.init`."""
    return AsyncRepository(await asyncio.to_thread(blocking.init, path, engine=engine))


async def pool(*args: Any, **options: Any) -> AsyncForkPool:
    """As `thaw.ForkPool`, awaited (`thaw.pool.aio`)."""
    from thaw.pool import aio as pools

    return await pools.pool(*args, **options)


class AsyncStream(Generic[T]):
    """A generation under way: await it for the outcome, or iterate for deltas first. Closing the loop early cancels."""

    def __init__(self, start: Callable[[], Stream[T]]) -> None:
        self._start = start
        self._stream: asyncio.Task[Stream[T]] | None = None

    async def sync(self) -> Stream[T]:
        """The blocking stream; starts the work on first use."""
        if self._stream is None:
            self._stream = asyncio.ensure_future(asyncio.to_thread(self._start))
        try:
            return await asyncio.shield(self._stream)
        except asyncio.CancelledError:
            self._stream.add_done_callback(_cancel_started)
            raise

    async def result(self) -> T:
        """The outcome. When the awaiting task is cancelled, so is the work."""
        stream = await self.sync()
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        stream.handle.add_done_callback(lambda _: _call(loop, done.set))
        try:
            await done.wait()
        except asyncio.CancelledError:
            stream.cancel()
            raise
        return stream.result()

    def __await__(self) -> Generator[object, None, T]:
        return self.result().__await__()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        stream = await self.sync()
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[object]()
        threading.Thread(target=_pump, args=(stream, loop, queue), name="thaw-aio", daemon=True).start()
        try:
            while (item := await queue.get()) is not _END:
                if isinstance(item, BaseException):
                    raise item
                assert isinstance(item, Delta)
                yield item
        finally:
            if not stream.done():
                stream.cancel()


def _cancel_started(started: asyncio.Task[Stream[T]]) -> None:
    """The caller was cancelled while the work was being started: stop it once it is."""
    if not started.cancelled() and started.exception() is None:
        started.result().cancel()


def _pump(stream: Stream[T], loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[object]) -> None:
    """Carry deltas from the handle to the event loop, then the end or the error."""
    end: object = _END
    try:
        for delta in stream:
            if not _call(loop, queue.put_nowait, delta):
                return
    except BaseException as error:  # noqa: BLE001 - raised again where the deltas are awaited
        end = error
    _call(loop, queue.put_nowait, end)


def _call(loop: asyncio.AbstractEventLoop, fn: Callable[..., object], *args: object) -> bool:
    """Run `fn` in the event loop; False when the loop is closed, and nobody waits any more."""
    try:
        loop.call_soon_threadsafe(fn, *args)
    except RuntimeError:
        return False
    return True


class AsyncSession:
    """`Session`, awaited. Properties that ask the engine are on `.sync`."""

    def __init__(self, session: Session) -> None:
        self.sync = session

    async def append(
        self,
        text: str = "",
        *,
        token_ids: Sequence[int] | None = None,
        role: str | None = None,
        messages: Messages | None = None,
        tools: Sequence[Tool] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        add_generation_prompt: bool = False,
    ) -> SessionView:
        return await asyncio.to_thread(
            self.sync.append,
            text,
            token_ids=token_ids,
            role=role,
            messages=messages,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
        )

    def generate(
        self, prompt: str = "", sampling: object = None, *, token_ids: Sequence[int] | None = None
    ) -> AsyncStream[Completion]:
        """Await the completion, or iterate for deltas."""
        return AsyncStream(lambda: self.sync.stream(prompt, sampling, token_ids=token_ids))

    stream = generate

    def resume(self) -> AsyncStream[Completion]:
        return AsyncStream(self.sync.resume_stream)

    def chat(
        self,
        messages: Messages | None = None,
        sampling: object = None,
        *,
        history: Messages | None = None,
        tools: Sequence[Tool] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        keep_sampled: bool = False,
        continue_final_message: bool = False,
    ) -> AsyncStream[ChatResult]:
        """As `Session.chat`: await the `ChatResult`, or iterate for deltas."""
        return AsyncStream(
            lambda: self.sync.chat_stream(
                messages,
                sampling,
                history=history,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
                keep_sampled=keep_sampled,
                continue_final_message=continue_final_message,
            )
        )

    async def commit(
        self,
        message: str = "",
        branch: str | None = None,
        meta: Mapping[str, str] | None = None,
        expect: Expect = "parent",
    ) -> CommitResult:
        return await asyncio.shield(asyncio.to_thread(self.sync.commit, message, branch, meta, expect))

    async def fork(self, n: int, at: int | None = None, replay: bool = False) -> AsyncGroup:
        return AsyncGroup(await asyncio.to_thread(self.sync.fork, n, at, replay))

    async def adopt(self, branch: str, message: str = "") -> CommitResult:
        return await asyncio.shield(asyncio.to_thread(self.sync.adopt, branch, message))

    async def park(self) -> SessionView:
        return await asyncio.to_thread(self.sync.park)

    async def view(self) -> SessionView:
        return await asyncio.to_thread(self.sync.view)

    async def close(self) -> None:
        await asyncio.to_thread(self.sync.close)

    async def __aenter__(self) -> AsyncSession:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncGroup:
    """`Group`, awaited: one batch."""

    def __init__(self, group: Group) -> None:
        self.sync = group

    def __len__(self) -> int:
        return len(self.sync)

    def __getitem__(self, index: int) -> AsyncSession:
        return AsyncSession(self.sync[index])

    def generate(
        self,
        prompts: str | Sequence[str] = "",
        sampling: object = None,
        *,
        token_ids: Sequence[Sequence[int]] | None = None,
    ) -> AsyncStream[list[Completion]]:
        return AsyncStream(lambda: self.sync.stream(prompts, sampling, token_ids=token_ids))

    stream = generate

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: object = None,
        *,
        tools: Sequence[Tool] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        keep_sampled: bool = False,
        continue_final_message: bool = False,
    ) -> AsyncStream[list[ChatResult]]:
        """As `Group.chat`."""
        return AsyncStream(
            lambda: self.sync.chat_stream(
                messages,
                sampling,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
                keep_sampled=keep_sampled,
                continue_final_message=continue_final_message,
            )
        )

    def resume(self) -> AsyncStream[list[Completion]]:
        return AsyncStream(self.sync.resume_stream)

    async def commit(self, branch_prefix: str, message: str = "") -> list[CommitResult]:
        return await asyncio.shield(asyncio.to_thread(self.sync.commit, branch_prefix, message))

    async def close(self) -> None:
        await asyncio.to_thread(self.sync.close)

    async def __aenter__(self) -> AsyncGroup:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncRepository:
    """`Repository`, awaited, for the verbs that take time. Look-ups (log, show, diff, refs) are on `.sync`."""

    def __init__(self, repository: Repository) -> None:
        self.sync = repository

    async def session(
        self,
        point: PointLike | None = None,
        *,
        seed: int | None = None,
        salt: str | None = None,
        share_prefix: bool = False,
        policy: Policy = "exact",
    ) -> AsyncSession:
        made = await asyncio.to_thread(
            self.sync.session, point, seed=seed, salt=salt, share_prefix=share_prefix, policy=policy
        )
        return AsyncSession(made)

    async def fork(self, point: PointLike, n: int, *, replay: bool = False, policy: Policy = "exact") -> AsyncGroup:
        return AsyncGroup(await asyncio.to_thread(self.sync.fork, point, n, replay=replay, policy=policy))

    async def adopt(self, winner: AsyncSession | PointLike, branch: str) -> Ref:
        chosen = winner.sync if isinstance(winner, AsyncSession) else winner
        return await asyncio.shield(asyncio.to_thread(self.sync.adopt, chosen, branch))

    async def verify(self, point: PointLike = "HEAD", *, num_tokens: int = 16) -> VerifyReport:
        return await asyncio.to_thread(self.sync.verify, point, num_tokens=num_tokens)

    async def close(self) -> None:
        await asyncio.to_thread(self.sync.close)

    async def __aenter__(self) -> AsyncRepository:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
