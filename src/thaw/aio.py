"""thaw for asyncio: the same objects, awaited.

    repo = await thaw.aio.open("runs", engine=engine)
    s = await repo.session("main")
    async for delta in s.stream("Question?"): ...
    await s.commit("asked")

Whatever touches a disk or an engine has an awaited form of the same name and parameters; what a blocking object has as
a property is a method here where an engine or a disk is asked (`await s.tokens()`). Nothing is implemented twice
(`thaw.repo.bridge`); `.sync` is the blocking object behind each, and may be used beside it. Cancelling a task that
awaits a generation cancels it at the next step boundary; a commit that has begun runs to its end.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from thaw.engines import load_engine as load
from thaw.engines.base import Engine
from thaw.repo import repository as blocking
from thaw.repo.aio import AsyncGroup, AsyncRepository, AsyncSession, AsyncStream
from thaw.repo.bridge import call, opened
from thaw.repo.repository import Repository
from thaw.repo.settings import EngineSettings

if TYPE_CHECKING:
    from thaw.pool.aio import AsyncForkPool
    from thaw.serve import Served, Started
    from thaw.snapshot import EngineSnapshot, Migrated, RestoredEngine
    from thaw.snapshot.aio import AsyncCheckpointRing, AsyncRequestQueue

__all__ = [
    "AsyncGroup", "AsyncRepository", "AsyncSession", "AsyncStream", "attach", "checkpoint_ring", "clone", "down",
    "init", "load_engine", "migrate", "open", "pool", "request_queue", "restore", "restore_checkpoint", "running",
    "snapshot", "up",
]  # fmt: skip


async def open(
    path: str | Path,
    *,
    engine: Engine | EngineSettings | None = None,
    create: bool | None = None,
    namespace: str | None = None,
) -> AsyncRepository:
    """As `thaw.open`."""
    made = await opened(Repository.close, blocking.open, path, engine=engine, create=create, namespace=namespace)
    return AsyncRepository(made)


async def init(path: str | Path, *, engine: Engine | EngineSettings | None = None) -> AsyncRepository:
    """As `thaw.init`."""
    return AsyncRepository(await opened(Repository.close, blocking.init, path, engine=engine))


async def clone(url: str, path: str | Path, **options: Any) -> AsyncRepository:
    """As `thaw.clone`."""
    return AsyncRepository(await opened(Repository.close, blocking.clone, url, path, **options))


async def load_engine(name: str, /, **options: Any) -> Engine:
    """As `thaw.load_engine`. Its handles call back, and its other verbs are called through a repository or pool."""
    return await opened(Engine.close, load, name, **options)


async def attach(engine: Any, /, **options: Any) -> Engine:
    """As `thaw.attach`."""
    from thaw.engines.joining import attach as join

    return await opened(Engine.close, join, engine, **options)


async def pool(*args: Any, **options: Any) -> AsyncForkPool:
    """As `thaw.ForkPool`, awaited (`thaw.pool.aio`)."""
    from thaw.pool import aio as pools

    return await pools.pool(*args, **options)


async def up(repo: AsyncRepository, *args: Any, **options: Any) -> Started:
    """As `thaw.serve.up`. A server that is being started when the task is cancelled comes up all the same."""
    from thaw import serve

    return await call(serve.up, repo, *args, **options)


async def running(repo: AsyncRepository) -> Served | None:
    """As `thaw.serve.running`."""
    from thaw import serve

    return await call(serve.running, repo)


async def down(repo: AsyncRepository) -> tuple[Served | None, bool]:
    """As `thaw.serve.down`."""
    from thaw import serve

    return await call(serve.down, repo)


async def request_queue(repo: AsyncRepository, **options: Any) -> AsyncRequestQueue:
    """As `thaw.snapshot.RequestQueue`, awaited (`thaw.snapshot.aio`)."""
    from thaw.snapshot import aio as whole

    return whole.request_queue(repo, **options)


async def checkpoint_ring(queue: AsyncRequestQueue, **options: Any) -> AsyncCheckpointRing:
    """As `thaw.snapshot.CheckpointRing`, awaited."""
    from thaw.snapshot import aio as whole

    return await whole.checkpoint_ring(queue, **options)


async def snapshot(repo: AsyncRepository, *args: Any, **options: Any) -> EngineSnapshot:
    """As `thaw.snapshot.snapshot`."""
    from thaw.snapshot import aio as whole

    return await whole.snapshot(repo, *args, **options)


async def restore(repo: AsyncRepository, *args: Any, **options: Any) -> RestoredEngine:
    """As `thaw.snapshot.restore`; its queue and sessions are blocking ones."""
    from thaw.snapshot import aio as whole

    return await whole.restore(repo, *args, **options)


async def restore_checkpoint(repo: AsyncRepository, **options: Any) -> RestoredEngine:
    """As `thaw.snapshot.restore_checkpoint`."""
    from thaw.snapshot import aio as whole

    return await whole.restore_checkpoint(repo, **options)


async def migrate(
    source: AsyncRequestQueue, destination: AsyncRequestQueue, *args: Any, **options: Any
) -> list[Migrated]:
    """As `thaw.snapshot.migrate`."""
    from thaw.snapshot import aio as whole

    return await whole.migrate(source, destination, *args, **options)
