"""The local side: commits of one namespace, what each of them needs, and what of that its parents have not.

What is counted as "have" is reached from commits of the namespace alone, never looked up by id: whether another
namespace happens to have stored the same bytes changes nothing.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

import msgspec

from thaw.core.errors import CorruptBlob, NotFound
from thaw.core.ids import CommitId
from thaw.core.objects import Commit
from thaw.store import Store
from thaw.store.links import Links, links
from thaw.store.objects import read_bytes

REMEMBERED = 8
"""States whose reach is kept."""


class Reach(msgspec.Struct, frozen=True):
    """What something needs, itself included: ids in an order that depends on content alone, each with the size of an
    object or 0."""

    objects: dict[str, int]
    blobs: dict[str, None]


class LocalHistory:
    """Commits of a store's namespace and what they reach. For one thread."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._links: dict[str, tuple[Links, int]] = {}
        self._reached: OrderedDict[str, Reach] = OrderedDict()
        self._absent = store.absent()
        self._whole: dict[str, bool] = {}

    def parents(self, commit: str) -> tuple[str, ...]:
        """All of its parents; of a commit that was not fetched, none."""
        return () if commit in self._absent else tuple(self.store.get_as(commit, Commit).parents)

    def parents_here(self, commit: str) -> tuple[str, ...]:
        return tuple(parent for parent in self.parents(commit) if parent not in self._absent)

    def has(self, commit: str) -> bool:
        """Whether the namespace has this commit."""
        try:
            return self.store.has(commit)
        except NotFound:
            return False

    def is_whole(self, commit: str) -> bool:
        """Whether the namespace has this commit with all of its history."""
        if not self._absent:
            return self.has(commit)
        waiting = [commit]
        while waiting:
            at = waiting[-1]
            if at in self._whole:
                waiting.pop()
                continue
            parents = self.parents(at) if self.has(at) else ()
            unknown = [parent for parent in parents if parent not in self._whole]
            if unknown:
                waiting += unknown
            else:
                self._whole[at] = self.has(at) and all(self._whole[parent] for parent in parents)
        return self._whole[commit]

    def ends(self, commit: str) -> str | None:
        """The first commit that was not fetched, of those that this one comes from."""
        return next((one for one in sorted(self._ancestors([commit])) if one in self._absent), None)

    def descends(self, commit: str, ancestor: str) -> bool:
        """Whether `ancestor` is the commit or one that it comes from."""
        seen, waiting = {commit}, [commit]
        while waiting:
            at = waiting.pop()
            if at == ancestor:
                return True
            new = [parent for parent in self.parents(at) if parent not in seen]
            seen.update(new)
            waiting += new
        return False

    def missing(self, tips: Iterable[str], known: Iterable[str]) -> list[str]:
        """The commits that `tips` come from, without those of `known` and what these come from: parents first."""
        stop = self._ancestors(known)
        order: list[str] = []
        seen: set[str] = {*stop, *self._absent}
        for tip in tips:
            waiting = [(tip, False)]
            while waiting:
                at, done = waiting.pop()
                if done:
                    order.append(at)
                elif at not in seen:
                    seen.add(at)
                    waiting.append((at, True))
                    waiting += [(parent, False) for parent in reversed(self.parents(at))]
        return order

    def _ancestors(self, commits: Iterable[str]) -> set[str]:
        seen = set(commits)
        waiting = list(seen)
        while waiting:
            new = [parent for parent in self.parents(waiting.pop()) if parent not in seen]
            seen.update(new)
            waiting += new
        return seen

    # -- what commits need

    def own(self, commit: str) -> Reach:
        """The commit, and what its state needs that none of its parents' states does."""
        theirs = [self.reach(parent) for parent in self.parents_here(commit)]
        out = Reach({commit: self._read(commit)[1]}, {})
        state = self.store.get_as(commit, Commit).state
        self._walk([state], out, theirs)
        return out

    def reach(self, commit: str) -> Reach:
        """What a commit's state needs."""
        state = self.store.get_as(commit, Commit).state
        if state in self._reached:
            self._reached.move_to_end(state)
            return self._reached[state]
        out = self._reached[state] = Reach({}, {})
        self._walk([state], out, ())
        while len(self._reached) > REMEMBERED:
            self._reached.popitem(last=False)
        return out

    def _walk(self, roots: Sequence[str], out: Reach, without: Sequence[Reach]) -> None:
        waiting = deque(roots)
        while waiting:
            at = waiting.popleft()
            if at in out.objects or any(at in reach.objects for reach in without):
                continue
            of, nbytes = self._read(at)
            out.objects[at] = nbytes
            for blob in of.blobs:
                if not any(blob in reach.blobs for reach in without):
                    out.blobs[blob] = None
            waiting.extend(of.objects)

    def _read(self, identifier: str) -> tuple[Links, int]:
        if identifier not in self._links:
            data = self.data(identifier)
            self._links[identifier] = (links(data), len(data))
        return self._links[identifier]

    def data(self, identifier: str) -> bytes:
        """An object's verified bytes. Raises `CorruptBlob`."""
        with self.store.database.read() as connection:
            return read_bytes(connection, identifier)


def commit_of(store: Store, name: str, what: str) -> CommitId:
    """Where a local ref stands. Raises `NotFound`."""
    ref = store.ref(name)
    if ref is None or ref.kind != what:
        known = ", ".join(ref.name for ref in store.refs(what)[:8])
        raise NotFound(f"there is no {what} {name!r} here{f'; there are: {known}' if known else ''}")
    return ref.target


def require_of(namespace: str, commit: Commit, identifier: str) -> None:
    """That a commit that came from somewhere is of this namespace. Raises `CorruptBlob`."""
    if commit.of_namespace != namespace:
        raise CorruptBlob(
            f"commit {identifier} of the remote is of namespace {commit.of_namespace!r}, but lies in {namespace!r}"
        )
