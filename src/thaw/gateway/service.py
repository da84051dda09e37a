"""The neutral middle: one repository and engine, its tenants, what is open and under way, and what is kept.

Used by one event loop. Dialects ask it for jobs; nothing in it knows a dialect.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from thaw.core import cache
from thaw.core.errors import ThawError
from thaw.engines.base import Delta, Engine
from thaw.gateway.asked import Asked, RequestOutcome
from thaw.gateway.bodies import Bodies
from thaw.gateway.job import Keep, ReplyJob
from thaw.gateway.ledger import Ledger, LedgerRow
from thaw.gateway.live import LiveSessions
from thaw.gateway.metrics import Metrics
from thaw.gateway.place import ParentFinder, Place, TextLimit
from thaw.gateway.problems import RETRY_AFTER_S, ApiError
from thaw.gateway.settings import GatewaySettings
from thaw.gateway.speech import Reader, reader_of
from thaw.gateway.tenants import Spending, Tenant, Tenants
from thaw.repo.aio import AsyncRepository
from thaw.repo.bridge import call
from thaw.repo.repository import Repository
from thaw.repo.repository import open as open_repository
from thaw.repo.resolve import ResolvedPoint

REJOIN_S = 600.0
"""How long requests wait for another engine."""
ROOM_S = 1.0
log = logging.getLogger("thaw.gateway")


class Service:
    """Made by `opened`; `close` ends what is under way and closes what is open, not the repository."""

    def __init__(
        self,
        repo: Repository,
        tenants: Tenants,
        settings: GatewaySettings,
        ledger: Ledger,
        reconnect: Callable[[], Engine] | None = None,
    ) -> None:
        """`reconnect` joins or boots the engine that replaces one that died; None if there is none."""
        self.repo = AsyncRepository(repo)
        self._reconnect = reconnect
        self._rejoining = asyncio.Lock()
        self.engine: Engine = repo.engine
        self.settings = settings
        self.tenants = tenants
        self.ledger = ledger
        self.live = LiveSessions(settings.limits)
        self.metrics = Metrics()
        self.bodies = Bodies(settings.limits)
        self.served = settings.models or (_model_name(self.engine),)
        self.model = next((name for name in self.served if name != "*"), _model_name(self.engine))
        self.closing = False
        self.reader: Callable[[], Reader] = reader_of(settings.tools)
        self.jobs: dict[tuple[str, str], ReplyJob] = {}
        """Of stored responses that are under way, by namespace and id."""
        self._running: set[ReplyJob] = set()
        self._conversations: set[tuple[str, str]] = set()
        self._chores: set[asyncio.Task[None]] = set()
        self._opened: list[AsyncRepository] = []
        """Those that came with another engine; they are closed here."""
        self._finders: dict[str, ParentFinder] = {}
        self._texts = TextLimit(self.engine)
        self._token_nbytes = cache.token_nbytes(self.engine.info.groups)
        self._preparing = 0
        self._room_found = -ROOM_S

    @property
    def num_running(self) -> int:
        return len(self._running) + self._preparing

    def within(self, tenant: Tenant) -> AsyncRepository:
        return self.repo.within(tenant.namespace) if tenant.namespace else self.repo

    def _finder(self, tenant: Tenant) -> ParentFinder:
        if tenant.namespace not in self._finders:
            self._finders[tenant.namespace] = ParentFinder(self.within(tenant), self.engine, self.live, self._texts)
        return self._finders[tenant.namespace]

    async def rejoin(self, dead: Engine) -> None:
        """Wait until another engine has taken the place of a dead one, once for all. Raises `ApiError` 503 where none
        comes in time."""
        async with self._rejoining:
            if self.engine is not dead:
                return
            self.live.drop()
            for _ in range(int(REJOIN_S / RETRY_AFTER_S)):
                if self.closing or self._reconnect is None:
                    break
                try:
                    engine = await call(self._reconnect)
                except ThawError as error:
                    log.warning("the engine is down, and none has replaced it yet: %s", error.kind)
                    await asyncio.sleep(RETRY_AFTER_S)
                    continue
                await self._use(engine)
                return
        raise ApiError(503, "the engine is down; try again soon", retry_after=RETRY_AFTER_S)

    async def _use(self, engine: Engine) -> None:
        former, self.engine = self.repo, engine
        self.repo = AsyncRepository(await call(open_repository, former.path, engine=engine, create=False))
        self._finders.clear()
        self._texts = TextLimit(engine)
        self._opened.append(self.repo)
        log.warning("another engine has replaced the one that stopped")

    # -- points

    async def point(
        self, tenant: Tenant, name: str, *, turn: int | None = None, token: int | None = None
    ) -> ResolvedPoint:
        """A point of the tenant's own. Raises `NotFound`, `BadPoint`."""
        repo = self.within(tenant)
        if turn is None and token is None:
            return await repo.resolve(name)
        return await repo.at(name, turn=turn, token=token)

    async def count(self, tenant: Tenant, asked: Asked) -> int:
        """Tokens of its prompt. Raises `ApiError` as for a request."""
        async with self.preparing(tenant):
            return await self._finder(tenant).count(asked)

    async def encode(self, tenant: Tenant, text: str) -> tuple[int, ...]:
        """A prompt's tokens. Raises `ApiError` as for a request."""

        def encode() -> tuple[int, ...]:
            self._texts.require(text)
            return tuple(self.engine.codec.encode(text, first=True))

        async with self.preparing(tenant):
            return await call(encode)

    @contextlib.asynccontextmanager
    async def preparing(self, tenant: Tenant) -> AsyncIterator[None]:
        """While a text is tokenised for a tenant, which counts as a request that runs."""
        await self.admit(tenant, 1)
        tenant.running += 1
        self._preparing += 1
        try:
            yield
        finally:
            tenant.running -= 1
            self._preparing -= 1

    # -- jobs

    async def start(self, tenant: Tenant, asked: Sequence[Asked]) -> list[ReplyJob]:
        """Jobs of which no more than the commits are kept. Raises `ApiError`."""
        await self.admit(tenant, len(asked), max((self.answer(one) for one in asked), default=0))
        request: list[Spending] = []
        return [self.begin(tenant, one, request=request) for one in asked]

    def answer(self, asked: Asked) -> int:
        """Tokens that it may sample at most."""
        limit = self.engine.info.max_model_len
        return limit if asked.max_tokens is None else min(asked.max_tokens, limit)

    async def admit(self, tenant: Tenant, num: int, answer: int = 0) -> None:
        """Whether so many jobs, of `answer` tokens each, may begin now. Raises `ApiError`."""
        self.require_choices(num)
        if self.closing:
            raise ApiError(503, "the gateway is stopping; try again soon", retry_after=RETRY_AFTER_S)
        most = self.settings.limits.requests
        share = most if self.tenants.num == 1 else max(num, most * 3 // 4)
        if self.num_running + num > most or tenant.running + num > share:
            raise ApiError(503, "too many requests are running; try again soon", retry_after=RETRY_AFTER_S)
        tenant.admit(num, answer, self.ledger.nbytes(tenant.namespace))

    def require_choices(self, num: int) -> None:
        """Whether one request may have so many choices, before anything is made of them. Raises `ApiError`."""
        if num > self.settings.limits.choices:
            raise ApiError(400, f"n={num}: at most {self.settings.limits.choices}", param="n")

    def begin(
        self,
        tenant: Tenant,
        asked: Asked,
        keep: Keep | None = None,
        said: Sequence[Delta] = (),
        request: list[Spending] | None = None,
    ) -> ReplyJob:
        """A job that was admitted. `keep` is awaited between its commit and its outcome; without one no more than the
        commit is kept. `said`: deltas from before it was parked. `request`: jobs of the same request."""
        engine = self.engine

        spending = Spending(
            tenant, self.answer(asked), self._token_nbytes, [] if request is None else request,
            lambda: self.ledger.nbytes(tenant.namespace),
        )  # fmt: skip

        async def find(now: Asked) -> Place:
            nonlocal engine
            engine = self.engine
            place = await self._finder(tenant).find(now)
            try:
                num_new = max(0, place.num_tokens - place.num_known)
                spending.prompt(num_new)
                await self._require_room(num_new)
            except (ApiError, ThawError):
                await place.give_up()
                raise
            return place

        async def kept(outcome: RequestOutcome) -> None:
            self.metrics.done(tenant.name, asked.branch, outcome)
            await (self.keep_point(tenant, outcome) if keep is None else keep(outcome))

        job = ReplyJob(asked, find, kept, lambda: self.rejoin(engine), said, spending.ran)
        self._running.add(job)

        def over(_: asyncio.Task[None]) -> None:
            if job.read:
                spending.read()
            spending.over()
            self._running.discard(job)

        job.task.add_done_callback(over)
        return job

    async def _require_room(self, num_tokens: int) -> None:
        """Whether the disk has room for a request's commit; asked once a second. Raises `StorageFailed`."""
        now = time.monotonic()
        if now - self._room_found >= ROOM_S:
            await call(self.repo.sync.require_room, num_tokens)
            self._room_found = now

    # -- keeping

    def require_bytes(self, tenant: Tenant) -> None:
        """Whether a tenant may store more. Raises `ApiError` 429."""
        tenant.require_bytes(self.ledger.nbytes(tenant.namespace))

    async def keep_point(self, tenant: Tenant, outcome: RequestOutcome) -> None:
        """Count a commit that no response names."""
        row = LedgerRow(
            kind="point", id=outcome.point, namespace=tenant.namespace, status="completed", record={},
            point=outcome.point, parent=outcome.parent, nbytes=outcome.nbytes, created=outcome.created,
        )  # fmt: skip
        await call(self.ledger.count, row)

    def take_conversation(self, namespace: str, id: str) -> None:
        """Raises `ApiError` 409 while another response goes on with it."""
        if (namespace, id) in self._conversations:
            raise ApiError(409, f"another response is already continuing {id}; wait for it", code="conversation_locked")
        self._conversations.add((namespace, id))

    def free_conversation(self, namespace: str, id: str) -> None:
        self._conversations.discard((namespace, id))

    def later(self, chore: Coroutine[Any, Any, None]) -> None:
        """Do it, and before the gateway ends."""

        async def done() -> None:
            try:
                await chore
            except ThawError as error:
                log.warning("a response could not be kept: %s", error.kind)

        task = asyncio.create_task(done())
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    async def sweep(self) -> int:
        """Let go of what is kept no longer: rows, then, by gc, the KV that nothing names. How many rows went.

        What running requests go on from is kept until they are over.
        """
        keeping = self.settings.keeping
        before = time.time() - keeping.lifetime_s
        held = {job.parent for job in self._running if job.parent is not None}
        gone, oldest = await call(self.ledger.expire, before=before, max_nbytes=keeping.nbytes, held=held)
        if gone:
            now = time.time()
            since = min([now if oldest is None else oldest, *(job.began for job in self._running)])
            await self.repo.gc(keep_reflog_s=max(0.0, now - since))
            await self.live.forget(await call(self._lost, self.live.commits()))
        return gone

    def _lost(self, commits: set[tuple[str, str]]) -> list[tuple[str, str]]:
        """Those, by namespace, that gc has removed."""
        repo = self.repo.sync
        views = {name: repo.within(name) if name else repo for name in {name for name, _ in commits}}
        return [(name, commit) for name, commit in commits if not views[name].store.has(commit)]

    async def sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(self.settings.keeping.sweep_s)
            try:
                await self.sweep()
            except ThawError as error:
                log.warning("a clean-up failed: %s", error.kind)

    async def close(self) -> None:
        """Park what runs: each job is committed as far as it came. Then nothing is open."""
        self.closing = True
        stored = set(self.jobs.values())
        for job in list(self._running):
            (job.park if job in stored else job.stop)()
        for tasks in ([job.task for job in self._running], list(self._chores)):
            if tasks:
                await asyncio.wait(tasks)
        await self.live.clear()
        for repo in self._opened:
            await call(repo.sync.engine.close)
            await repo.close()


def _model_name(engine: Engine) -> str:
    """The last part of a path, as clients name models."""
    return engine.info.model.rstrip("/").rpartition("/")[2] or engine.info.name
