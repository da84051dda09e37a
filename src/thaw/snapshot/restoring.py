"""Restore a snapshot into an engine: from the store alone, in this process or another, on this host or another.

    check       the snapshot can be read, and was not restored yet (or a fork was asked for)
    hydrate     every session, beside one that begins with the same KV, so that they share it as they did; its place in
                history is what it was
    claim       the branch moves by compare-and-swap: of two restores one wins, and the other leaves nothing behind
    go on       requests that ran first, all at once, then those that waited; parked sessions are parked

What was given out of a stream is generated again only as far as it lay behind the capture, and must be the same tokens.
A session that cannot be restored is named, and the others go on; where none can, the first one's error is raised.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from thaw.core.errors import Conflict, CorruptBlob, LawBroken, RefConflict, StorageFailed, ThawError
from thaw.core.ids import CommitId, StateId, short
from thaw.core.sampling import derive
from thaw.engines.base import Engine, Policy, SessionRef
from thaw.repo import resolve
from thaw.repo.parallel import each
from thaw.repo.reopen import reopen
from thaw.repo.repository import Repository
from thaw.repo.session import Session
from thaw.repo.timeline import read_state
from thaw.repo.trunks import trunks
from thaw.snapshot import manifest
from thaw.snapshot.manifest import EngineSnapshot, MissedEntry, RequestEntry, RestoredRecord, SessionEntry
from thaw.snapshot.outputs import GivenTokens
from thaw.snapshot.queue import DEFAULT_NUM_SEQS, RequestQueue
from thaw.snapshot.request import QueuedRequest
from thaw.snapshot.take import DEFAULT_NAME
from thaw.store import Store


@dataclass(frozen=True)
class RestoredEngine:
    """`sessions`: by the names that they had in the engine that was snapshotted. `missed`: what was not restored, with
    what the snapshot had not captured. `seconds`: until all were there."""

    snapshot: EngineSnapshot
    queue: RequestQueue
    sessions: dict[str, Session]
    missed: tuple[MissedEntry, ...]
    seconds: float

    @property
    def num_recomputed_tokens(self) -> int:
        """Tokens that were prefilled again and not loaded: 0, unless `policy="recompute"` allowed it."""
        return sum(one.proof.num_recomputed_tokens for one in self.sessions.values() if one.proof is not None)


def restore(
    repo: Repository,
    name: str = DEFAULT_NAME,
    *,
    fork: bool = False,
    max_num_seqs: int | None = None,
    policy: Policy = "exact",
    source: Store | None = None,
) -> RestoredEngine:
    """The sessions and requests of the snapshot `name`, in `repo`'s engine. Requests go on at once.

    `source`: the store that has the snapshot, if it is not `repo`'s own; sessions commit to `repo` all the same.

    `fork`: a snapshot that was restored before (or may be restored elsewhere) is restored once more; sessions draw from
    seeds of their own from there on, and what lay behind the capture is not theirs. `max_num_seqs`: default that of the
    snapshot's queue. An engine without sessions takes the snapshot's policy version; its weights must be the same.

    Raises `Conflict` where it was restored already, `NotFound`, what hydrating raises, where no session can be
    restored.
    """
    started = time.monotonic()
    store = source or repo.store
    found = manifest.read(store, name)
    if found.restored is not None and found.restored.taken and not fork:
        raise Conflict(_restored_already(found))
    former = _take_policy(repo, found)
    if fork:
        found = _claim(repo, store, found, fork=True)
    number = found.restored.num_forks if fork and found.restored is not None else 0
    outcomes = _reopen_all(repo, source, found.sessions, number, policy)
    live = [one for one in outcomes if isinstance(one, Session)]
    if not live and outcomes:
        repo.engine.set_policy(former)
        raise next(one for one in outcomes if isinstance(one, ThawError))
    try:
        if not fork:
            found = _claim(repo, store, found, fork=False)
    except ThawError:
        for session in live:
            session.close()
        raise
    requests = _requests(found, outcomes, fork=fork)
    queue = RequestQueue(repo, max_num_seqs=max_num_seqs or found.record.max_num_seqs or DEFAULT_NUM_SEQS)
    for request in requests:
        queue.add(request)
    return RestoredEngine(
        snapshot=found,
        queue=queue,
        sessions={
            entry.session: one for entry, one in zip(found.sessions, outcomes, strict=True) if isinstance(one, Session)
        },
        missed=(*found.missed, *_missed(found.sessions, outcomes), *_failed(requests)),
        seconds=time.monotonic() - started,
    )


def _restored_already(found: EngineSnapshot) -> str:
    assert found.restored is not None
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(found.restored.time_s))
    return (
        f"the snapshot {found.name!r} was restored on {when} by {found.restored.engine} on {found.restored.device}: "
        "its streams continue there, and restoring it again would deliver their tokens twice. To continue from it once "
        "more with other seeds, fork it (fork=True, --fork)."
    )


def _take_policy(repo: Repository, found: EngineSnapshot) -> str:
    """An engine that has no sessions yet runs the weights under the snapshot's version. Returns the former one."""
    engine: Engine = repo.engine
    former = engine.policy_version
    if engine.policy_version != found.record.policy and not repo.live_sessions():
        engine.set_policy(found.record.policy)
    return former


def _claim(repo: Repository, store: Store, found: EngineSnapshot, *, fork: bool) -> EngineSnapshot:
    info, before = repo.engine.info, found.restored
    told = RestoredRecord(
        time_s=time.time(),
        engine=info.name,
        device=info.device,
        taken=not fork or (before is not None and before.taken),
        num_forks=(before.num_forks if before is not None else 0) + fork,
    )
    try:
        tip = manifest.note_restored(store, found, repo.engine.identity(), told)
    except RefConflict:
        raise Conflict(f"{found.name!r} was restored by somebody else just now, or replaced; look again") from None
    except StorageFailed as error:
        raise StorageFailed(f"a restore is written down first, so that no stream is given out twice: {error}") from None
    return msgspec.structs.replace(found, restored=told, tip=tip)


def _reopen_all(
    repo: Repository, source: Store | None, entries: Sequence[SessionEntry], number: int, policy: Policy
) -> list[Session | ThawError]:
    """All sessions or why not, in order, each once the one that it shares with is there; parked ones are parked at the
    end. `number`: of the fork that they are, else 0."""
    shares = "beside" in repo.engine.info.capabilities
    states = [StateId(entry.prefix) for entry in entries]
    before = trunks(source or repo.store, states) if shares else [None] * len(entries)
    done: dict[int, Session | ThawError] = {}

    def open_one(at: int) -> Session:
        trunk = before[at]
        beside = None if trunk is None else done[trunk]
        shared = beside if isinstance(beside, Session) else None
        return _reopened(repo, source, entries[at], number, policy, shared)

    while len(done) < len(entries):
        ready = [at for at, trunk in enumerate(before) if at not in done and (trunk is None or trunk in done)]
        done |= dict(zip(ready, each(open_one, ready), strict=True))
    parked = [one for at, one in done.items() if isinstance(one, Session) and entries[at].was == "parked"]
    failed = {
        one: why for one, why in zip(parked, each(Session.park, parked), strict=True) if isinstance(why, ThawError)
    }
    for session in failed:
        session.close()
    return [failed.get(one, one) if isinstance(one, Session) else one for _, one in sorted(done.items())]


def _reopened(
    repo: Repository, source: Store | None, entry: SessionEntry, number: int, policy: Policy, beside: Session | None
) -> Session:
    store = source or repo.store
    where = resolve.at(store, CommitId(entry.commit))
    if (where.state, where.num_tokens) != (entry.prefix, entry.num_tokens):
        raise CorruptBlob(f"commit {short(entry.commit)} is not the session that the snapshot tells of")
    parent = CommitId(entry.parent) if entry.parent and repo.store.has(entry.parent) else None
    seed = None
    if number:
        seed = derive(int(read_state(store, where.state).seed), entry.num_tokens, number)
    return reopen(
        repo, where, parent=parent, branch=entry.branch, num_inherited=entry.num_inherited, seed=seed, policy=policy,
        source=source, beside=beside,
    )  # fmt: skip


def _requests(found: EngineSnapshot, outcomes: Sequence[Session | ThawError], *, fork: bool) -> list[QueuedRequest]:
    """What had not ended, as it goes on; one whose output is not what was given out before has failed."""
    requests: list[QueuedRequest] = []
    for entry, session in zip(found.sessions, outcomes, strict=True):
        asked = entry.request or _cut_through(entry, session)
        if asked is None or not isinstance(session, Session):
            continue
        request = QueuedRequest(
            asked.id,
            session,
            manifest.unpacked(asked.prompt),
            asked.sampling,
            start=asked.start,
            priority=asked.priority,
            number=asked.number,
            before=GivenTokens() if fork else asked.given,
        )
        try:
            request.take_up(session.view())
        except LawBroken as error:
            request.fail(error)
        requests.append(request)
    return requests


def _cut_through(entry: SessionEntry, session: Session | ThawError) -> RequestEntry | None:
    """A completion that ran outside of a queue goes on too, by the name of the session's point."""
    if not isinstance(session, Session) or entry.was != "running":
        return None
    last = session.turns[-1] if session.turns else None
    if last is None or last.kind != "completion" or last.finish_reason is not None or last.sampling is None:
        return None
    return RequestEntry(id=short(entry.commit, 16), priority=0, number=0, start=last.start, sampling=last.sampling)


def _failed(requests: Sequence[QueuedRequest]) -> list[MissedEntry]:
    return [
        MissedEntry(session=one.session.engine_ref, why=f"{one.error.kind}: {one.error}", request=one.id)
        for one in requests
        if one.error is not None
    ]


def _missed(entries: Sequence[SessionEntry], outcomes: Sequence[Session | ThawError]) -> list[MissedEntry]:
    return [
        MissedEntry(
            session=SessionRef(entry.session),
            why=f"{one.kind}: {one} (its point is {short(entry.commit)})",
            request=entry.request.id if entry.request else None,
        )
        for entry, one in zip(entries, outcomes, strict=True)
        if not isinstance(one, Session)
    ]
