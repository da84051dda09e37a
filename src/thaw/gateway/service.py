"""The neutral middle: one repository and its engines, its tenants, what is open and under way, and what is kept.

Used by one event loop. Dialects ask it for jobs; nothing in it knows a dialect.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from thaw.core import cache
from thaw.core.errors import ThawError
from thaw.engines.base import Engine
from thaw.gateway.asked import Asked, RequestOutcome, SpokenPiece
from thaw.gateway.bodies import Bodies
from thaw.gateway.engines import Reconnect, ServingEngines
from thaw.gateway.job import Keep, ReplyJob
from thaw.gateway.ledger import Ledger, LedgerRow
from thaw.gateway.live import LiveSessions
from thaw.gateway.metrics import Metrics
from thaw.gateway.place import ParentFinder, Place, TextLimit
from thaw.gateway.problems import RETRY_AFTER_S, ApiError
from thaw.gateway.reading import OwnReader, SpeechReader, SpeechReaders
from thaw.gateway.repeats import Repeats
from thaw.gateway.settings import GatewaySettings
from thaw.gateway.speech import NONE, ForcedReader, TextReaders
from thaw.gateway.tenants import Spending, Tenant, Tenants
from thaw.repo import refs
from thaw.repo.aio import AsyncRepository
from thaw.repo.bridge import call
from thaw.repo.repository import Repository
from thaw.repo.resolve import ResolvedPoint

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
        reconnect: Reconnect | None = None,
        others: Sequence[tuple[Engine, Reconnect | None]] = (),
    ) -> None:
        """`others`: engines beside `repo`'s own. `reconnect` joins or boots the one that replaces an engine that died;
        None if there is none. Raises `InvalidRequest` where they do not run one model."""
        self.settings = settings
        self.live = LiveSessions(settings.limits)
        self.engines = ServingEngines(repo, reconnect, others, self.live.drop, settings.spread)
        self.tenants = tenants
        self.ledger = ledger
        self.metrics = Metrics()
        self.repeats = Repeats()
        self.bodies = Bodies(settings.limits)
        self.served = settings.models or (_model_name(self.engine),)
        self.model = next((name for name in self.served if name != "*"), _model_name(self.engine))
        self.closing = False
        self.draining = False
        """Nothing begins, until an operator says so (`thaw.gateway.draining`)."""
        self.readers = SpeechReaders(settings.tools, settings.reasoning, settings.parser_python, self.engine.info.model)
        self.jobs: dict[tuple[str, str], ReplyJob] = {}
        """Of stored responses that are under way, by namespace and id."""
        self._running: dict[ReplyJob, str] = {}
        """Those under way, oldest first, and their namespaces."""
        self._conversations: set[tuple[str, str]] = set()
        self._chores: set[asyncio.Task[None]] = set()
        self._finders: dict[str, ParentFinder] = {}
        self._texts = TextLimit(self.engine)
        self._token_nbytes = cache.token_nbytes(self.engine.info.groups)
        self._preparing = 0
        self._room_found = -ROOM_S

    @property
    def engine(self) -> Engine:
        """One of them: for what all would say alike."""
        return self.engines.any.engine

    @property
    def repo(self) -> AsyncRepository:
        return self.engines.any.repo

    @property
    def num_running(self) -> int:
        return len(self._running) + self._preparing

    def running_in(self, namespace: str) -> list[ReplyJob]:
        """Jobs of a namespace that are under way, oldest first."""
        return [job for job, its in self._running.items() if its == namespace]

    def under_way(self) -> list[tuple[ReplyJob, str]]:
        """All jobs that are under way, oldest first, with their namespaces."""
        return list(self._running.items())

    def within(self, tenant: Tenant) -> AsyncRepository:
        return self.engines.any.within(tenant.namespace)

    def _finder(self, tenant: Tenant) -> ParentFinder:
        if tenant.namespace not in self._finders:
            self._finders[tenant.namespace] = ParentFinder(self.engines, tenant.namespace, self.live, self._texts)
        return self._finders[tenant.namespace]

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
        if self.draining:
            raise ApiError(503, "the gateway is drained; try again soon", retry_after=RETRY_AFTER_S)
        most = self.settings.limits.requests
        share = most if self.tenants.num == 1 else max(num, most * 3 // 4)
        if self.num_running + num > most or tenant.running + num > share:
            raise ApiError(503, "too many requests are running; try again soon", retry_after=RETRY_AFTER_S)
        tenant.admit(num, answer, self.ledger.nbytes(tenant.namespace))

    def require_choices(self, num: int) -> None:
        """Whether one request may have so many choices, before anything is made of them. Raises `ApiError`."""
        if num > self.settings.limits.choices:
            raise ApiError(400, f"n={num}: at most {self.settings.limits.choices}", param="n")

    def reader(self, asked: Asked, prompt_ids: Sequence[int]) -> SpeechReader:
        """Of what is said after a prompt; behind a prompt that is no conversation everything is text."""
        if asked.token_ids is not None:
            return OwnReader(lambda: TextReaders(NONE, NONE, opened=False))
        forced = asked.forced
        if forced is not None:
            return OwnReader(lambda: ForcedReader(forced))
        begun = asked.messages[-1].get("content") if asked.continue_final_message else None
        tail = begun if isinstance(begun, str) else None
        return self.readers.reader(self.engine.codec, tuple(prompt_ids), asked.tools, asked.variables, tail)

    def begin(
        self,
        tenant: Tenant,
        asked: Asked,
        keep: Keep | None = None,
        said: Sequence[SpokenPiece] = (),
        request: list[Spending] | None = None,
    ) -> ReplyJob:
        """A job that was admitted. `keep` is awaited between its commit and its outcome; without one no more than the
        commit is kept. `said`: pieces from before it was parked. `request`: jobs of the same request."""
        spending = Spending(
            tenant, self.answer(asked), self._token_nbytes, [] if request is None else request,
            lambda: self.ledger.nbytes(tenant.namespace),
        )  # fmt: skip

        async def find(now: Asked) -> Place:
            place = await self._finder(tenant).find(now)
            try:
                num_new = max(0, place.num_tokens - place.num_known)
                spending.prompt(num_new)
                await self._require_room(num_new)
                if now.branch is not None:
                    store, parent = self.within(tenant).sync.store, place.session.sync.parent
                    await call(refs.require_movable, store, now.branch, parent)
            except (ApiError, ThawError) as error:
                await place.give_up(error)
                raise
            return place

        async def kept(outcome: RequestOutcome) -> None:
            self.metrics.done(tenant.name, asked.branch, outcome)
            await (self.keep_point(tenant, outcome) if keep is None else keep(outcome))

        job = ReplyJob(asked, find, kept, self.engines.wait, self.reader, said, spending.ran)
        self._running[job] = tenant.namespace

        def over(_: asyncio.Task[None]) -> None:
            if job.read:
                spending.read()
            spending.over()
            self._running.pop(job, None)
            self.later(self.live.trim())

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
        """Raises `ApiError` 409 while another response continues with it."""
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

        What running requests continue from is kept until they are over.
        """
        with self.engines.any.life.held():
            return await self._sweep()

    async def _sweep(self) -> int:
        keeping, now = self.settings.keeping, time.time()
        held = {job.parent for job in self._running if job.parent is not None}
        sooner = {one.namespace: now - one.lifetime_s for one in self.tenants.all if one.lifetime_s is not None}
        gone, oldest = await call(
            self.ledger.expire, before=now - keeping.lifetime_s, max_nbytes=keeping.nbytes, held=held, sooner=sooner
        )
        if gone:
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

    async def park_all(self, timeout_s: float | None = None) -> list[str]:
        """Each job that runs is committed as far as it came; one whose response is stored can be resumed. The
        namespaces of those that did not end in time."""
        running, stored = list(self._running), {job: name for (name, _), job in self.jobs.items()}
        for job in running:
            (job.park if job in stored else job.stop)()
        for tasks in ([job.task for job in running], list(self._chores)):
            if tasks:
                await asyncio.wait(tasks, timeout=timeout_s)
        return [stored.get(job, "") for job in running if not job.task.done()]

    async def close(self) -> None:
        """Park what runs. Then nothing is open."""
        self.closing = True
        self.engines.stop_waiting()
        await self.park_all()
        await self.live.clear()
        await self.readers.close()
        await self.engines.close()


def _model_name(engine: Engine) -> str:
    """The last part of a path, as clients name models."""
    return engine.info.model.rstrip("/").rpartition("/")[2] or engine.info.name
