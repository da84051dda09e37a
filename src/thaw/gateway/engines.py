"""The gateway's engines: one or several that run the same model, over one repository.

Each has a view of the repository of its own. A request is placed once its tokens are known: at the engine that has most
of them open, else at the one with the fewest running requests. One that stops is taken out; what ran there runs again
on another one, from what is stored, and what has an address or a command is brought back meanwhile.

An error that says that an engine is gone is no proof: the engine is asked. One that answers stays, and the request that
it failed counts that failure itself (`ReplyJob`). One that does not is taken out, and where none of its last lives got
a request to its end, it is joined again later each time.

Used by one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from thaw.core.errors import EngineDied, InvalidRequest, NotFound, Refused, ThawError, TimedOut
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
ANSWER_S = 30.0
"""An engine that is suspected dead has so long to answer: a step that reads a long prompt may be under way."""
JOIN_AGAIN_S, MAX_JOIN_AGAIN_S = 2.0, 60.0
"""How long an engine is left alone after a life that got no request to its end; twice as long after each more."""
CLOSE_S = 30.0
"""After its last request, what was joined of an engine that is gone is kept so long for whoever looks into it."""
Reconnect: TypeAlias = Callable[[], Engine]
"""Joins or boots the engine that takes the place of one that died."""
log = logging.getLogger("thaw.gateway")


class NoEngineUp(EngineDied):
    """None is up now. No request has failed by it."""


class EngineLife:
    """One engine, from when it was joined until it is lost. `running`: requests that it has; `num_done`: those that it
    got to their end; `users`: who else needs it."""

    def __init__(self, repo: AsyncRepository, *, engine: Engine | None, own: bool) -> None:
        """`engine`: the one that is closed at the end; None: it is its owner's. `own`: so is the view otherwise."""
        _keep_up_elsewhere(repo)
        self.repo = repo
        self.running = 0
        self.num_done = 0
        self.users = 0
        self.suspected: asyncio.Task[bool] | None = None
        """Whether it answers is being asked."""
        self._engine, self._own = engine, own
        self._within: dict[str, AsyncRepository] = {}

    @property
    def engine(self) -> Engine:
        return self.repo.sync.engine

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

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Not closed meanwhile."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1

    async def close_when_idle(self) -> None:
        """Of a life that is over: once nobody has needed it for a while."""
        await asyncio.sleep(CLOSE_S)
        while self.running or self.users:
            await asyncio.sleep(CLOSE_S)
        await self.close()

    async def close(self) -> None:
        """The client of its engine, and its view. Closing twice is fine."""
        engine, self._engine = self._engine, None
        own, self._own = self._own, False
        if engine is not None:
            await call(engine.close)
        if own:
            await self.repo.close()


class ServingEngine:
    """A place for an engine: the one that is there now, `life`, and the one that takes its place when it dies."""

    def __init__(self, number: int, repo: AsyncRepository, reconnect: Reconnect | None, *, own: bool) -> None:
        self.number = number
        self.life = EngineLife(repo, engine=None, own=own)
        self.num_placed = 0
        self.is_up = True
        self.num_restarts = 0
        self._num_fruitless = 0
        """Of its last lives, one after the other: those that got no request to its end; not the first one."""
        self._reconnect = reconnect

    @property
    def engine(self) -> Engine:
        return self.life.engine

    @property
    def repo(self) -> AsyncRepository:
        return self.life.repo

    @property
    def running(self) -> int:
        """Requests that it has."""
        return self.life.running

    def memory(self, *, running: bool) -> str:
        return memory_of(self.engine.info, running=running)

    @property
    def can_come_back(self) -> bool:
        return self.is_up or self._reconnect is not None

    def within(self, namespace: str) -> AsyncRepository:
        return self.life.within(namespace)

    def take_out(self) -> float:
        """It is up no more. Seconds until it should be joined again: 0, unless its last lives were fruitless."""
        self.is_up = False
        in_vain = self.num_restarts > 0 and not self.life.num_done
        self._num_fruitless = self._num_fruitless + 1 if in_vain else 0
        wait_s: float = JOIN_AGAIN_S * 2 ** (self._num_fruitless - 1) if self._num_fruitless else 0.0
        return min(wait_s, MAX_JOIN_AGAIN_S)

    async def replace(self, like: Engine | None) -> EngineLife:
        """The life that is over. Raises what joining or booting raises, and `InvalidRequest` where it does not run the
        model of `like`."""
        assert self._reconnect is not None
        engine = await call(self._reconnect)
        try:
            if like is not None:
                await call(_require_same, like, engine, self.number)
            repo = AsyncRepository(await call(open_repository, self.repo.path, engine=engine, create=False))
        except BaseException:
            await call(engine.close)
            raise
        before, self.life = self.life, EngineLife(repo, engine=engine, own=True)
        self.is_up, self.num_restarts = True, self.num_restarts + 1
        return before


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
        self._over: dict[EngineLife, asyncio.Task[None]] = {}
        """Lives that are over, and are not closed yet."""
        self._heard_of: weakref.WeakSet[EngineDied] = weakref.WeakSet()
        self._news = asyncio.Event()
        self._may_join = asyncio.Event()
        self._may_join.set()
        self._num_joining = 0
        self._closing = False

    @property
    def up(self) -> list[ServingEngine]:
        return [one for one in self.all if one.is_up]

    @property
    def any(self) -> ServingEngine:
        """One that is up if any is: for what all of them would say alike."""
        return next(iter(self.up), self.all[0])

    @property
    def first_up(self) -> ServingEngine:
        """Raises `NoEngineUp`."""
        if not self.up:
            raise NoEngineUp("no engine is up")
        return self.up[0]

    # -- placement

    def least_busy(self) -> ServingEngine:
        """Raises `NoEngineUp`."""
        return min([self.first_up, *self.up[1:]], key=_load)

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

    async def failed(self, one: ServingEngine, life: EngineLife, error: EngineDied) -> None:
        """A request failed in that life as where the engine is gone: it is asked, and taken out until it is back unless
        it answers."""
        if error in self._heard_of or isinstance(error, NoEngineUp) or one.life is not life or not one.is_up:
            return
        self._heard_of.add(error)
        if life.suspected is None:
            life.suspected = asyncio.create_task(_answers(life.engine))
        asked = life.suspected
        answers = await asyncio.shield(asked)
        if life.suspected is asked:
            life.suspected = None
        if answers:
            log.warning("engine %d failed a request, and answers: %s", one.number, told_in_log(error))
        elif one.life is life and one.is_up:
            self._take_out(one, error)

    def _take_out(self, one: ServingEngine, error: EngineDied) -> None:
        wait_s = one.take_out()
        counts = f"{len(self.up)} of {len(self.all)} are up"
        later = f"; it is joined again in {wait_s:.0f} s" if wait_s else ""
        log.warning("engine %d stopped (%s); %s%s", one.number, told_in_log(error), counts, later)
        self._on_lost(one)
        if one.can_come_back:
            task = asyncio.create_task(self._bring_back(one, wait_s))
            self._returning.add(task)
            task.add_done_callback(self._returning.discard)

    def hold(self, held: bool) -> None:
        """While they are held, none that is down begins to be joined or booted."""
        if held:
            self._may_join.clear()
        else:
            self._may_join.set()

    async def settle(self, timeout_s: float) -> bool:
        """Wait until none is being joined or booted; False where that takes longer."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._none_joins(), timeout_s)
        return not self._num_joining

    async def _none_joins(self) -> None:
        while self._num_joining:
            await self._news.wait()

    async def wait(self) -> None:
        """Until one is up. Raises `ApiError` 503 where none comes in time."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._one_is_up(), REJOIN_S)
        if self._closing or not self.up:
            raise ApiError(503, "the engine is down; try again soon", retry_after=RETRY_AFTER_S)

    async def _one_is_up(self) -> None:
        while not self.up and not self._closing and any(one.can_come_back for one in self.all):
            await self._news.wait()

    async def _bring_back(self, one: ServingEngine, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        told = ""
        while True:
            try:
                before = await self._join(one)
                break
            except Exception as error:  # noqa: BLE001 - whatever joining it raises, it is tried again
                kind = error.kind if isinstance(error, ThawError) else type(error).__name__
                if kind != told:
                    log.warning("engine %d is down, and none has replaced it yet: %s", one.number, kind)
                told = kind
                await asyncio.sleep(RETRY_AFTER_S)
        log.warning("another engine has replaced engine %d", one.number)
        self._let_go(before)

    async def _join(self, one: ServingEngine) -> EngineLife:
        """As `ServingEngine.replace`, once none is held."""
        await self._may_join.wait()
        self._num_joining += 1
        try:
            return await one.replace(self.any.engine if self.up else None)
        finally:
            self._num_joining -= 1
            self._tell()

    def _let_go(self, life: EngineLife) -> None:
        """Close it once its last request is over."""
        task = self._over[life] = asyncio.create_task(life.close_when_idle())
        task.add_done_callback(lambda _: self._over.pop(life, None))

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
        over = list(self._over.items())
        for _, task in over:
            task.cancel()
        if over:
            await asyncio.wait([task for _, task in over])
        for life in [*(life for life, _ in over), *(one.life for one in self.all)]:
            await life.close()


async def _answers(engine: Engine) -> bool:
    """Whether it is there: it opens a session, and says which model it runs."""
    try:
        await asyncio.wait_for(call(_ask, engine), ANSWER_S)
    except (EngineDied, TimedOut, asyncio.TimeoutError):
        return False
    except Exception as error:  # noqa: BLE001 - whatever it answers
        log.warning("an engine that was asked whether it is there answered with an error: %s", type(error).__name__)
    return True


def _ask(engine: Engine) -> None:
    engine.close_session(engine.open())
    engine.identity()


def told_in_log(error: EngineDied) -> str:
    """Why an engine is gone, without what a server has said: that may hold a client's words."""
    return re.sub(r"\((\d{3}): .*\)", r"(\1)", str(error), flags=re.DOTALL)[:300]


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
