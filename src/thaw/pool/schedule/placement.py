"""Getting a trunk into a worker: found there, hydrated, or prefilled; and into the arena.

All of it is done through the porcelain's own doors (`repo.hydrate`, `repo.commit`, `repo.match`), so the laws that hold
for a repository hold here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import msgspec

from thaw.core import objects
from thaw.core.canonical import U64
from thaw.core.errors import IdentityMismatch, PolicyMismatch, StaleSession
from thaw.core.ids import CommitId
from thaw.core.objects import Turn
from thaw.core.proof import Proof
from thaw.engines.base import SessionRef
from thaw.pool.schedule.fork_point import ForkPoint
from thaw.pool.schedule.planner import Planner
from thaw.pool.schedule.resolver import PointResolver
from thaw.pool.shm.shared_store import SharedPoint
from thaw.pool.stores import KeptIn, StoredPoint, Stores
from thaw.pool.values import Decision, LoadPolicy
from thaw.pool.workers.worker import Incarnation, Resident
from thaw.repo.hydrate import Hydration, hydrate
from thaw.repo.match import match

MIN_MATCH = 16
"""A stored prefix shorter than this is not worth a load."""
OLD_KV = (StaleSession, IdentityMismatch, PolicyMismatch)
"""How an engine refuses KV of other weights than those that run."""


@dataclass
class Placed:
    """A session to fork from at token `at`, what of it is stored, and how it came."""

    ref: SessionRef
    resident: Resident
    decision: Decision
    turns: tuple[Turn, ...]
    restore: Proof | None = None
    parent: CommitId | None = None
    capture_s: float = 0.0
    hydrate_s: float = 0.0


class Placement:
    """Shared by all workers of a pool; safe from any thread.

    Locks are taken in this order: a life's `making`, a trunk's, those of the life and of the arena."""

    def __init__(self, stores: Stores, resolver: PointResolver, planner: Planner, token_nbytes: int) -> None:
        self._stores, self._arena = stores, stores.arena
        self._resolver, self._planner, self._token_nbytes = resolver, planner, token_nbytes

    def prepare(self, trunk: ForkPoint, life: Incarnation, policy: LoadPolicy) -> Placed:
        """Raises what hydrating raises, and `EngineDied` where KV that may not be prefilled again is gone."""
        with life.making(trunk.key):
            decision = self._planner.decide(trunk, life, policy)
            began = time.perf_counter()
            if decision.action == "fork":
                done = self._here(trunk, life, decision)
            elif decision.action == "hydrate":
                done = self._hydrate(trunk, life, decision)
            else:
                done = self._prefill(trunk, life, decision)
            measured = msgspec.structs.replace(done.decision, measured_s=time.perf_counter() - began)
            done.decision = measured
            return done

    def fork(self, trunk: ForkPoint, life: Incarnation, policy: LoadPolicy) -> tuple[SessionRef, Placed]:
        """A session at the trunk, and how it came. Plain tokens of which KV of other weights was kept are prefilled
        anew, as a round's are."""
        try:
            return self._fork(trunk, life, policy)
        except OLD_KV:
            if not trunk.plain:
                raise
            self.forget(trunk, life)
            return self._fork(trunk, life, policy)

    def forget(self, trunk: ForkPoint, life: Incarnation) -> None:
        """Let go of what is kept of plain tokens: the weights changed, and nobody said so."""
        with trunk.lock:
            trunk.forget_stored()
            self._resolver.forget_prompt(trunk)
        life.drop(trunk.key)

    def _fork(self, trunk: ForkPoint, life: Incarnation, policy: LoadPolicy) -> tuple[SessionRef, Placed]:
        there = self.prepare(trunk, life, policy)
        return life.engine.fork(there.ref, 1, at=trunk.at, replay=True).result()[0], there

    def capture(self, trunk: ForkPoint) -> float:
        """Put a living trunk into the arena, once; seconds that it took this caller. Raises what a commit raises."""
        began = time.perf_counter()
        with trunk.lock:
            if trunk.stored is None and trunk.held is not None:
                life = trunk.held.life
                life.check()
                point = self._into_arena(trunk, life, trunk.held.ref, trunk.kept)
                trunk.put(self._arena, point)
                life.holds(trunk.stored)
                self._resolver.captured(trunk, point)
        return time.perf_counter() - began

    def capture_resident(self, trunk: ForkPoint, life: Incarnation) -> None:
        """Put a prefilled trunk into the arena, from the worker that prefilled it."""
        with trunk.lock:
            # From here on another point may push it out, which closes the session: the capture raises `NotFound` then.
            found = life.resident(trunk.key)
            if trunk.stored is None and found is not None:
                point = self._into_arena(trunk, life, found.ref, found.kept)
                found.kept = found.kept.add(self._arena.store, point.kept)
                trunk.put(self._arena, point)
                life.holds(trunk.stored)
                self._resolver.captured(trunk, point)

    def _into_arena(self, trunk: ForkPoint, life: Incarnation, ref: SessionRef, kept: KeptIn) -> SharedPoint:
        self._arena.make_room(self._token_nbytes * trunk.at)
        store = self._arena.store
        return self._arena.capture(life.context_of(store), ref, kept.of(store))

    def _here(self, trunk: ForkPoint, life: Incarnation, decision: Decision) -> Placed:
        if trunk.held is not None and trunk.lives_in(life):
            resident = Resident(trunk.held.ref, trunk.kept)
            return Placed(trunk.held.ref, resident, decision, trunk.turns)
        found = life.resident(trunk.key)
        if found is None:  # let go of since the decision: once more, with what is stored
            again = self._planner.decide(trunk, life, decision.policy)
            return self._hydrate(trunk, life, again) if again.action == "hydrate" else self._prefill(trunk, life, again)
        parent = None if trunk.stored is None else trunk.stored.parent
        return Placed(found.ref, found, decision, trunk.turns, found.restore, parent)

    def _hydrate(self, trunk: ForkPoint, life: Incarnation, decision: Decision) -> Placed:
        capture_s = 0.0 if trunk.stored is not None else self.capture(trunk)
        stored = trunk.stored
        if stored is None:  # forgotten since the decision
            return self._prefill(trunk, life, self._planner.decide(trunk, life, decision.policy))
        began = time.perf_counter()
        resident, live = self._load(stored, life)
        seconds = time.perf_counter() - began
        tier, link = stored.where.loaded(live.plan), life.came_over(live.plan)
        tier = "node" if link else tier
        life.holds(stored)
        self._planner.rates.load(tier, live.proof.nbytes, seconds, link)
        life.keep(trunk.key, resident)
        done = msgspec.structs.replace(decision, tier=tier, nbytes=live.proof.nbytes, link=link)
        return Placed(live.session, resident, done, trunk.turns, live.proof, stored.parent, capture_s, seconds)

    @staticmethod
    def _load(stored: StoredPoint, life: Incarnation) -> tuple[Resident, Hydration]:
        store = stored.where.store
        live = hydrate(life.context_of(store), stored.point)
        return Resident(live.session, KeptIn().add(store, live.kept), live.proof), live

    def _prefill(self, trunk: ForkPoint, life: Incarnation, decision: Decision) -> Placed:
        """Run the trunk's tokens through the model, behind the longest stored prefix of them if they are plain."""
        engine = life.engine
        resident, start = self._longest(trunk, life) if trunk.plain else (None, 0)
        if resident is None:
            resident = Resident(engine.open(seed=int(U64(trunk.seed))))
        rest = trunk.tokens[start:]
        began = time.perf_counter()
        if rest:
            engine.append(resident.ref, rest).result()
            self._planner.rates.prefilled(len(rest), time.perf_counter() - began)
        turns = engine.view(resident.ref).turns if trunk.plain else trunk.turns
        life.keep(trunk.key, resident)  # from here on others may bring so many points that this one goes
        reason = decision.reason if not start else f"a stored prefix of {start} tokens was loaded, the rest prefilled"
        done = msgspec.structs.replace(decision, num_prefilled_tokens=len(rest), reason=reason)
        return Placed(resident.ref, resident, done, turns, resident.restore)

    def _longest(self, trunk: ForkPoint, life: Incarnation) -> tuple[Resident | None, int]:
        """A session at the longest stored prefix of plain tokens, and its length."""
        model = objects.encode(life.engine.identity())[0]
        found = [(where, match(where.store, [model], trunk.tokens)) for where in self._stores]
        usable = [StoredPoint(where, at) for where, at in found if at is not None and at.num_tokens >= MIN_MATCH]
        if not usable:
            return None, 0
        longest = max(usable, key=lambda stored: stored.point.num_tokens)
        try:
            resident, _ = self._load(longest, life)
        except OLD_KV:  # the weights changed since the look at them
            return None, 0
        return resident, longest.point.num_tokens
