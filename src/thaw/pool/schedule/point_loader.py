"""Getting a fork point into a worker: found there, hydrated, or prefilled; and into the arena.

All of it is done through the porcelain's own doors (`repo.hydrate`, `repo.commit`, `repo.match`), so the laws that hold
for a repository hold here. The loader looks once: at what is captured of the point by now, and at what the worker has.
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
from thaw.core.proof import Proof
from thaw.engines.base import SessionRef
from thaw.pool.schedule.captures import Captures
from thaw.pool.schedule.fork_point import ForkPoint
from thaw.pool.schedule.planner import Planner, held_here
from thaw.pool.stores import KeptIn, StoredPoint, Stores
from thaw.pool.values import Decision, LoadPolicy
from thaw.pool.workers.worker import Incarnation, Resident
from thaw.repo.hydrate import Hydration, hydrate
from thaw.repo.match import match

MIN_MATCH = 16
"""A stored prefix shorter than this is not worth a load."""
OLD_KV = (StaleSession, IdentityMismatch, PolicyMismatch)
"""How an engine refuses KV of other weights than those that run."""


@dataclass(frozen=True)
class LoadedPoint:
    """A session to fork from at token `at`, what of it is stored, and how it came. `point`: the version of the point
    that was loaded. `turns` tile its tokens."""

    point: ForkPoint
    ref: SessionRef
    resident: Resident
    decision: Decision
    turns: tuple[Turn, ...]
    restore: Proof | None = None
    capture_s: float = 0.0
    hydrate_s: float = 0.0

    @property
    def is_parent(self) -> bool:
        """Whether the session is the point's own, held or stored: with its seed, and what it was interrupted in.
        Else its tokens were prefilled, under whatever seed the first round from them had."""
        held = self.point.held
        return not self.point.plain and (self.restore is not None or (held is not None and held.ref == self.ref))


class PointLoader:
    """Shared by all workers of a pool; safe from any thread.

    Locks are taken in this order: an incarnation's `making`, a point's `capturing`, those of the incarnation, of the
    captures and of the arena."""

    def __init__(self, stores: Stores, captures: Captures, planner: Planner, token_nbytes: int) -> None:
        self._stores, self._arena, self._captures = stores, stores.arena, captures
        self._planner, self._token_nbytes = planner, token_nbytes

    def load(self, point: ForkPoint, life: Incarnation, policy: LoadPolicy) -> LoadedPoint:
        """Raises what hydrating raises, and `EngineDied` where KV that may not be prefilled again is gone."""
        began, held = time.perf_counter(), point.held
        if held is not None and held.life is life and not life.over:  # nothing is made: no lock
            now = self._captures.now(point)
            decision = held_here(life.name, policy, time.perf_counter() - began)
            return LoadedPoint(now, held.ref, Resident(held.ref, now.kept), decision, now.turns)
        # Another batch may be bringing the point here: this one waits for it, and finds it. So the looks are inside.
        with life.making(point.key):
            began = time.perf_counter()
            found, now = life.resident(point.key), self._captures.now(point)
            if found is not None:
                decision = held_here(life.name, policy, time.perf_counter() - began)
                return LoadedPoint(now, found.ref, found, decision, now.turns or found.turns, found.restore)
            link = "" if life.links is None else life.link(now.stored)
            decision = self._planner.decide(now, life.name, policy, link)
            if decision.action == "hydrate":
                return self._hydrate(now, life, decision, began)
            return self._prefill(now, life, decision, began)

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
        with point.origin.capturing:  # a capture of the old KV that is under way is forgotten with the rest
            self._captures.forget(point)
        life.drop(point.key)

    def _fork(
        self, point: ForkPoint, life: Incarnation, policy: LoadPolicy, seed: int | None
    ) -> tuple[SessionRef, LoadedPoint]:
        there = self.load(point, life, policy)
        replay = seed is None and there.is_parent
        seeds = None if replay else [point.seed]
        return life.engine.fork(there.ref, 1, at=point.at, replay=replay, seeds=seeds).result()[0], there

    def capture(self, point: ForkPoint) -> ForkPoint:
        """Put a living point into the arena, once; its version there. Raises what a commit raises."""
        with point.origin.capturing:
            now = self._captures.now(point)
            if now.stored is not None or now.held is None:
                return now
            now.held.life.check()
            return self._into_arena(now, now.held.life, now.held.ref, now.kept)

    def capture_resident(self, point: ForkPoint, life: Incarnation) -> ForkPoint:
        """Put a prefilled point into the arena, from the worker that prefilled it; its version there."""
        with point.origin.capturing:
            # From here on another point may push it out, which closes the session: the capture raises `NotFound` then.
            now, found = self._captures.now(point), life.resident(point.key)
            if now.stored is not None or found is None:
                return now
            now = self._into_arena(now, life, found.ref, found.kept)
            assert now.captured is not None
            found.kept = found.kept.add(self._arena.store, now.captured.kept)
            return now

    def _into_arena(self, point: ForkPoint, life: Incarnation, ref: SessionRef, kept: KeptIn) -> ForkPoint:
        store = self._arena.store
        captured = self._arena.capture(life.contexts[store.uuid], ref, kept.of(store), self._token_nbytes * point.at)
        now = self._captures.add(point, captured)
        if life.links is not None:
            life.holds(now.stored)
        return now

    def _hydrate(self, point: ForkPoint, life: Incarnation, decision: Decision, began: float) -> LoadedPoint:
        now = point if point.stored is not None else self.capture(point)
        if now.stored is None:  # it died since the decision
            return self._prefill(now, life, self._planner.decide(now, life.name, decision.policy), began)
        captured = time.perf_counter()
        resident, live = self._load(now.stored, life)
        loaded = time.perf_counter()
        if point.plain:
            resident.turns = life.engine.view(live.session).turns
        tier, link = now.stored.where.loaded(live.plan), ""
        if life.links is not None:
            link = life.came_over(live.plan)
            tier = "node" if link else tier
            life.holds(now.stored)
        self._planner.rates.load(tier, live.proof.nbytes, loaded - captured, link)
        life.keep(point.key, resident)
        done = msgspec.structs.replace(
            decision, tier=tier, nbytes=live.proof.nbytes, link=link, measured_s=time.perf_counter() - began
        )
        return LoadedPoint(
            now, live.session, resident, done, now.turns or resident.turns, live.proof,
            0.0 if now is point else captured - began, loaded - captured,
        )  # fmt: skip

    @staticmethod
    def _load(stored: StoredPoint, life: Incarnation) -> tuple[Resident, Hydration]:
        store = stored.where.store
        live = hydrate(life.contexts[store.uuid], stored.point)
        return Resident(live.session, KeptIn({store.uuid: live.kept}), live.proof), live

    def _prefill(self, point: ForkPoint, life: Incarnation, decision: Decision, began: float) -> LoadedPoint:
        """Run the point's tokens through the model, behind the longest stored prefix of them if they are plain."""
        engine = life.engine
        resident, start = self._longest(point, life) if point.plain else (None, 0)
        if resident is None:
            resident = Resident(engine.open(seed=int(U64(point.seed))))
        rest = point.tokens[start:]
        if rest:
            ran = time.perf_counter()
            engine.append(resident.ref, rest).result()
            self._planner.rates.prefilled(len(rest), time.perf_counter() - ran)
        resident.turns = engine.view(resident.ref).turns if point.plain else ()
        life.keep(point.key, resident)  # from here on others may bring so many points that this one goes
        reason = decision.reason if not start else f"a stored prefix of {start} tokens was loaded, the rest prefilled"
        done = msgspec.structs.replace(
            decision, num_prefilled_tokens=len(rest), reason=reason, measured_s=time.perf_counter() - began
        )
        return LoadedPoint(point, resident.ref, resident, done, point.turns or resident.turns, resident.restore)

    def _longest(self, point: ForkPoint, life: Incarnation) -> tuple[Resident | None, int]:
        """A session at the longest stored prefix of plain tokens, and its length."""
        model = objects.encode(life.engine.identity())[0]
        found = [(where, match(where.store, [model], point.tokens)) for where in self._stores.all]
        usable = [StoredPoint(where, at) for where, at in found if at is not None and at.num_tokens >= MIN_MATCH]
        if not usable:
            return None, 0
        longest = max(usable, key=lambda stored: stored.point.num_tokens)
        try:
            resident, _ = self._load(longest, life)
        except OLD_KV:  # the weights changed since the look at them
            return None, 0
        return resident, longest.point.num_tokens
