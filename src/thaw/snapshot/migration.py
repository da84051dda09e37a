"""Migrate: sessions and their requests go on in another engine, and whoever follows a request notices nothing.

    interrupt    a request that runs stops at the next token; nothing of it is lost or given out twice
    store        the session, in the repository of its own
    carry        where the other engine's repository is another one: by a remote that both have
    hydrate      there, and hand the request over: the same object, its output goes on behind what it has

The session here is closed once it is open there. What fails before leaves it here, and its request goes on here.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from thaw.core.errors import Busy, InvalidRequest, ThawError
from thaw.core.ids import CommitId
from thaw.repo import resolve
from thaw.repo.reopen import reopen
from thaw.repo.repository import Repository
from thaw.repo.session import Session
from thaw.snapshot.queue import RequestQueue
from thaw.snapshot.request import QueuedRequest
from thaw.snapshot.take import own_sessions


@dataclass(frozen=True)
class Migrated:
    """One session: as it is there, the request that went with it, the point that it went by, and how long nothing was
    generated."""

    session: Session
    request: QueuedRequest | None
    point: CommitId
    seconds: float


def migrate(
    source: RequestQueue,
    destination: RequestQueue,
    sessions: Sequence[Session] | None = None,
    *,
    remote: str | None = None,
) -> list[Migrated]:
    """Move sessions (default: all of `source`'s namespace) from one queue's engine to another's.

    A session without tokens or a request has nothing to move: it stays here, and is an error only if it was named.
    Both queues are of one repository, or `remote` names one that both repositories have: what goes there goes by a
    branch that is deleted again. The sessions here are closed; the returned ones stand in their place, on their branch.

    Raises what stopped the first one that could not be moved, with those before it moved and all others here.
    """
    wanted = _all_of(source) if sessions is None else list(sessions)
    same = source.repo.store.uuid == destination.repo.store.uuid
    if source is destination or source.repo.engine is destination.repo.engine:
        raise InvalidRequest("the two queues have one engine; there is nowhere to go")
    if source.repo.namespace != destination.repo.namespace:
        raise InvalidRequest("the two queues are of different namespaces, which share no session")
    if not same and remote is None:
        raise InvalidRequest("the two repositories are different ones: name a remote that both have (remote=…)")
    carried = None if same else remote
    return [_move(source, destination, session, carried) for session in wanted]


def _all_of(source: RequestQueue) -> list[Session]:
    asked = {one.session for one in source.requests()}
    return [one for one in own_sessions(source.repo) if one in asked or one.view().tokens]


def _move(source: RequestQueue, destination: RequestQueue, session: Session, remote: str | None) -> Migrated:
    request = next((one for one in source.requests() if one.session is session), None)
    view = session.view()
    if not view.tokens and request is None:
        raise InvalidRequest("the session is empty; open one there instead")
    started = time.monotonic()
    source.stop(request)
    if request is not None and request.ended:
        request = None
    try:
        if request is None:
            _require_idle(source.repo, session)
        done = session.committed() or session.snapshot("migrated")
        there = _arrived(source.repo, destination.repo, session, done.commit, remote)
    except ThawError:
        source.go_on(request)
        raise
    if view.parked:
        there.park()
    seconds = time.monotonic() - started
    if request is not None:
        source.remove(request)
        request.move_to(there)
        request.number = 0
        destination.add(request)
    session.close()
    return Migrated(there, request, done.commit, seconds)


def _require_idle(repo: Repository, session: Session) -> None:
    if session.view().running:
        raise Busy("the session generates outside of the queue; wait for it, cancel it, or submit it to the queue")


def _arrived(here: Repository, there: Repository, session: Session, point: CommitId, remote: str | None) -> Session:
    parent, branch = session.parent, session.branch
    if remote is not None:
        _carry(here, there, point, remote)
        parent = parent if parent is not None and there.store.has(parent) else None
    where = resolve.at(there.store, point)
    return reopen(there, where, parent=parent, branch=branch, num_inherited=session.num_inherited)


def _carry(here: Repository, there: Repository, point: CommitId, remote: str) -> None:
    """Through the remote, under a name of its own that is gone afterwards."""
    name = f"migrating-{secrets.token_hex(8)}"
    here.branch(name, resolve.at(here.store, point))
    try:
        here.push(name, remote=remote)
        there.fetch(name, remote=remote)
        here.push(name, remote=remote, delete=True)
    finally:
        here.delete_branch(name)
