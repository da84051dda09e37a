"""History: commits from a point, or from every ref, newest first and children before their parents."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from itertools import islice

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
    """The commits reachable from `starts`, newest first; with `limit` no more are read than are needed."""
    names = refs_by_commit(store)
    walk = _newest_first(store, starts)
    return [entry(store, identifier, commit, names) for identifier, commit in islice(walk, limit)]


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


def _newest_first(store: Store, starts: Iterable[CommitId]) -> Iterator[tuple[CommitId, Commit]]:
    """A commit is always later than its parents (see `commit`), so children come before parents without reading all."""
    ready: list[tuple[int, CommitId, Commit]] = []
    seen: set[CommitId] = set()

    def add(identifiers: Iterable[CommitId]) -> None:
        for identifier in identifiers:
            if identifier not in seen:
                seen.add(identifier)
                commit = store.get_as(identifier, Commit)
                heapq.heappush(ready, (-commit.time_ns, identifier, commit))

    add(starts)
    while ready:
        _, identifier, commit = heapq.heappop(ready)
        yield identifier, commit
        add(map(CommitId, commit.parents))


def entry(store: Store, identifier: CommitId, commit: Commit, names: dict[CommitId, tuple[str, ...]]) -> LogEntry:
    """One commit as `log` shows it."""
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
