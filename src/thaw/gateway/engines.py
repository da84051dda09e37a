"""The gateway's engines: one or several that run the same model, over one repository.

Each has a view of the repository of its own. A request is placed once its tokens are known: at the engine that has most
of them open, else at the one with the fewest running requests. One that stops is taken out; what ran there runs again
on another one, from what is stored, and what has an address or a command is brought back meanwhile.

Used by one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from thaw.core.errors import EngineDied, InvalidRequest, NotFound, Refused, ThawError
from thaw.core.identity import compare
from thaw.engines.base import Engine, EngineInfo
from thaw.engines.registry import kind_of
from thaw.gateway.problems import RETRY_AFTER_S, ApiError
from thaw.gateway.upkeep import ProcessUpkeep
from thaw.repo.aio import AsyncRepository
from thaw.repo.bridge import call
from thaw.repo.repository import Repository
from thaw.repo.repository import open as open_repository

REJOIN_S = 600.0
"""How long requests wait while no engine is up."""
Reconnect: TypeAlias = Callable[[], Engine]
"""Joins or boots the engine that takes the place of one that died."""
log = logging.getLogger("thaw.gateway")


class ServingEngine:
    """One of them, and the one that takes its place when it dies. `running`: requests that it has."""

    def __init__(self, number: int, repo: AsyncRepository, reconnect: Reconnect | None, *, own: bool) -> None:
        self.number = number
        self.repo = repo
        self.running = 0
        self.num_placed = 0
        self.is_up = True
        self.num_restarts = 0
        self._reconnect = reconnect
        _keep_up_elsewhere(repo)
        self._own: list[AsyncRepository] = [repo] if own else []
        self._replaced: list[Engine] = []
        self._within: dict[str, AsyncRepository] = {}

    @property
    def engine(self) -> Engine:
        return self.repo.sync.engine

    def memory(self, *, running: bool) -> str:
        return memory_of(self.engine.info, running=running)

    @property
    def can_come_back(self) -> bool:
        return self.is_up or self._reconnect is not None

    def within(self, namespace: str) -> AsyncRepository:
        if not namespace:
            return self.repo
        if namespace not in self._within:
            self._within[namespace] = self.repo.within(namespace)
        return self._within[namespace]

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    async def replace(self, like: Engine | None) -> None:
        """Raises what joining or booting raises, and `InvalidRequest` where it does not run the model of `like`."""
        assert self._reconnect is not None
        engine = await call(self._reconnect)
        self._replaced.append(engine)
        if like is not None:
            await call(_require_same, like, engine, self.number)
        repo = AsyncRepository(await call(open_repository, self.repo.path, engine=engine, create=False))
        _keep_up_elsewhere(repo)
        self._own.append(repo)
        self.repo, self.is_up, self.num_restarts = repo, True, self.num_restarts + 1
        self._within.clear()

    async def close(self) -> None:
        for engine in self._replaced:
            await call(engine.close)
        for repo in self._own:
            await repo.close()


class ServingEngines:
    """All of them. `on_lost` is called when one is taken out, before anything else may be placed there."""

    def __init__(
        self,
        repo: Repository,
        reconnect: Reconnect | None,
        others: Sequence[tuple[Engine, Reconnect | None]],
        on_lost: Callable[[ServingEngine], None],
        spread: int,
    ) -> None:
        """The first is `repo`'s own. `spread`: see `GatewaySettings`. Raises `InvalidRequest` for another model."""
        self.all = [ServingEngine(0, AsyncRepository(repo), reconnect, own=False)]
        for number, (engine, again) in enumerate(others, 1):
            _require_same(repo.engine, engine, number)
            view = AsyncRepository(open_repository(repo.path, engine=engine, create=False))
            self.all.append(ServingEngine(number, view, again, own=True))
        self._on_lost, self._spread = on_lost, spread
        self._returning: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._closing = False

    @property
    def up(self) -> list[ServingEngine]:
        return [one for one in self.all if one.is_up]

    @property
    def any(self) -> ServingEngine:
        """One that is up if any is: for what all of them would say alike."""
        return next(iter(self.up), self.all[0])

    # -- placement

    def least_busy(self) -> ServingEngine:
        """Raises `EngineDied` where none is up."""
        if not self.up:
            raise EngineDied("no engine is up")
        return min(self.up, key=_load)

    def nearest(self, num_open: Callable[[ServingEngine], int], num_elsewhere: int, worth: int) -> ServingEngine:
        """Where a request runs. `num_open(engine)`: of its tokens those that are open or under way there;
        `num_elsewhere`: those that any engine can load. Fewer than `worth` tokens are no reason. An engine that runs
        `spread` requests more than the least busy one gets no more whose prefix another one can load."""
        least = self.least_busy()
        if len(self.up) == 1:
            return least
        known = {one: num_open(one) for one in self.up}
        most = max(known.values())
        if most < worth or most + worth <= num_elsewhere:
            return least
        best = min((one for one in self.up if known[one] + worth > most), key=_load)
        crowded = best.running - least.running >= self._spread
        return least if crowded and num_elsewhere + worth > most else best

    # -- one that dies

    def lost(self, one: ServingEngine, engine: Engine) -> None:
        """`engine` was found dead: `one` is taken out until it is back."""
        if one.engine is not engine or not one.is_up:
            return
        one.is_up = False
        log.warning("engine %d stopped; %d of %d are up", one.number, len(self.up), len(self.all))
        self._on_lost(one)
        if one.can_come_back:
            task = asyncio.create_task(self._bring_back(one))
            self._returning.add(task)
            task.add_done_callback(self._returning.discard)

    async def wait(self) -> None:
        """Until one is up. Raises `ApiError` 503 where none comes in time."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._one_is_up(), REJOIN_S)
        if self._closing or not self.up:
            raise ApiError(503, "the engine is down; try again soon", retry_after=RETRY_AFTER_S)

    async def _one_is_up(self) -> None:
        while not self.up and not self._closing and any(one.can_come_back for one in self.all):
            await self._news.wait()

    async def _bring_back(self, one: ServingEngine) -> None:
        told = ""
        while True:
            try:
                await one.replace(self.any.engine if self.up else None)
                break
            except ThawError as error:
                if error.kind != told:
                    log.warning("engine %d is down, and none has replaced it yet: %s", one.number, error.kind)
                told = error.kind
                await asyncio.sleep(RETRY_AFTER_S)
        log.warning("another engine has replaced engine %d", one.number)
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    # -- the end

    def stop_waiting(self) -> None:
        self._closing = True
        for task in self._returning:
            task.cancel()
        self._tell()

    async def close(self) -> None:
        """Those that came later, and the views; not the engines that were given."""
        for one in self.all:
            await one.close()


def _keep_up_elsewhere(repo: AsyncRepository) -> None:
    """Before any namespace of it is entered."""
    store = repo.sync.store
    if not isinstance(store.upkeep, ProcessUpkeep):
        store.upkeep = ProcessUpkeep(store.path)


def memory_of(info: EngineInfo, *, running: bool) -> str:
    """Where the KV of an open session is: if it is `running` where the engine computes, else where it is kept."""
    where_it_computes = running or not _has_arena(info.name)
    return "on the GPU" if where_it_computes and not info.device.startswith("cpu") else "in host memory"


@functools.cache
def _has_arena(engine: str) -> bool:
    """Whether that engine keeps the KV of idle sessions in host memory, whatever it runs on: those with servers do."""
    try:
        return kind_of(engine).server is not None
    except NotFound:
        return False


def _load(one: ServingEngine) -> tuple[int, int]:
    """How busy it is; of equals the one that got fewer requests until now."""
    return one.running, one.num_placed


def _require_same(first: Engine, other: Engine, number: int) -> None:
    try:
        compare(first.identity(), other.identity())
    except Refused as error:
        raise InvalidRequest(
            f"engine {number} runs another model than the others, and cannot continue their sessions: {error}"
        ) from None
