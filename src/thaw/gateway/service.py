"""The neutral middle: one repository and its engines, its tenants, what is open and under way, and what is kept.

Used by one event loop. Dialects ask it for jobs; nothing in it knows a dialect.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from thaw.core.errors import ThawError
from thaw.engines.base import Engine
from thaw.gateway.asked import Asked, RequestOutcome, SpokenPiece
from thaw.gateway.engines import Reconnect, ServingEngines
from thaw.gateway.job import Keep, ReplyJob
from thaw.gateway.ledger import Ledger, LedgerRow
from thaw.gateway.live import LiveSessions
from thaw.gateway.metrics import Metrics
from thaw.gateway.place import ParentFinder
from thaw.gateway.problems import RETRY_AFTER_S, ApiError
from thaw.gateway.reading import OwnReader, SpeechReader, SpeechReaders
from thaw.gateway.repeats import Repeats
from thaw.gateway.settings import GatewaySettings
from thaw.gateway.speech import NONE, ForcedReader, TextReaders
from thaw.gateway.tenants import Tenant, Tenants
from thaw.repo.aio import AsyncRepository
from thaw.repo.bridge import call
from thaw.repo.repository import Repository
from thaw.repo.resolve import ResolvedPoint

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
        self.served = settings.models or (_model_name(self.engine),)
        self.model = next((name for name in self.served if name != "*"), _model_name(self.engine))
        self.closing = False
        self.readers = SpeechReaders(settings.tools, settings.reasoning, settings.parser_python, self.engine.info.model)
        self.jobs: dict[tuple[str, str], ReplyJob] = {}
        """Of stored responses that are under way, by namespace and id."""
        self._running: set[ReplyJob] = set()
        self._conversations: set[tuple[str, str]] = set()
        self._chores: set[asyncio.Task[None]] = set()
        self._finders: dict[str, ParentFinder] = {}

    @property
    def engine(self) -> Engine:
        """One of them: for what all would say alike."""
        return self.engines.any.engine

    @property
    def repo(self) -> AsyncRepository:
        return self.engines.any.repo

    @property
    def num_running(self) -> int:
        return len(self._running)

    def within(self, tenant: Tenant) -> AsyncRepository:
        return self.engines.any.within(tenant.namespace)

    def _finder(self, tenant: Tenant) -> ParentFinder:
        if tenant.namespace not in self._finders:
            self._finders[tenant.namespace] = ParentFinder(self.engines, tenant.namespace, self.live)
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
        return await self._finder(tenant).count(asked)

    # -- jobs

    async def start(self, tenant: Tenant, asked: Sequence[Asked]) -> list[ReplyJob]:
        """Jobs of which no more than the commits are kept. Raises `ApiError`."""
        await self.admit(tenant, len(asked))
        return [self.begin(tenant, one) for one in asked]

    async def admit(self, tenant: Tenant, num: int) -> None:
        """Whether so many jobs may begin now. Raises `ApiError`."""
        self.require_choices(num)
        if self.closing:
            raise ApiError(503, "the gateway is stopping; try again soon", retry_after=RETRY_AFTER_S)
        if self.num_running + num > self.settings.limits.requests:
            raise ApiError(503, f"{self.num_running} requests are running; try again soon", retry_after=RETRY_AFTER_S)
        nbytes = await call(self.ledger.nbytes, tenant.namespace) if tenant.quota.bytes is not None else 0
        tenant.admit(num, nbytes)

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
        self, tenant: Tenant, asked: Asked, keep: Keep | None = None, said: Sequence[SpokenPiece] = ()
    ) -> ReplyJob:
        """A job that was admitted. `keep` is awaited between its commit and its outcome; without one no more than the
        commit is kept. `said`: pieces from before it was parked."""

        async def kept(outcome: RequestOutcome) -> None:
            tenant.meter.add(outcome.num_prefilled + len(outcome.token_ids))
            self.metrics.done(tenant.name, asked.branch, outcome)
            await (self.keep_point(tenant, outcome) if keep is None else keep(outcome))

        job = ReplyJob(asked, self._finder(tenant).find, kept, self.engines.wait, self.reader, said)
        tenant.running += 1
        self._running.add(job)

        def over(_: asyncio.Task[None]) -> None:
            tenant.running -= 1
            self._running.discard(job)

        job.task.add_done_callback(over)
        return job

    # -- keeping

    async def keep_point(self, tenant: Tenant, outcome: RequestOutcome) -> None:
        """Count a commit that no response names."""
        row = LedgerRow(
            kind="point", id=outcome.point, namespace=tenant.namespace, status="completed", record={},
            point=outcome.point, parent=outcome.parent, nbytes=outcome.nbytes, created=outcome.created,
        )  # fmt: skip
        await call(self.ledger.put, row)

    def take_conversation(self, namespace: str, id: str) -> None:
        """Raises `ApiError` 409 while another response goes on with it."""
        if (namespace, id) in self._conversations:
            raise ApiError(409, f"another response is already continuing {id}; wait for it", code="conversation_locked")
        self._conversations.add((namespace, id))

    def free_conversation(self, namespace: str, id: str) -> None:
        self._conversations.discard((namespace, id))

    def later(self, chore: Coroutine[Any, Any, None]) -> None:
        """Do it, and before the gateway ends."""
        task = asyncio.create_task(chore)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    async def sweep(self) -> int:
        """Let go of what is kept no longer: rows, then, by gc, the KV that nothing names. How many rows went."""
        keeping = self.settings.keeping
        before = time.time() - keeping.lifetime_s
        gone, oldest = await call(self.ledger.expire, before=before, max_nbytes=keeping.nbytes)
        if gone:
            now = time.time()
            since = min([now if oldest is None else oldest, *(job.began for job in self._running)])
            await self.repo.gc(keep_reflog_s=max(0.0, now - since))
        return gone

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
        self.engines.stop_waiting()
        stored = set(self.jobs.values())
        for job in list(self._running):
            (job.park if job in stored else job.stop)()
        for tasks in ([job.task for job in self._running], list(self._chores)):
            if tasks:
                await asyncio.wait(tasks)
        await self.live.clear()
        await self.readers.close()
        await self.engines.close()


def _model_name(engine: Engine) -> str:
    """The last part of a path, as clients name models."""
    return engine.info.model.rstrip("/").rpartition("/")[2] or engine.info.name
