"""Which sessions a repository holds and what forked from what, as plain values.

A *session* of the tree is a run of commits: it begins where it forked from another (or with nothing), and ends at its
first commit that has a name or other than one child. So a conversation of fifty turns is one session, and the depth of
the tree is the number of forks. A session is known by its first commit, whatever is added to it later.

A commit that only a remote has is a session of its own, of which no more is known than its id. Nothing is asked of a
remote: what it has is what it had when it was last seen.

`OutlineHistory` remembers what commits say, which never changes; an `Outline` is what branches and tags name now.
Neither reads KV, and nothing here is written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import msgspec

from thaw.core import canonical
from thaw.core.cache import CacheGroup, nbytes_at
from thaw.core.errors import CorruptBlob, Damaged, NewerFormat, NotFound
from thaw.core.identity import ModelIdentity
from thaw.core.ids import CommitId, StateId, short
from thaw.core.objects import Segment, SegmentEntry, State, segment_blobs
from thaw.core.prefix import common_prefix
from thaw.remote import settings, tracking
from thaw.repo import timeline
from thaw.repo.log import names_at
from thaw.repo.refs import DETACHED
from thaw.repo.repository import Repository
from thaw.repo.weight import weigh
from thaw.store import Ref, Store

AHEAD = 512
"""Commits that are read at once, at most."""
WINDOW = 4096
"""Tokens that are compared at once, at most."""


class OutlineCommit(msgspec.Struct, frozen=True, kw_only=True):
    """What the tree says of a commit. It stands in the tree below the first of its parents. `only_on`: the remote that
    has it, where it is not here; its length is not known then, and its time is that of what follows it, or 0."""

    id: CommitId
    parents: tuple[CommitId, ...]
    message: str
    time_ns: int
    num_tokens: int
    num_turns: int
    num_kv: int
    model: str
    only_on: str = ""

    @property
    def parent(self) -> CommitId | None:
        return self.parents[0] if self.parents else None


class _Size(msgspec.Struct, frozen=True, tag_field="type", tag="thaw.state/1"):
    model: str
    num_tokens: int
    num_turns: int
    num_kv: int


class _StaleSize(_Size, frozen=True, tag="thaw.state/2"):
    pass


class OwnPart(msgspec.Struct, frozen=True, kw_only=True):
    """Of a session, against what it forked from. `num_shared`: leading tokens that both have; `nbytes`: bytes of KV
    that only this side needs, None where they are damaged or gone."""

    num_shared: int
    num_own: int
    nbytes: int | None


class OutlineHistory:
    """Commits of one namespace, read once. Safe from any thread."""

    def __init__(self, repo: Repository) -> None:
        self._store = repo.store
        self._lock = threading.Lock()
        self._commits: dict[CommitId, OutlineCommit] = {}
        self._own: dict[tuple[CommitId, CommitId | None], OwnPart] = {}
        self._groups: dict[str, tuple[CacheGroup, ...]] = {}

    def use(self, repo: Repository) -> None:
        """From now on read by this one, of the same namespace and store."""
        self._store = repo.store

    def outline(self, also: Iterable[CommitId] = (), only: CommitId | None = None) -> Outline:
        """The tree of what branches and tags reach, and `also`; with `only` that commit, what led to it, and of the
        rest what forked from it. Commits that gc has removed are left out."""
        refs = self._store.refs()
        starts = [*(ref.target for ref in refs), *also, *([only] if only is not None else [])]
        with self._lock:
            known = self._reach(starts)
            self._commits = dict(known)
            self._own = {key: part for key, part in self._own.items() if key[0] in known}
            saved = _saved(known, self._groups_of)
        names = names_at(self._store, {ref.target for ref in refs})
        seen = _seen_on_remotes(self._store, refs)
        known |= _only_on_remotes(self._store, seen, known)
        return Outline(
            _around(known, only) if only is not None else known,
            _with_promised(names, seen),
            saved,
            remotes=_on_remotes(seen, known),
            remote_names={name for name, _, _ in seen},
        )

    def own_part(self, tip: CommitId, base: CommitId | None) -> OwnPart:
        """What `tip` has that `base` lacks; None is nothing. Cached."""
        with self._lock:
            found = self._own.get((tip, base))
        if found is None:
            found = _own_part(self._store, tip, base)
            with self._lock:
                self._own[tip, base] = found
        return found

    def _reach(self, starts: Sequence[CommitId]) -> dict[CommitId, OutlineCommit]:
        found: dict[CommitId, OutlineCommit] = {}
        ahead: dict[CommitId, OutlineCommit] = {}
        waiting = list(starts)
        while waiting:
            one = waiting.pop()
            if one in found:
                continue
            commit = self._commits.get(one) or ahead.get(one)
            if commit is None:
                ahead |= self._read(one, min(1 + len(found), AHEAD))
                commit = ahead.get(one)
            if commit is not None:
                found[one] = commit
                waiting += commit.parents
        return found

    def _read(self, one: CommitId, num: int) -> dict[CommitId, OutlineCommit]:
        """The commit, and of those that were stored before it what is this namespace's; nothing where it is gone."""
        try:
            recorded = self._store.recorded(one, num)
        except NotFound:
            return {}
        found = {}
        for each in recorded:
            try:
                commit = canonical.decode_stored(each.commit, self._store.commit_kind, f"commit {each.id}")
                what = f"the state of commit {each.id}"
                size = canonical.decode_stored(each.state, _Size | _StaleSize, what)  # type: ignore[arg-type]
            except NewerFormat:
                if each.id == one:
                    raise
                continue
            except msgspec.DecodeError as error:
                if each.id == one:
                    raise CorruptBlob(f"commit {one}: {error}. Run `thaw fsck`.") from None
                continue
            if commit.of_namespace != self._store.namespace:
                continue
            found[each.id] = OutlineCommit(
                id=each.id,
                parents=tuple(map(CommitId, commit.parents)),
                message=commit.message,
                time_ns=int(commit.time_ns),
                num_tokens=size.num_tokens,
                num_turns=size.num_turns,
                num_kv=size.num_kv,
                model=size.model,
            )
        return found

    def _groups_of(self, model: str) -> tuple[CacheGroup, ...]:
        if model not in self._groups:
            self._groups[model] = self._store.get_as(model, ModelIdentity).groups
        return self._groups[model]


_Seen: TypeAlias = tuple[str, str, CommitId]
"""A remote's branch as a point (`origin/main`), the remote, and the commit at which the branch was last seen."""


def _seen_on_remotes(store: Store, refs: Iterable[Ref]) -> list[_Seen]:
    """Branches of remotes: those that were fetched or pushed, and those that only their names are known of."""
    book = settings.read(store)
    here = [(ref.name, ref.target) for ref in refs if ref.kind == "tag" and tracking.is_tracking(ref.name, book)]
    promised = [(name, CommitId(commit)) for name, commit in settings.promised(store).items()]
    return sorted((name, name.partition("/")[0], commit) for name, commit in (*here, *promised))


def _only_on_remotes(
    store: Store, seen: Iterable[_Seen], known: Mapping[CommitId, OutlineCommit]
) -> dict[CommitId, OutlineCommit]:
    """Commits that are not here: what a shallow fetch left in its remote, and branches that were never fetched."""
    after: dict[CommitId, int] = {}
    for commit in known.values():
        if commit.parent is not None and commit.parent not in known:
            after[commit.parent] = max(after.get(commit.parent, 0), commit.time_ns)
    remotes = {commit: remote for _, remote, commit in seen}
    remotes |= {CommitId(commit): remote for commit, remote in store.absent().items() if commit in after}
    return {
        commit: OutlineCommit(
            id=commit, parents=(), message="", time_ns=after.get(commit, 0), num_tokens=0, num_turns=0, num_kv=0,
            model="", only_on=remote,
        )
        for commit, remote in remotes.items() if commit not in known
    }  # fmt: skip


def _with_promised(names: Mapping[CommitId, tuple[str, ...]], seen: Iterable[_Seen]) -> dict[CommitId, tuple[str, ...]]:
    """`names`, and those of branches that were never fetched."""
    found = dict(names)
    for name, _, commit in seen:
        if name not in found.get(commit, ()):
            found[commit] = (*found.get(commit, ()), name)
    return found


def _on_remotes(seen: Sequence[_Seen], known: Mapping[CommitId, OutlineCommit]) -> dict[CommitId, tuple[str, ...]]:
    """Of each commit the remotes that have it, as they were last seen: those whose branches lead to it."""
    found: dict[CommitId, tuple[str, ...]] = {one.id: (one.only_on,) for one in known.values() if one.only_on}
    for remote in sorted({remote for _, remote, _ in seen}):
        reached: set[CommitId] = set()
        waiting = [commit for _, its, commit in seen if its == remote]
        while waiting:
            one = waiting.pop()
            if one in known and one not in reached:
                reached.add(one)
                waiting += known[one].parents
        for one in reached:
            found[one] = tuple(sorted({*found.get(one, ()), remote}))
    return found


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """What forking saved, as `thaw stats` counts it: of each commit its tokens, and their KV, times its children but
    one."""

    num_tokens: int
    nbytes: int


def _saved(known: Mapping[CommitId, OutlineCommit], groups_of: Callable[[str], tuple[CacheGroup, ...]]) -> Saved:
    children: dict[CommitId, int] = {}
    for commit in known.values():
        if commit.parent is not None:
            children[commit.parent] = children.get(commit.parent, 0) + 1
    forked = [(known[one], num - 1) for one, num in children.items() if num > 1 and one in known]
    return Saved(
        num_tokens=sum(times * commit.num_tokens for commit, times in forked),
        nbytes=sum(times * nbytes_at(groups_of(commit.model), commit.num_kv) for commit, times in forked),
    )


def _around(known: Mapping[CommitId, OutlineCommit], only: CommitId) -> dict[CommitId, OutlineCommit]:
    """That commit, those before it, and those after it."""
    kept: dict[CommitId, OutlineCommit] = {}
    one: CommitId | None = only
    while one is not None and one in known:
        kept[one] = known[one]
        one = known[one].parent
    children: dict[CommitId, list[CommitId]] = {}
    for commit in known.values():
        if commit.parent is not None:
            children.setdefault(commit.parent, []).append(commit.id)
    waiting = [only]
    while waiting:
        for child in children.get(waiting.pop(), ()):
            kept[child] = known[child]
            waiting.append(child)
    return kept


class TreeSession(msgspec.Struct, frozen=True, kw_only=True):
    """A run of commits, oldest first. `base`: the commit that it forked from. `names`: of its last commit.
    `num_below`: commits that forked from its end, theirs included; `children`: the first commits of those sessions."""

    commits: tuple[CommitId, ...]
    base: CommitId | None
    names: tuple[str, ...]
    children: tuple[CommitId, ...]
    num_below: int

    @property
    def id(self) -> CommitId:
        """The first commit."""
        return self.commits[0]

    @property
    def tip(self) -> CommitId:
        return self.commits[-1]


class Outline:
    """The tree at one moment. It never changes; reading it reads no disk."""

    def __init__(
        self,
        commits: Mapping[CommitId, OutlineCommit],
        names: Mapping[CommitId, tuple[str, ...]],
        saved: Saved,
        *,
        remotes: Mapping[CommitId, tuple[str, ...]],
        remote_names: Collection[str],
    ) -> None:
        """`remotes`: which remotes have a commit, with all of its KV; `remote_names`: of `names`, those of remotes'
        branches."""
        self.commits = commits
        self.remotes, self.remote_names = remotes, remote_names
        self.names = {commit: names[commit] for commit in names if commit in commits}
        self.saved = saved
        self._children: dict[CommitId, list[CommitId]] = {}
        roots = []
        for commit in sorted(commits.values(), key=lambda one: (-one.time_ns, self.names.get(one.id, ()), one.id)):
            if commit.parent is not None and commit.parent in commits:
                self._children.setdefault(commit.parent, []).append(commit.id)
            else:
                roots.append(commit.id)
        self.roots: tuple[CommitId, ...] = tuple(roots)
        """First commits of the sessions that forked from nothing, newest first."""
        self._elsewhere = [commit for commit in commits.values() if commit.only_on]
        self._size = self._sizes()
        self._sessions: dict[CommitId, TreeSession] = {}
        self._first: dict[CommitId, CommitId] = {}
        self._by_digits: dict[str, CommitId] = {}

    def _sizes(self) -> dict[CommitId, int]:
        """Commits at and below each, by one walk that no depth can overflow."""
        sizes: dict[CommitId, int] = {}
        order, waiting = [], list(self.roots)
        while waiting:
            order.append(one := waiting.pop())
            waiting += self._children.get(one, ())
        for one in reversed(order):
            sizes[one] = 1 + sum(sizes[child] for child in self._children.get(one, ()))
        return sizes

    def session(self, first: CommitId) -> TreeSession:
        """The session that begins with a commit."""
        if first not in self._sessions:
            self._sessions[first] = self._session(first)
        return self._sessions[first]

    def _session(self, first: CommitId) -> TreeSession:
        run = [first]
        while not self._ends(run[-1]) and len(after := self._children.get(run[-1], [])) == 1:
            run.append(after[0])
        children = tuple(self._children.get(run[-1], ()))
        return TreeSession(
            commits=tuple(run),
            base=self.commits[first].parent,
            names=self.names.get(run[-1], ()),
            children=children,
            num_below=sum(self._size[child] for child in children),
        )

    def _ends(self, commit: CommitId) -> bool:
        """Whether it is the last of its session, however many children it has."""
        return commit in self.names or bool(self.commits[commit].only_on)

    def elsewhere(self, point: str) -> OutlineCommit | None:
        """The commit that only a remote has, by its id, the first digits of it, or its name there."""
        digits = point.removeprefix("b3:")
        for commit in self._elsewhere:
            if point in self.names.get(commit.id, ()) or (len(digits) >= 4 and commit.id.startswith(f"b3:{digits}")):
                return commit
        return None

    def first_of(self, commit: CommitId) -> CommitId:
        """The first commit of the session that a commit belongs to. Raises `KeyError` for one that is not here."""
        at, run = self.commits[commit], [commit]
        while at.id not in self._first and at.parent is not None and at.parent in self.commits:
            if self._ends(at.parent) or len(self._children[at.parent]) > 1:
                break
            at = self.commits[at.parent]
            run.append(at.id)
        first = self._first.get(at.id, at.id)
        self._first |= dict.fromkeys(run, first)
        return first

    def by_digits(self, digits: str, num: int) -> CommitId | None:
        """The commit whose id begins with these `num` digits, as rows have them; reads no disk."""
        if not self._by_digits:
            self._by_digits = {short(one, num): one for one in self.commits}
        return self._by_digits.get(digits)

    def base_here(self, session: TreeSession) -> CommitId | None:
        """What a session forked from, if that is here."""
        base = session.base
        if base is None or base not in self.commits or self.commits[base].only_on:
            return None
        return base

    def ways_to(self, first: CommitId) -> list[CommitId]:
        """The first commits of the sessions above one, the nearest first."""
        above = []
        while (base := self.commits[first].parent) is not None and base in self.commits:
            above.append(first := self.first_of(base))
        return above

    @property
    def num_commits(self) -> int:
        """Of those that are here."""
        return len(self.commits) - len(self._elsewhere)

    @property
    def num_elsewhere(self) -> int:
        """Commits that only a remote has, as far as they are known."""
        return len(self._elsewhere)

    @property
    def num_sessions(self) -> int:
        """Of those that are here."""
        return sum(1 for _ in self._firsts()) - len(self._elsewhere)

    def _firsts(self) -> Iterator[CommitId]:
        yield from self.roots
        for commit, children in self._children.items():
            if len(children) > 1 or self._ends(commit):
                yield from children


# -- what a session shares with what it forked from


def _own_part(store: Store, tip: CommitId, base: CommitId | None) -> OwnPart:
    """Tokens are compared where segments differ; bytes are those of segments, and of the kept hidden state."""
    try:
        state = _state(store, tip)
        below = None if base is None else _state(store, base)
        entries = timeline.read_entries(store, state)
        entries_below: tuple[SegmentEntry, ...] = () if below is None else timeline.read_entries(store, below)
        shared = 0 if below is None else _num_common(store, (state, entries), (below, entries_below))
        nbytes = weigh(store, _blobs(store, state, entries, entries_below) - _blobs_of_base(store, below, entries))
    except Damaged:
        return OwnPart(num_shared=0, num_own=0, nbytes=None)
    return OwnPart(num_shared=shared, num_own=state.num_tokens - shared, nbytes=nbytes)


def _state(store: Store, commit: CommitId) -> State:
    return store.get_as(StateId(store.get_as(commit, store.commit_kind).state), State)


_Read: TypeAlias = tuple[State, Sequence[SegmentEntry]]


def _num_common(store: Store, a: _Read, b: _Read) -> int:
    """Leading tokens that both have: those of equal entries, then token by token."""
    at = 0
    for one, other in zip(a[1], b[1], strict=False):
        if one != other:
            break
        at += one.length
    while True:
        left = timeline.read_window(store, a[0], at, at + WINDOW)
        right = timeline.read_window(store, b[0], at, at + WINDOW)
        num = common_prefix(left, right)
        at += num
        if num < WINDOW:
            return at


def _blobs(store: Store, state: State, entries: Sequence[SegmentEntry], below: Sequence[SegmentEntry]) -> set[str]:
    """Ids of the blobs of segments that `below` has not."""
    known = {entry.segment for entry in below}
    found: set[str] = set()
    for entry in entries:
        if entry.segment not in known:
            found.update(segment_blobs(store.get_as(entry.segment, Segment)))
    boundary = state.boundary
    return found | ({boundary.hidden} if boundary is not None and boundary.hidden is not None else set())


def _blobs_of_base(store: Store, state: State | None, entries: Sequence[SegmentEntry]) -> set[str]:
    if state is None:
        return set()
    return _blobs(store, state, timeline.read_entries(store, state), entries)


def kept_on_no_branch(repo: Repository, limit: int = 100_000) -> list[CommitId]:
    """Commits that were made on no branch, and that the reflog still knows; newest first."""
    moves = repo.store.reflog(DETACHED, limit=limit)
    return list(dict.fromkeys(move.new for move in moves if move.new is not None))
