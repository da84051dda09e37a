"""From what callers give as a point to the fork point of a round.

They give a session, a result, a snapshot, a point's name in the pool's repository, or token ids.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence

from thaw.core.errors import EngineDied, InvalidRequest, NotFound
from thaw.core.ids import CommitId
from thaw.core.points import Point
from thaw.core.sampling import fresh_seed
from thaw.engines.text import cut_turns
from thaw.pool.schedule.captures import Captures
from thaw.pool.schedule.fork_point import ForkPoint
from thaw.pool.session import PoolSession
from thaw.pool.shm.shared_store import SharedPoint
from thaw.pool.snapshot import Snapshot
from thaw.pool.stores import KeptIn, StoredPoint, Stores
from thaw.pool.values import BranchResult
from thaw.pool.workers.worker import Incarnation, OwnedSession
from thaw.repo import timeline
from thaw.repo.context import Context
from thaw.repo.kept import Kept
from thaw.repo.repository import Repository
from thaw.repo.resolve import ResolvedPoint
from thaw.repo.session import Session


class PointResolver:
    """`life_of`: the life that holds a session's engine. `policy`: the version that runs now."""

    def __init__(
        self,
        stores: Stores,
        captures: Captures,
        repo: Repository | None,
        life_of: Callable[[Session], Incarnation | None],
        policy: Callable[[], str],
    ) -> None:
        self._stores, self._arena, self._captures, self._repo = stores, stores.arena, captures, repo
        self._life_of, self._policy = life_of, policy

    def find(self, point: object, at: int | None = None, seed: int | None = None) -> ForkPoint:
        """Raises `InvalidRequest`, `NotFound`, `BadPoint`, `StaleSession`, `EngineDied`."""
        if isinstance(point, BranchResult):
            if point.session is None:
                why = point.error or "its round had keep=False"
                raise InvalidRequest(f"branch {point.index} has no session to go on from: {why}")
            point = point.session
        if isinstance(point, Snapshot):
            whole, at = point.point, check_at(at, point.num_tokens)
            return self._of_arena(whole, at if at < whole.point.num_tokens else None, seed)
        if isinstance(point, Session):
            return self._of_session(point, at, seed)
        if isinstance(point, (str, Point, ResolvedPoint)):
            return self._of_repo(point, at, seed)
        if isinstance(point, Sequence) and all(isinstance(token, int) for token in point):
            return self._of_tokens(tuple(int(token) for token in point), at, seed)
        raise InvalidRequest(
            f"a {type(point).__name__} is no point: give a session, a result, a snapshot, a point's name in the "
            "pool's repository, or token ids"
        )

    def _of_session(self, session: Session, at: int | None, seed: int | None) -> ForkPoint:
        captured = self._captures.of_session(session)
        life = self._life_of(session)
        if life is None and not isinstance(session, PoolSession):
            return self._of_elsewhere(session, at, seed)
        if life is not None and not life.over:
            with contextlib.suppress(EngineDied):  # it died just now
                return self._of_living(session, life, captured, at, seed)
        return self._of_dead(session, captured, at, seed)

    def _of_living(
        self, session: Session, life: Incarnation, captured: SharedPoint | None, at: int | None, seed: int | None
    ) -> ForkPoint:
        ref, view = session.ref, session.view()
        at = check_at(at, len(view.tokens))
        held = OwnedSession(life, life.engine.fork(ref, 1, at=at, replay=True).result()[0])
        fork = life.engine.view(held.ref)
        held.kept = self._kept_of(session, fork.num_kv)
        point = ForkPoint(
            key=("live", ref, at), at=at, tokens=fork.tokens, turns=fork.turns,
            seed=fork.seed if seed is None else seed, policy=fork.turns[-1].policy if fork.turns else self._policy(),
            held=held, source=(weakref.ref(session), ref),
        )  # fmt: skip
        if captured is not None and captured.point.num_tokens >= at:
            held.kept = held.kept.add(self._arena.store, captured.kept)
            return self._captures.known(point, captured)
        return point

    def _of_elsewhere(self, session: Session, at: int | None, seed: int | None) -> ForkPoint:
        """A session of an engine that is not in the pool: captured by that engine, now, unless it was already."""
        captured, position = self._captures.of_session(session), check_at(at, len(session.view().tokens))
        if captured is None or captured.point.num_tokens < position:
            ref = session.ref
            captured = self._arena.capture(Context(self._arena.store, session.engine), ref, Kept())
            self._captures.add_session(session, ref, captured)
        return self._of_arena(captured, min(position, captured.point.num_tokens), seed)

    def _of_dead(self, session: Session, captured: SharedPoint | None, at: int | None, seed: int | None) -> ForkPoint:
        """What is left of a session whose worker died: its snapshot, or (for policy "fast") its tokens."""
        known = session.history if isinstance(session, PoolSession) else None
        if captured is not None and (known is None or len(known.tokens) == captured.point.num_tokens or at is not None):
            return self._of_arena(captured, at, seed)
        if known is None:
            raise EngineDied(
                "the session's worker has ended, it was not captured, and what was added to it since is not known. "
                "Fork from a snapshot (pool.snapshot) where a session must outlive its worker"
            )
        at = check_at(at, len(known.tokens))
        turns = cut_turns(known.turns, known.tokens, at, None)
        return ForkPoint(
            key=("lost", known.policy, known.tokens[:at]), at=at, tokens=known.tokens[:at], turns=turns,
            seed=known.seed if seed is None else seed, policy=known.policy,
        )  # fmt: skip

    def _kept_of(self, session: Session, num_kv: int) -> KeptIn:
        """What the pool's stores have of it."""
        kept = session.kept_in.cut(num_kv) if isinstance(session, PoolSession) else KeptIn()
        for where in self._stores.all:
            if session.commits_to(where.store):  # the session itself knows best
                kept = kept.add(where.store, session.kept_at(num_kv))
        return kept

    def _of_arena(self, point: SharedPoint, at: int | None, seed: int | None) -> ForkPoint:
        return self._of_stored(StoredPoint(self._arena, self._arena.at(point, at), point), seed)

    def _of_repo(self, point: str | Point | ResolvedPoint, at: int | None, seed: int | None) -> ForkPoint:
        if self._repo is None or self._stores.durable is None:
            raise InvalidRequest(f"{str(point)!r} names a point of a repository, and the pool has none: give repo=…")
        where = self._repo.resolve(point)
        if at is not None:
            where = self._repo.at(where, token=at)
        return self._of_stored(StoredPoint(self._stores.durable, where), seed, where.commit)

    def _of_stored(self, stored: StoredPoint, seed: int | None, parent: CommitId | None = None) -> ForkPoint:
        store, where = stored.where.store, stored.point
        line = timeline.read(store, timeline.read_state(store, where.state))
        turns = cut_turns(line.turns, line.tokens, where.num_tokens, None)
        if not where.num_tokens:
            raise InvalidRequest(f"{where} is empty; give token ids, or a point with at least one token")
        return ForkPoint(
            key=("stored", store.uuid, where.state, where.num_tokens), at=where.num_tokens,
            tokens=line.tokens[: where.num_tokens], turns=turns, seed=int(line.state.seed) if seed is None else seed,
            policy=turns[-1].policy if turns else self._policy(), stored=stored, parent=parent,
        )  # fmt: skip

    def _of_tokens(self, tokens: tuple[int, ...], at: int | None, seed: int | None) -> ForkPoint:
        if not tokens:
            raise InvalidRequest("no tokens to fork from; give at least one")
        tokens, policy = tokens[: check_at(at, len(tokens))], self._policy()
        point = ForkPoint(
            key=("tokens", policy, tokens), at=len(tokens), tokens=tokens, turns=(),
            seed=fresh_seed() if seed is None else seed, policy=policy, plain=True,
        )  # fmt: skip
        self._captures.if_prompt(point)
        return point


def check_at(at: int | None, num_tokens: int) -> int:
    """`at` inside [1, num_tokens]; the end when it is None."""
    if not num_tokens:
        raise InvalidRequest("the session is empty; append something first")
    if at is None:
        return num_tokens
    if not 1 <= at <= num_tokens:
        raise NotFound(f"at={at}: the point has {num_tokens} tokens, so it is in 1 … {num_tokens}")
    return at
