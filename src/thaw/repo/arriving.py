"""A session from a remote's branch, hydrated while it is downloaded.

The fetch announces objects and places once it knows them (`thaw.remote.arriving`); the plan is made from these, and an
engine of this process reads each blob as soon as it has landed in a local pack. The session is handed out when the
fetch is whole: its commits are stored, so that what continues from them can be committed. An engine in a process of its
own hydrates after the fetch.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from thaw.core import points
from thaw.core.errors import InvalidRequest
from thaw.data.locations import StoreMount
from thaw.engines.embedded.engine import EmbeddedEngine
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


class _Arriving(Context):
    """A context whose store has what is on its way, and whose first tier is where it lands."""

    def __init__(self, of: Context, store: Store, arrival: Arrival) -> None:
        super().__init__(store, None, of=of)
        self._mount = StoreMount(uuid=of.mount.uuid, tiers=(arrival.address, *of.mount.tiers))

    @property
    def mount(self) -> StoreMount:
        return self._mount


class _Hydrating:
    """Hydrates what a fetch announces, on a thread of its own. Each announcement is one try; the last one counts."""

    def __init__(
        self, context: Context, point: str | Point, seed: int | None, share_prefix: bool, policy: Policy
    ) -> None:
        self._context, self._point = context, point
        self._seed, self._share_prefix, self._policy = seed, share_prefix, policy
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="thaw-arriving")
        self._tries: list[tuple[Arrival, Future[Found]]] = []

    def announce(self, said: Announced) -> None:
        from thaw.remote.arriving import ArrivingStore

        view = ArrivingStore.over(self._context.store, said.objects, said.points, said.arrival)
        context = _Arriving(self._context, view, said.arrival)
        self._tries.append((said.arrival, self._pool.submit(self._hydrate, context)))

    def _hydrate(self, context: Context) -> Found:
        where = resolve(context.store, self._point)
        live = hydrate(context, where, seed=self._seed, share_prefix=self._share_prefix, policy=self._policy)
        return where, live

    def result(self) -> Found | None:
        """The last try's, once the fetch has ended well. None where nothing was announced, or where the fetch began
        again after it and found all here. Raises what hydrating raised."""
        return self._tries[-1][1].result() if self._tries and self._tries[-1][0].is_whole else None

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
    meter: TransferMeter | None = None,
) -> Found:
    """Fetches the branch that `point` names (`origin/main`, with `~2` or `:turn=1` behind it) and hydrates the point.

    Raises what fetching and hydrating raise. What was fetched stays, whatever becomes of the session.
    """
    spelled, remote, branch = _of_remote(context.store, point)
    context.engine  # noqa: B018 - booted before anything is downloaded
    work = _Hydrating(context, spelled, seed, share_prefix, policy)
    announce = work.announce if isinstance(context.engine, EmbeddedEngine) else None
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
    return where, hydrate(context, where, seed=seed, share_prefix=share_prefix, policy=policy)


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
