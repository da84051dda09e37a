"""What a snapshot of an engine is: commits, so that everything that keeps, checks and sends commits does so with it.

    NAME ──> top                 the engine, its settings, the queue's limit: `EngineRecord`
              ├──> group         at most 16 sessions: `SessionEntry` each, in order
              │      ├──> the session's commit     state, KV, turns with sampler, seeds, penalties' history, constraints
              │      └──> …
              └──> …

The top and the groups are commits of no tokens; what they say stands in their `meta`. They are content-addressed, one
branch names the top, `push` sends all of it, and gc keeps what it names. A restore puts one more commit on the branch,
so that a second one sees it. No KV, path of a store, or key here.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Literal, TypeVar

import msgspec

from thaw._version import __version__
from thaw.core.canonical import U64
from thaw.core.errors import CorruptBlob, InvalidRequest, NewerFormat, NotFound, RefConflict
from thaw.core.ids import CommitId, short
from thaw.core.objects import AnyModel, Commit, State, in_namespace
from thaw.core.sampling import Sampling
from thaw.repo import refs
from thaw.snapshot.outputs import GivenTokens
from thaw.store import RefUpdate, Store, Transaction

FORMAT = 1
FAN_OUT = 16
"""A commit has at most so many parents."""
GROUP_NBYTES = 4 << 20
"""Of the entries of a group, at most, unless one alone has more."""
TOP, GROUP, RESTORED = "thaw.engine", "thaw.engine.sessions", "thaw.engine.restored"
Was = Literal["running", "waiting", "parked", "idle"]
T = TypeVar("T")


class _Told(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What stands in a commit's meta."""


class RequestEntry(_Told, frozen=True, kw_only=True):
    """A request that had not ended. `start`: tokens of the session before its output; `prompt`: those of them that the
    session had not read yet, at its end (packed u32, base64). `given`: what had been given out."""

    id: str
    priority: int
    number: int
    start: int
    sampling: Sampling
    prompt: bytes = b""
    given: GivenTokens = GivenTokens()


class SessionEntry(_Told, frozen=True, kw_only=True):
    """A session. `was`: what it did at the cut. `session`: the name that it had in its engine. `parent`, `branch`: what
    its next commit follows and moves. `prefix`: which stored prefix it has cached, as a state's id."""

    session: str
    commit: str
    was: Was
    num_tokens: int
    num_kv: int
    prefix: str
    parent: str | None = None
    branch: str | None = None
    num_inherited: int = 0
    request: RequestEntry | None = None


class MissedEntry(_Told, frozen=True, kw_only=True):
    """A session or request that is not in the snapshot, and why."""

    session: str
    why: str
    request: str | None = None


class EngineRecord(_Told, frozen=True, kw_only=True):
    """The engine at the cut. `options`: what `load_engine` was given; `numerics`: what bits may depend on."""

    format: int
    engine: str
    version: str
    model: str
    device: str
    thaw: str
    policy: str
    max_num_seqs: int
    num_sessions: int
    options: dict[str, object] = {}
    numerics: dict[str, str] = {}
    missed: tuple[MissedEntry, ...] = ()


class RestoredRecord(_Told, frozen=True, kw_only=True):
    """The last restore: when (seconds since 1970), on what engine. `taken`: its streams go on somewhere; `num_forks`:
    how often it was restored beside them."""

    time_s: float
    engine: str
    device: str
    taken: bool = False
    num_forks: int = 0


class EngineSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot as it is stored: `commit` is its top."""

    name: str
    commit: CommitId
    record: EngineRecord
    sessions: tuple[SessionEntry, ...]
    restored: RestoredRecord | None = None
    tip: CommitId
    """Where the branch stands: at the top, or behind it at what tells of a restore."""

    @property
    def missed(self) -> tuple[MissedEntry, ...]:
        return self.record.missed

    def of(self, was: str) -> list[SessionEntry]:
        return [one for one in self.sessions if one.was == was]

    @property
    def prefixes(self) -> list[str]:
        """The stored prefixes that its sessions have cached, each once, the longest first."""
        longest = sorted(self.sessions, key=lambda one: -one.num_kv)
        return list(dict.fromkeys(one.prefix for one in longest if one.num_kv))


def packed(tokens: Sequence[int]) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in tokens)


def unpacked(data: bytes) -> tuple[int, ...]:
    return tuple(int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4))


# -- writing


def check_free(store: Store, name: str, *, replace: bool) -> None:
    """Raise `RefConflict` where a snapshot cannot be called so, before anything is captured."""
    ref = store.ref(refs.require_own(store, name))
    if ref is None or (replace and ref.kind == "branch" and _is_snapshot(store, ref.target)):
        return
    what = "a snapshot" if _is_snapshot(store, ref.target) else f"a {ref.kind}"
    way = "replace it (replace=True, --replace), or choose another name" if what == "a snapshot" else "choose another"
    raise RefConflict(f"{name!r} is {what} already; {way}")


def _is_snapshot(store: Store, commit: str) -> bool:
    return bool({TOP, RESTORED} & store.get_as(commit, Commit).meta.keys())


def write(
    store: Store, name: str, model: AnyModel, record: EngineRecord, entries: Sequence[SessionEntry], *, replace: bool
) -> EngineSnapshot:
    """Write the top and its groups and make the branch `name` point at it, in one transaction. Raises `RefConflict`
    where the name is taken, unless `replace`."""
    refs.require_own(store, name)
    with store.begin(*(entry.commit for entry in entries)) as tx:
        origin = {"engine": record.engine, "version": record.version, "device": record.device}
        write_commit = _Writer(store, tx, name, model, origin)
        groups = [
            write_commit(GROUP, "sessions", [one.commit for one in part], list(part)) for part in _groups(entries)
        ]
        top = write_commit(TOP, f"snapshot of {record.engine}", write_commit.narrowed(groups), record)
        expect: CommitId | Literal["any"] | None = "any" if replace else None
        reason = f"engine snapshot: {len(entries)} sessions"
        try:
            tx.commit(RefUpdate(name=name, kind="branch", target=top, expect=expect, reason=reason))
        except RefConflict:
            raise RefConflict(
                f"there is a branch or tag {name!r} already; choose another name, or replace it (replace=True, "
                f"--replace). The sessions are kept: {short(top)} is their snapshot, as long as reflogs are."
            ) from None
    return EngineSnapshot(name=name, commit=top, record=record, sessions=tuple(entries), tip=top)


def note_restored(store: Store, found: EngineSnapshot, model: AnyModel, told: RestoredRecord) -> CommitId:
    """Put the note behind the snapshot. Raises `RefConflict` where the branch has moved since it was read: somebody
    else has restored it."""
    with store.begin(found.tip) as tx:
        origin = {"engine": told.engine, "device": told.device}
        tip = _Writer(store, tx, found.name, model, origin)(RESTORED, "restored", [found.tip], told)
        tx.commit(RefUpdate(name=found.name, kind="branch", target=tip, expect=found.tip, reason="engine restored"))
    return tip


class _Writer:
    """Commits of no tokens, by what they say."""

    def __init__(self, store: Store, tx: Transaction, name: str, model: AnyModel, origin: dict[str, str]) -> None:
        self._origin = {**origin, "thaw": __version__}
        self._store, self._tx, self._name = store, tx, name
        empty = State(
            model=tx.put(model), num_tokens=0, num_kv=0, nodes=(), tail_tokens=(), turn_nodes=(), num_turns=0,
            seed=U64(0), salt=secrets.token_hex(16),
        )  # fmt: skip
        self._state = tx.put(empty)
        self._latest = 0

    def __call__(self, key: str, what: str, parents: Sequence[str], told: object) -> CommitId:
        times = [int(self._store.get_as(p, Commit).time_ns) for p in parents if self._store.has(p)]
        self._latest = max([time.time_ns(), self._latest + 1, *(before + 1 for before in times)])
        commit = Commit(
            state=self._state,
            parents=tuple(parents),
            message=f"{self._name}: {what}",
            time_ns=U64(self._latest),
            branch=self._name,
            meta={key: msgspec.json.encode(told).decode()} if key else {},
            origin=self._origin,
        )
        return CommitId(self._tx.put(in_namespace(commit, self._store.namespace)))

    def narrowed(self, commits: list[CommitId]) -> list[CommitId]:
        """At most as many as a commit may have parents: more are put together, in order."""
        while len(commits) > FAN_OUT:
            parts = [commits[i : i + FAN_OUT] for i in range(0, len(commits), FAN_OUT)]
            commits = [self("", "sessions", part, None) for part in parts]
        return commits


def _groups(entries: Sequence[SessionEntry]) -> list[list[SessionEntry]]:
    """In order; each of at most `FAN_OUT` sessions and, where it has several, `GROUP_NBYTES`."""
    groups: list[list[SessionEntry]] = []
    size = 0
    for entry in entries:
        nbytes = len(msgspec.json.encode(entry))
        if not groups or len(groups[-1]) == FAN_OUT or size + nbytes > GROUP_NBYTES:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += nbytes
    return groups


# -- reading


def read(store: Store, name: str) -> EngineSnapshot:
    """The snapshot that a branch names. Raises `NotFound`, `InvalidRequest` for a branch that is none, `CorruptBlob`,
    `NewerFormat`."""
    ref = store.ref(name)
    if ref is None:
        raise NotFound(f"there is no snapshot {name!r}; `thaw branch` lists what there is")
    tip = CommitId(ref.target)
    commit, restored, at = store.get_as(tip, Commit), None, tip
    while RESTORED in commit.meta:
        restored = restored or _read(commit, RESTORED, RestoredRecord, at)
        at = CommitId(commit.parents[0])
        commit = store.get_as(at, Commit)
    if TOP not in commit.meta:
        raise InvalidRequest(f"the branch {name!r} is a session's, not a snapshot of an engine")
    record = _read(commit, TOP, EngineRecord, at)
    if record.format > FORMAT:
        raise NewerFormat(f"{name!r} is a snapshot of format {record.format}: written by a newer thaw. Upgrade thaw.")
    entries: list[SessionEntry] = []
    _collect(store, commit, entries)
    if len(entries) != record.num_sessions:
        raise CorruptBlob(f"the snapshot {name!r} names {record.num_sessions} sessions and has {len(entries)}")
    return EngineSnapshot(name=name, commit=at, record=record, sessions=tuple(entries), restored=restored, tip=tip)


def _collect(store: Store, commit: Commit, entries: list[SessionEntry]) -> None:
    for parent in commit.parents:
        child = store.get_as(parent, Commit)
        if GROUP not in child.meta:
            _collect(store, child, entries)
            continue
        told = _read(child, GROUP, tuple[SessionEntry, ...], parent)
        if tuple(one.commit for one in told) != child.parents:
            raise CorruptBlob(f"the group {short(parent)} of a snapshot tells of other sessions than its own")
        entries.extend(told)


def _read(commit: Commit, key: str, kind: type[T], identifier: str) -> T:
    try:
        return msgspec.json.decode(commit.meta[key], type=kind)
    except (msgspec.DecodeError, ValueError) as error:
        raise CorruptBlob(f"commit {short(identifier)}: its {key} is not readable: {error}") from None
