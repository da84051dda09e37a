"""History: commits from a point, or from every ref, newest first and children before their parents."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator
from itertools import islice

import msgspec

from thaw.core import canonical
from thaw.core.cache import point_groups
from thaw.core.errors import CorruptBlob
from thaw.core.identity import ModelIdentity
from thaw.core.ids import CommitId, StateId
from thaw.core.kv_ranges import KVRange
from thaw.core.objects import Commit, Segment, SegmentNode, State
from thaw.store import Recorded, Ref, Store


class LogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One commit. `refs`: branches and tags that point at it, the current branch first, as "HEAD -> name".
    `points`: the numbers of tokens after which its recurrent layers' states are kept, of `state_nbytes` each.
    `shallow`: a parent of it was not fetched. `kv_ranges`: which weights computed its KV, where that is not its
    model's alone."""

    commit: CommitId
    state: StateId
    parents: tuple[CommitId, ...]
    refs: tuple[str, ...]
    message: str
    time_ns: int
    branch: str | None
    num_tokens: int
    num_turns: int
    meta: dict[str, str]
    origin: dict[str, str]
    points: tuple[int, ...] = ()
    state_nbytes: int = 0
    shallow: bool = False
    kv_ranges: tuple[KVRange, ...] = ()


def log(store: Store, starts: Iterable[CommitId], limit: int | None = None) -> list[LogEntry]:
    """The commits reachable from `starts`, newest first; with `limit` not many more are read than are needed."""
    found = list(islice(_newest_first(store, starts), limit))
    names = names_at(store, [identifier for identifier, _, _ in found]) if limit is not None else _all_names(store)
    states, absent = StatePoints(store), store.absent()
    return [
        entry(identifier, commit, state, names, states.of(commit.state, state.model), absent)
        for identifier, commit, state in found
    ]


def tips(store: Store) -> list[CommitId]:
    """What every branch and tag points at."""
    return [ref.target for ref in store.refs() if ref.target is not None]


def names_at(store: Store, commits: Iterable[CommitId]) -> dict[CommitId, tuple[str, ...]]:
    """The names of refs that point at these commits, in order, the current branch first."""
    return _names(store, store.refs_at(commits))


def _all_names(store: Store) -> dict[CommitId, tuple[str, ...]]:
    return _names(store, store.refs())


def _names(store: Store, refs: Iterable[Ref]) -> dict[CommitId, tuple[str, ...]]:
    out: dict[CommitId, list[str]] = {}
    head, remote = store.head, _of_remotes(store, refs := list(refs))
    for ref in refs:
        names = out.setdefault(ref.target, [])
        if ref.kind == "branch" and ref.name == head:
            names.insert(0, f"HEAD -> {ref.name}")
        else:
            names.append(ref.name if ref.kind == "branch" or ref.name in remote else f"tag: {ref.name}")
    return {commit: tuple(names) for commit, names in out.items()}


def _of_remotes(store: Store, refs: Iterable[Ref]) -> set[str]:
    """Those of `refs` that say where a branch of a remote was last seen."""
    maybe = [ref.name for ref in refs if ref.kind == "tag" and "/" in ref.name]
    if not maybe:
        return set()
    from thaw.remote import settings, tracking

    book = settings.read(store)
    return {name for name in maybe if tracking.is_tracking(name, book)}


class Size(msgspec.Struct, frozen=True, tag_field="type", tag="thaw.state/1"):
    """What `log` wants of a state."""

    model: str
    num_tokens: int
    num_turns: int

    @property
    def ranges(self) -> tuple[KVRange, ...]:
        return ()


class StaleSize(Size, frozen=True, tag="thaw.state/2"):
    """Of a state with KV of other weights."""

    kv_ranges: tuple[KVRange, ...]

    @property
    def ranges(self) -> tuple[KVRange, ...]:
        return self.kv_ranges


AnySize = Size | StaleSize


def _newest_first(store: Store, starts: Iterable[CommitId]) -> Iterator[tuple[CommitId, Commit, Size]]:
    """A commit is always later than its parents (see `commit`), so children come before parents without reading all."""
    ready: list[tuple[int, CommitId, Commit, Size]] = []
    seen: set[CommitId] = set()
    history, num, absent = _History(store), 0, store.absent()

    def add(identifiers: Iterable[CommitId]) -> None:
        for identifier in identifiers:
            if identifier not in seen:
                seen.add(identifier)
                commit, size = history.get(identifier, num)
                heapq.heappush(ready, (-commit.time_ns, identifier, commit, size))

    add(starts)
    while ready:
        _, identifier, commit, size = heapq.heappop(ready)
        num += 1
        yield identifier, commit, size
        add(CommitId(parent) for parent in commit.parents if parent not in absent)


AHEAD = 512


class _History:
    """Commits; those that were stored before one are read with it, as many as were wanted so far."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._read: dict[CommitId, Recorded] = {}

    def get(self, identifier: CommitId, num_so_far: int) -> tuple[Commit, Size]:
        found = self._read.pop(identifier, None)
        if found is None:
            found, *before = self._store.recorded(identifier, min(1 + num_so_far, AHEAD))
            self._read.update((one.id, one) for one in before)
        try:
            commit = canonical.decode_stored(found.commit, self._store.commit_kind, f"commit {identifier}")
            what = f"the state of commit {identifier}"
            return commit, canonical.decode_stored(found.state, AnySize, what)  # type: ignore[arg-type]
        except msgspec.DecodeError as error:
            raise CorruptBlob(f"commit {identifier}: {error}. Run `thaw fsck`.") from None


class StatePoints:
    """The states that commits keep of recurrent layers; nothing is read of commits of models without such."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._nbytes: dict[str, int] = {}
        self._in_nodes: dict[str, tuple[int, ...]] = {}

    def of(self, state: str, model: str) -> tuple[tuple[int, ...], int]:
        """(the numbers of tokens, the bytes of one state)."""
        nbytes = self._of_model(model)
        if not nbytes:
            return (), 0
        nodes = self._store.get_as(state, State).nodes
        return tuple(token for node in nodes for token in self._of_node(node)), nbytes

    def _of_model(self, model: str) -> int:
        if model not in self._nbytes:
            groups = self._store.get_as(model, ModelIdentity).groups
            self._nbytes[model] = sum(group.nbytes for group in point_groups(groups))
        return self._nbytes[model]

    def _of_node(self, node: str) -> tuple[int, ...]:
        if node not in self._in_nodes:
            pairs = [(e, self._store.get_as(e.segment, Segment)) for e in self._store.get_as(node, SegmentNode).entries]
            found = [p.token for e, segment in pairs for p in segment.states if p.token <= e.start + e.length]
            self._in_nodes[node] = tuple(found)
        return self._in_nodes[node]


def entry(
    identifier: CommitId,
    commit: Commit,
    state: State | Size,
    names: dict[CommitId, tuple[str, ...]],
    states: tuple[tuple[int, ...], int],
    absent: Collection[str] = (),
) -> LogEntry:
    """One commit as `log` shows it; `absent`: commits that were not fetched."""
    return LogEntry(
        commit=identifier,
        state=StateId(commit.state),
        parents=tuple(map(CommitId, commit.parents)),
        refs=names.get(identifier, ()),
        message=commit.message,
        time_ns=int(commit.time_ns),
        branch=commit.branch,
        num_tokens=state.num_tokens,
        num_turns=state.num_turns,
        meta=commit.meta,
        origin=commit.origin,
        points=states[0],
        state_nbytes=states[1],
        shallow=any(parent in absent for parent in commit.parents),
        kv_ranges=state.ranges,
    )
