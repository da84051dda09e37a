"""Take a snapshot of an engine that works: every session at a token boundary of its own, none is stopped.

Sessions do not depend on one another, so cuts at moments of their own are a consistent one: what a session has is one
moment's, and what was given out of it is written down after it was captured. Taken are the repository's own sessions
in its namespace; what cannot be captured is named in the snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from thaw._version import __version__
from thaw.core.errors import InvalidRequest, ThawError
from thaw.core.ids import CommitId
from thaw.core.objects import AnyModel, Commit, State
from thaw.engines.base import SessionView
from thaw.repo import settings
from thaw.repo.parallel import each
from thaw.repo.repository import Repository
from thaw.repo.session import Session
from thaw.snapshot import manifest
from thaw.snapshot.manifest import EngineRecord, EngineSnapshot, MissedEntry, RequestEntry, SessionEntry, Was
from thaw.snapshot.outputs import given
from thaw.snapshot.queue import RequestQueue
from thaw.snapshot.request import QueuedRequest
from thaw.store import Store

DEFAULT_NAME = "engine"


class CapturedSession(NamedTuple):
    """A session's commit, and what the session was before it was captured."""

    session: Session
    view: SessionView
    commit: CommitId


def snapshot(
    repo: Repository,
    name: str = DEFAULT_NAME,
    *,
    queue: RequestQueue | None = None,
    replace: bool = False,
) -> EngineSnapshot:
    """Store all live sessions of `repo`'s namespace, the requests of `queue` and the engine's settings, as the branch
    `name`. Nothing stops meanwhile; branches stay where they are. Durable when this returns.

    Raises `RefConflict` where the name is taken (unless `replace`), `InvalidRequest` where nothing is live.
    """
    manifest.check_free(repo.store, name, replace=replace)
    sessions = own_sessions(repo)
    waiting = requests_of(queue)
    captured, missed = capture_all(sessions, waiting, lambda one: _capture(one, f"{name}: a session"))
    if not captured and not missed:
        raise InvalidRequest("no session is live in this repository and namespace; there is nothing to keep")
    entries = entries_of(repo.store, captured, waiting)
    record = record_of(repo, queue, len(entries), missed)
    return manifest.write(repo.store, name, _model(repo), record, entries, replace=replace)


def own_sessions(repo: Repository) -> list[Session]:
    """Those that are open in this namespace, oldest first."""
    found = []
    for session in repo.live_sessions():
        if session.namespace == repo.namespace and repo.commits_of(session):
            found.append(session)
    return found


def requests_of(queue: RequestQueue | None) -> dict[int, QueuedRequest]:
    """By what their session is: what has not ended, and what a client may still want to hear the end of."""
    if queue is None:
        return {}
    return {id(one.session): one for one in queue.known() if one.status != "failed"}


def capture_all(
    sessions: Iterable[Session], requests: Mapping[int, QueuedRequest], capture: Callable[[Session], CapturedSession]
) -> tuple[list[CapturedSession], list[MissedEntry]]:
    """What runs first, as the others do not change meanwhile; in the queue's order, then by age."""
    wanted = [one for one in sessions if id(one) in requests or _has_tokens(one)]
    order = sorted(wanted, key=lambda one: _place(requests.get(id(one))))
    done, missed = list[CapturedSession](), list[MissedEntry]()
    for session, outcome in zip(order, each(capture, order), strict=True):
        if isinstance(outcome, CapturedSession):
            done.append(outcome)
        else:
            request = requests.get(id(session))
            why = f"{outcome.kind}: {outcome}"
            missed.append(MissedEntry(session=session.engine_ref, why=why, request=request.id if request else None))
    return done, missed


def _place(request: QueuedRequest | None) -> tuple[int, int, int]:
    if request is None or request.ended:
        return (2, 0, 0)
    return (request.status == "waiting", request.priority, request.number)


def _has_tokens(session: Session) -> bool:
    try:
        return bool(session.num_tokens)
    except ThawError:
        return False  # closed just now


def _capture(session: Session, message: str) -> CapturedSession:
    view = session.view()
    done = session.committed() or session.snapshot(message)
    if view.parked:
        session.park()
    return CapturedSession(session, view, done.commit)


def entries_of(
    store: Store, captured: Iterable[CapturedSession], requests: Mapping[int, QueuedRequest]
) -> list[SessionEntry]:
    """In the order of the queue, then of age."""
    found = []
    for one in captured:
        request = requests.get(id(one.session))
        commit = store.get_as(one.commit, Commit)
        state = store.get_as(commit.state, State)
        found.append(
            SessionEntry(
                session=one.session.engine_ref,
                commit=one.commit,
                was=_was(one.view, request),
                num_tokens=state.num_tokens,
                num_kv=state.num_kv,
                prefix=commit.state,
                parent=one.session.parent,
                branch=one.session.branch,
                num_inherited=one.session.num_inherited,
                request=None if request is None else _entry(request, state.num_tokens),
            )
        )
    return found


def _was(view: SessionView, request: QueuedRequest | None) -> Was:
    if request is not None and not request.ended:
        return "waiting" if request.status == "waiting" else "running"
    return "running" if view.running else "parked" if view.parked else "idle"


def _entry(request: QueuedRequest, num_tokens: int) -> RequestEntry:
    num_seen, tokens = request.given()
    left = max(0, request.start - num_tokens)
    return RequestEntry(
        id=request.id,
        priority=request.priority,
        number=request.number,
        start=request.start,
        sampling=request.sampling,
        prompt=manifest.packed(request.prompt[len(request.prompt) - left :]),
        given=given(tokens[:num_seen]),
    )


def record_of(
    repo: Repository, queue: RequestQueue | None, num_sessions: int, missed: Iterable[MissedEntry]
) -> EngineRecord:
    engine = repo.engine
    info = engine.info
    options = settings.of_engine(engine).options
    return EngineRecord(
        format=manifest.FORMAT,
        engine=info.name,
        version=info.version,
        model=info.model.rstrip("/").rpartition("/")[2],
        device=info.device,
        thaw=__version__,
        policy=engine.policy_version,
        max_num_seqs=queue.max_num_seqs if queue is not None else 0,
        num_sessions=num_sessions,
        options={name: value for name, value in options.items() if _is_plain(value)},
        numerics=dict(info.numerics),
        missed=tuple(missed),
    )


def _is_plain(value: object) -> bool:
    """Whether it may travel: nothing that names a file, an address or a key."""
    return value is None or isinstance(value, (bool, int, float)) or (isinstance(value, str) and value.isidentifier())


def _model(repo: Repository) -> AnyModel:
    return repo.engine.identity()
