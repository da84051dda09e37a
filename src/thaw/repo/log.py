"""History: commits from a point, or from every ref, newest first and children before their parents."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import msgspec

from thaw.core.ids import CommitId, StateId
from thaw.core.objects import Commit, State
from thaw.store import Store


class LogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One commit. `refs`: branches and tags that point at it, the current branch first, as "HEAD -> name"."""

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


def log(store: Store, starts: Iterable[CommitId], limit: int | None = None) -> list[LogEntry]:
    """The commits reachable from `starts`, at most `limit` of them."""
    commits = _reachable(store, starts)
    names = refs_by_commit(store)
    order = _ordered(commits)[:limit]
    return [_entry(store, identifier, commits[identifier], names) for identifier in order]


def tips(store: Store) -> list[CommitId]:
    """What every branch and tag points at."""
    return [ref.target for ref in store.refs() if ref.target is not None]


def refs_by_commit(store: Store) -> dict[CommitId, tuple[str, ...]]:
    out: dict[CommitId, list[str]] = {}
    for ref in store.refs():
        names = out.setdefault(ref.target, [])
        if ref.kind == "branch" and ref.name == store.head:
            names.insert(0, f"HEAD -> {ref.name}")
        else:
            names.append(ref.name if ref.kind == "branch" else f"tag: {ref.name}")
    return {commit: tuple(names) for commit, names in out.items()}


def _reachable(store: Store, starts: Iterable[CommitId]) -> dict[CommitId, Commit]:
    found: dict[CommitId, Commit] = {}
    waiting = list(starts)
    while waiting:
        identifier = waiting.pop()
        if identifier not in found:
            found[identifier] = store.get_as(identifier, Commit)
            waiting += [CommitId(parent) for parent in found[identifier].parents]
    return found


def _ordered(commits: dict[CommitId, Commit]) -> list[CommitId]:
    """Newest first; a commit comes after all of its children, whatever the clocks said."""
    children = dict.fromkeys(commits, 0)
    for commit in commits.values():
        for parent in commit.parents:
            children[CommitId(parent)] += 1
    ready = [(-commits[i].time_ns, i) for i, n in children.items() if not n]
    heapq.heapify(ready)
    order: list[CommitId] = []
    while ready:
        _, identifier = heapq.heappop(ready)
        order.append(identifier)
        for parent in map(CommitId, commits[identifier].parents):
            children[parent] -= 1
            if not children[parent]:
                heapq.heappush(ready, (-commits[parent].time_ns, parent))
    return order


def _entry(store: Store, identifier: CommitId, commit: Commit, names: dict[CommitId, tuple[str, ...]]) -> LogEntry:
    state = store.get_as(commit.state, State)
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
    )
