"""Getting a fork point into a worker: found there, hydrated, or prefilled.

All of it is done through the porcelain's own doors (`repo.hydrate`, `repo.match`), so the laws that hold for a
repository hold here. The loader looks once: at what is captured of the point by now, and at what the worker has.
What it found, and what it made of it, goes back to the batch as one value.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import msgspec

from thaw.core import objects
from thaw.core.canonical import U64
from thaw.core.errors import IdentityMismatch, PolicyMismatch, StaleSession
from thaw.core.objects import Turn
from thaw.engines.base import SessionRef
from thaw.pool.schedule.captures import Captures
from thaw.pool.schedule.fork_point import ForkPoint
from thaw.pool.schedule.planner import Planner, held_here
from thaw.pool.stores import KeptIn, StoredPoint, Stores
from thaw.pool.values import Decision, LoadPolicy
from thaw.pool.workers.worker import Incarnation, OwnedSession
from thaw.repo.hydrate import Hydration, hydrate
from thaw.repo.match import match

MIN_MATCH = 16
"""A stored prefix shorter than this is not worth a load."""
OLD_KV = (StaleSession, IdentityMismatch, PolicyMismatch)
"""How an engine refuses KV of other weights than those that run."""


@dataclass(frozen=True)
class LoadedPoint:
    """A session at a point, and how it came; it stays open as long as this is held. `point`: the version of the point
    that was loaded. `turns` tile its tokens."""

    point: ForkPoint
    session: OwnedSession
    decision: Decision
    turns: tuple[Turn, ...]
    capture_s: float = 0.0
    hydrate_s: float = 0.0

    @property
    def is_parent(self) -> bool:
        """Whether the session is the point's own, held or stored: with its seed, and what it was interrupted in.
        Else its tokens were prefilled, under whatever seed the first round from them had."""
        return not self.point.plain and (self.session.restore is not None or self.session is self.point.held)


class PointLoader:
    """Shared by all workers of a pool; safe from any thread.

    Locks are taken in this order: `making` of a point's place in a worker, the point's `capturing`, those of the
    incarnation, of the captures and of the arena."""

    def __init__(self, stores: Stores, captures: Captures, planner: Planner) -> None:
        self._stores, self._captures, self._planner = stores, captures, planner

    def load(self, point: ForkPoint, life: Incarnation, policy: LoadPolicy) -> LoadedPoint:
        """Raises what hydrating raises, and `EngineDied` where KV that may not be prefilled again is gone."""
        began, held = time.perf_counter(), point.held
        if held is not None and held.life is life and not life.over:  # nothing is made: no lock
            now, decision = self._captures.now(point), held_here(life.name, policy, time.perf_counter() - began)
            return LoadedPoint(now, held, decision, now.turns)
        place = life.resident(point.key)
        # Another batch may be bringing the point here: this one waits for it, and finds it. So the looks are inside.
        with place.making:
            began, found = time.perf_counter(), place.session
            now = self._captures.now(point)
            if found is not None:
                decision = held_here(life.name, policy, time.perf_counter() - began)
                return LoadedPoint(now, found, decision, now.turns or found.turns)
            link = "" if life.links is None else life.link(now.stored)
            decision = self._planner.decide(now, life.name, policy, link)
            bring = self._hydrate if decision.action == "hydrate" else self._prefill
            loaded = bring(now, life, decision, began)
            place.session = loaded.session
            return loaded

    def fork(
        self, point: ForkPoint, life: Incarnation, policy: LoadPolicy, seed: int | None = None
    ) -> tuple[SessionRef, LoadedPoint]:
        """A session at the point, and how it came. `seed`: its own, None for the point's. Plain tokens of which KV of
        other weights was kept are prefilled anew, as a round's are."""
        try:
            return self._fork(point, life, policy, seed)
        except OLD_KV:
            if not point.plain:
                raise
            self.forget(point, life)
            return self._fork(point, life, policy, seed)

    def forget(self, point: ForkPoint, life: Incarnation) -> None:
        """Let go of what is kept of plain tokens: the weights changed, and nobody said so."""
        self._captures.forget(point)
        life.drop(point.key)

    def _fork(
        self, point: ForkPoint, life: Incarnation, policy: LoadPolicy, seed: int | None
    ) -> tuple[SessionRef, LoadedPoint]:
        there = self.load(point, life, policy)
        replay = seed is None and there.is_parent
        seeds = None if replay else [point.seed]
        return life.engine.fork(there.session.ref, 1, at=point.at, replay=replay, seeds=seeds).result()[0], there

    def _hydrate(self, point: ForkPoint, life: Incarnation, decision: Decision, began: float) -> LoadedPoint:
        now = point if point.stored is not None else self._captures.capture(point)
        if now.stored is None:  # the worker that had it ended since the decision
            return self._prefill(now, life, self._planner.decide(now, life.name, decision.policy), began)
        captured = time.perf_counter()
        session, live = self._load(now.stored, life)
        loaded = time.perf_counter()
        if point.plain:
            session.turns = life.engine.view(live.session).turns
        tier, link = now.stored.where.loaded(live.plan), ""
        if life.links is not None:
            link = life.came_over(live.plan)
            tier = "node" if link else tier
            life.holds(now.stored)
        self._planner.rates.load(tier, live.proof.nbytes, loaded - captured, link)
        done = msgspec.structs.replace(
            decision, tier=tier, nbytes=live.proof.nbytes, link=link, measured_s=time.perf_counter() - began
        )
        capture_s = 0.0 if now is point else captured - began
        return LoadedPoint(now, session, done, now.turns or session.turns, capture_s, loaded - captured)

    @staticmethod
    def _load(stored: StoredPoint, life: Incarnation) -> tuple[OwnedSession, Hydration]:
        store = stored.where.store
        live = hydrate(life.contexts[store.uuid], stored.point)
        return OwnedSession(life, live.session, KeptIn({store.uuid: live.kept}), live.proof), live

    def _prefill(self, point: ForkPoint, life: Incarnation, decision: Decision, began: float) -> LoadedPoint:
        """Run the point's tokens through the model, behind the longest stored prefix of them if they are plain."""
        engine = life.engine
        session, start = self._longest(point, life) if point.plain else (None, 0)
        if session is None:
            session = OwnedSession(life, engine.open(seed=int(U64(point.seed))))
        rest = point.tokens[start:]
        if rest:
            ran = time.perf_counter()
            engine.append(session.ref, rest).result()
            self._planner.rates.prefilled(len(rest), time.perf_counter() - ran)
        session.turns = engine.view(session.ref).turns if point.plain else ()
        reason = decision.reason if not start else f"a stored prefix of {start} tokens was loaded, the rest prefilled"
        done = msgspec.structs.replace(
            decision, num_prefilled_tokens=len(rest), reason=reason, measured_s=time.perf_counter() - began
        )
        return LoadedPoint(point, session, done, point.turns or session.turns)

    def _longest(self, point: ForkPoint, life: Incarnation) -> tuple[OwnedSession | None, int]:
        """A session at the longest stored prefix of plain tokens, and its length."""
        model = objects.encode(life.engine.identity())[0]
        found = [(where, match(where.store, [model], point.tokens)) for where in self._stores.all]
        usable = [StoredPoint(where, at) for where, at in found if at is not None and at.num_tokens >= MIN_MATCH]
        if not usable:
            return None, 0
        longest = max(usable, key=lambda stored: stored.point.num_tokens)
        try:
            session, _ = self._load(longest, life)
        except OLD_KV:  # the weights changed since the look at them
            return None, 0
        return session, longest.point.num_tokens
