"""A session from a remote's branch, hydrated while it is downloaded.

The fetch announces objects and places once it knows them (`thaw.remote.arriving`); the plan is made from these, and the
engine reads each blob as soon as it has landed in a local pack. The session is handed out when the fetch is whole: its
commits are stored, so that what continues from them can be committed.

An engine of this process (`transformers`, `fake`) reads from the first byte on. One in processes of its own (vLLM,
SGLang) has few threads that read for all of its sessions, so it is asked to begin `HOLD_S` seconds before the end. If
that does not work out (the download stalls, an older thaw runs there), it loads from the store after the fetch, with a
warning. Engines on other hosts, and several behind one client, load after the fetch.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from thaw.core import points
from thaw.core.errors import InvalidRequest, ThawError
from thaw.data.locations import StoreMount, TierAddress
from thaw.engines.embedded.engine import EmbeddedEngine
from thaw.engines.served.client.engine import ServedEngine
from thaw.remote import settings
from thaw.repo import remotes
from thaw.repo.context import Context
from thaw.repo.hydrate import Hydration, hydrate
from thaw.repo.resolve import ResolvedPoint, resolve
from thaw.store import Store

if TYPE_CHECKING:
    from thaw.core.points import Point
    from thaw.engines.base import Policy
    from thaw.remote.arriving import Announced, Arrival
    from thaw.remote.meter import TransferMeter

Found = tuple[ResolvedPoint, Hydration]
log = logging.getLogger(__name__)
HOLD_S = 5.0
"""How long a thread of an engine's process is held by a download, about."""


class _Arriving(Context):
    """A context whose store has what is on its way, and whose first tier is where it lands."""

    def __init__(self, of: Context, store: Store, tier: TierAddress) -> None:
        super().__init__(store, None, of=of)
        self._mount = StoreMount(uuid=of.mount.uuid, tiers=(tier, *of.mount.tiers))

    @property
    def mount(self) -> StoreMount:
        return self._mount


class _Hydrating:
    """Hydrates what a fetch announces, on a thread of its own. Each announcement is one try; the last one counts."""

    def __init__(
        self,
        context: Context,
        point: str | Point,
        seed: int | None,
        share_prefix: bool,
        policy: Policy,
        stale_kv: bool,
        adapter: str | None,
    ) -> None:
        self._context, self._point = context, point
        self._seed, self._share_prefix, self._policy, self._stale_kv = seed, share_prefix, policy, stale_kv
        self._adapter = adapter
        self._apart = isinstance(context.engine, ServedEngine)
        """Whether the engine reads in processes of its own."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="thaw-arriving")
        self._tries: list[tuple[Arrival, Future[Found]]] = []

    def announce(self, said: Announced) -> None:
        from thaw.remote.arriving import ArrivingStore

        view = ArrivingStore.over(self._context.store, said.objects, said.points, said.arrival)
        tier = said.arrival.post(view.packs) if self._apart else said.arrival.address
        context = _Arriving(self._context, view, tier)
        self._tries.append((said.arrival, self._pool.submit(self._hydrate, context, said.arrival)))

    def _hydrate(self, context: Context, arrival: Arrival) -> Found:
        where = resolve(context.store, self._point)
        if self._apart:
            arrival.wait_until_near(HOLD_S)
        live = hydrate(
            context, where, seed=self._seed, share_prefix=self._share_prefix, policy=self._policy,
            stale_kv=self._stale_kv, adapter=self._adapter,
        )  # fmt: skip
        return where, live

    def result(self) -> Found | None:
        """The last try's, once the fetch has ended well. None where nothing was announced, or where the fetch began
        again after it and found all here, or where an engine of another process could not read what arrived. Raises
        what hydrating raised."""
        if not (self._tries and self._tries[-1][0].is_whole):
            return None
        try:
            return self._tries[-1][1].result()
        except ThawError as error:
            if not self._apart:
                raise
            log.warning("the engine could not load while the download ran (%s), and loads now", error.kind)
            return None

    def close(self, keep: bool) -> None:
        """Ends all tries; sessions of those that do not count, or of all unless `keep`, are closed."""
        self._pool.shutdown()
        for number, (arrival, future) in enumerate(self._tries, 1):
            arrival.close()
            counts = keep and number == len(self._tries)
            if not counts and future.exception() is None:
                self._context.engine.close_session(future.result()[1].session)


def fetched(
    context: Context,
    point: str | Point | ResolvedPoint,
    *,
    seed: int | None = None,
    share_prefix: bool = False,
    policy: Policy = "exact",
    stale_kv: bool = False,
    adapter: str | None = None,
    meter: TransferMeter | None = None,
) -> Found:
    """Fetches the branch that `point` names (`origin/main`, with `~2` or `:turn=1` behind it) and hydrates the point.

    Raises what fetching and hydrating raise. What was fetched stays, whatever becomes of the session.
    """
    spelled, remote, branch = _of_remote(context.store, point)
    context.engine  # noqa: B018 - booted before anything is downloaded
    work = _Hydrating(context, spelled, seed, share_prefix, policy, stale_kv, adapter)
    announce = work.announce if isinstance(context.engine, (EmbeddedEngine, ServedEngine)) else None
    found = None
    try:
        remotes.fetch(
            context.store, (branch,), remote, prune=False, tags=False, weights=False, meter=meter, announce=announce
        )
        found = work.result()
    finally:
        work.close(keep=found is not None)
    if found is not None:
        return found
    where = resolve(context.store, spelled)
    return where, hydrate(
        context, where, seed=seed, share_prefix=share_prefix, policy=policy, stale_kv=stale_kv, adapter=adapter
    )  # fmt: skip


def _of_remote(store: Store, point: str | Point | ResolvedPoint) -> tuple[Point, str, str]:
    """The point, the remote and its branch. Raises `InvalidRequest` where the point is of no remote."""
    if not isinstance(point, ResolvedPoint):
        spelled = points.parse(point) if isinstance(point, str) else point
        remote, _, branch = spelled.name.partition("/")
        book = settings.read(store)
        if branch and remote in book.remotes:
            return spelled, remote, branch
        known = ", ".join(f"{name}/BRANCH" for name in book.remotes) or "none: thaw remote add origin URL"
        raise InvalidRequest(
            f"{spelled.name!r} is no branch of a remote, so there is nothing to fetch; there are {known}"
        )
    raise InvalidRequest(
        f"{point} is a place in this repository, so there is nothing to fetch; name it as origin/BRANCH"
    )
