"""Repositories, sessions and groups for asyncio: views over `thaw.repo.bridge`. Their door is `thaw.aio`.

What a blocking object has as a property is a method here where an engine or a disk is asked: `await session.tokens()`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from thaw.engines.base import Delta
from thaw.repo.bridge import Awaited, Begun, asked, awaited, awaited_as, call, each, opened
from thaw.repo.group import Group
from thaw.repo.repository import PointLike, Repository
from thaw.repo.session import Session
from thaw.repo.stream import Stream
from thaw.store import Ref
from thaw.weights import WeightsBook

P = ParamSpec("P")
T = TypeVar("T")


class AsyncStream(Begun[Stream[T]], Generic[T]):
    """A generation under way: await it for the outcome, or iterate for deltas first. Closing the loop early cancels."""

    async def result(self) -> T:
        """The outcome. When the awaiting task is cancelled, so is the work."""
        return (await self.ended()).result()

    def __await__(self) -> Generator[object, None, T]:
        return self.result().__await__()

    async def cancel(self) -> None:
        """Stop at the next step boundary; the session keeps the tokens it has."""
        (await self.sync()).cancel()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        stream = await self.sync()
        try:
            async for delta in each(stream):
                yield delta
        finally:
            if not stream.done():
                stream.cancel()


def streamed(
    method: Callable[Concatenate[Any, P], Stream[T]],
) -> Callable[Concatenate[Any, P], AsyncStream[T]]:
    """The awaited form of what streams: await it, or iterate."""
    name = method.__name__

    def verb(self: Any, /, *args: P.args, **options: P.kwargs) -> AsyncStream[T]:
        return AsyncStream(lambda: getattr(self.sync, name)(*args, **options))

    verb.__doc__ = f"{method.__doc__ or ''}\n\nAwait it for the outcome, or iterate for deltas.".strip()
    verb.__wrapped__ = method  # type: ignore[attr-defined]
    return verb


class AsyncSession(Awaited[Session]):
    """`Session`, awaited."""

    tokens = asked(Session, lambda session: session.tokens)
    num_tokens = asked(Session, lambda session: session.num_tokens)
    num_kv = asked(Session, lambda session: session.num_kv)
    turns = asked(Session, lambda session: session.turns)
    text = asked(Session, lambda session: session.text)
    messages = asked(Session, lambda session: session.messages)
    seed = asked(Session, lambda session: session.seed)
    proof = asked(Session, lambda session: session.proof)
    view = awaited(Session.view)
    trajectory = awaited(Session.trajectory)
    encode = awaited(Session.encode)
    append = awaited(Session.append)
    keep_points = awaited(Session.keep_points)
    keep_stale_kv = awaited(Session.keep_stale_kv)
    generate = stream = streamed(Session.stream)
    resume = resume_stream = streamed(Session.resume_stream)
    chat = chat_stream = streamed(Session.chat_stream)
    commit = awaited(Session.commit)
    snapshot = awaited(Session.snapshot)
    committed = awaited(Session.committed)
    adopt = awaited(Session.adopt)
    park = awaited(Session.park)
    reparent = awaited(Session.reparent)
    close = awaited(Session.close)

    async def fork(self, n: int, at: int | None = None, replay: bool = False) -> AsyncGroup:
        """As `Session.fork`."""
        return AsyncGroup(await opened(Group.close, self.sync.fork, n, at, replay))

    async def reread(self, at: int) -> AsyncSession:
        """As `Session.reread`."""
        return AsyncSession(await opened(Session.close, self.sync.reread, at))

    async def __aenter__(self) -> AsyncSession:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncGroup(Awaited[Group]):
    """`Group`, awaited: one batch."""

    proofs = asked(Group, lambda group: group.proofs)
    generate = stream = streamed(Group.stream)
    chat = chat_stream = streamed(Group.chat_stream)
    resume = resume_stream = streamed(Group.resume_stream)
    commit = awaited(Group.commit)
    close = awaited(Group.close)

    def __len__(self) -> int:
        return len(self.sync)

    def __getitem__(self, index: int) -> AsyncSession:
        return AsyncSession(self.sync[index])

    def __iter__(self) -> Iterator[AsyncSession]:
        return map(AsyncSession, self.sync)

    async def __aenter__(self) -> AsyncGroup:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncWeights(Awaited[WeightsBook]):
    """`WeightsBook`, awaited."""

    add = awaited(WeightsBook.add)
    list = awaited(WeightsBook.list)
    show = awaited(WeightsBook.show)
    rm = awaited(WeightsBook.rm)
    checkout = awaited(WeightsBook.checkout)
    model = awaited(WeightsBook.model)


class AsyncRepository(Awaited[Repository]):
    """`Repository`, awaited. Its refs and points are the blocking one's values."""

    engine = asked(Repository, lambda repo: repo.engine, "The engine; boots it when it was given by name.")
    session = awaited_as(Repository.session, AsyncSession, Session.close)
    fork = awaited_as(Repository.fork, AsyncGroup, Group.close)
    drain = awaited(Repository.drain)
    undrain = awaited(Repository.undrain)
    sleep = awaited(Repository.sleep)
    wake = awaited(Repository.wake)
    namespaces = awaited(Repository.namespaces)
    resolve = awaited(Repository.resolve)
    at = awaited(Repository.at)
    log = awaited(Repository.log)
    show = awaited(Repository.show)
    diff = awaited(Repository.diff)
    match = awaited(Repository.match)
    branches = awaited(Repository.branches)
    tags = awaited(Repository.tags)
    branch = awaited(Repository.branch)
    tag = awaited(Repository.tag)
    delete_branch = awaited(Repository.delete_branch)
    delete_tag = awaited(Repository.delete_tag)
    rename = awaited(Repository.rename)
    reflog = awaited(Repository.reflog)
    undo = awaited(Repository.undo)
    stats = awaited(Repository.stats)
    remotes = awaited(Repository.remotes)
    add_remote = awaited(Repository.add_remote)
    remove_remote = awaited(Repository.remove_remote)
    push = awaited(Repository.push)
    fetch = awaited(Repository.fetch)
    pull = awaited(Repository.pull)
    remote_gc = awaited(Repository.remote_gc)
    forget_remote = awaited(Repository.forget_remote)
    rebase = awaited(Repository.rebase)
    verify = awaited(Repository.verify)
    encode_chat = awaited(Repository.encode_chat)
    require_room = awaited(Repository.require_room)
    gc = awaited(Repository.gc)
    fsck = awaited(Repository.fsck)
    engine_settings = awaited(Repository.engine_settings)
    close = awaited(Repository.close)

    @property
    def path(self) -> Path:
        return self.sync.path

    @property
    def weights(self) -> AsyncWeights:
        """As `Repository.weights`, which asks no disk."""
        return AsyncWeights(self.sync.weights)

    @property
    def namespace(self) -> str:
        """The namespace that it shows; "" is the default one."""
        return self.sync.namespace

    def within(self, namespace: str) -> AsyncRepository:
        """As `Repository.within`, which asks neither disk nor engine."""
        return AsyncRepository(self.sync.within(namespace))

    async def adopt(self, winner: AsyncSession | Session | PointLike, branch: str) -> Ref:
        """As `Repository.adopt`."""
        return await call(self.sync.adopt, winner, branch)

    async def __aenter__(self) -> AsyncRepository:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
