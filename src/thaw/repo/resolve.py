"""From a point's text to a place: which commit, which state, how many of its tokens.

Names are looked up as refs first (branch or tag, then HEAD), then as an id prefix. Nothing is loaded but the commits
walked over and, for `:turn=N`, the turns. Pure look-up: no engine, no write.
"""

from __future__ import annotations

import re

import msgspec

from thaw.core import points
from thaw.core.errors import BadPoint, NotFound
from thaw.core.ids import CommitId, StateId, short
from thaw.core.objects import Commit
from thaw.core.points import Point
from thaw.repo import timeline
from thaw.store import Store

_HEX = re.compile(r"[0-9a-f]{4,64}\Z")


class ResolvedPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A place in history: the first `num_tokens` tokens of `state`, which `commit` recorded.

    `turn`: how many whole turns lie before it. `at_end`: it is the state's own end. `branch`: the branch whose tip it
    is, when the point named one and nothing else.
    """

    commit: CommitId
    state: StateId
    num_tokens: int
    turn: int
    at_end: bool
    branch: str | None = None

    def __str__(self) -> str:
        """A spelling that resolves to this point again, for ever."""
        name = short(self.commit, 16)
        return name if self.at_end else f"{name}:token={self.num_tokens}"


def resolve(store: Store, point: str | Point | ResolvedPoint) -> ResolvedPoint:
    """The place that `point` names. Raises `BadPoint` or `NotFound` saying what exists instead."""
    if isinstance(point, ResolvedPoint):
        return _checked(store, point)
    spelled = points.parse(point) if isinstance(point, str) else point
    commit = _ancestor(store, _named(store, spelled), spelled)
    branch = spelled.name if spelled.name != "HEAD" else store.head
    ref = store.ref(branch)
    plain = spelled.moved is None and not spelled.back and spelled.turn is None and spelled.token is None
    on_branch = plain and ref is not None and ref.kind == "branch" and ref.target == commit
    return at(store, commit, turn=spelled.turn, token=spelled.token, branch=branch if on_branch else None)


def _checked(store: Store, point: ResolvedPoint) -> ResolvedPoint:
    """A point that a caller has or made: its commit must be of this namespace, and have recorded its state."""
    if store.get_as(point.commit, Commit).state != point.state:
        raise NotFound(f"commit {short(point.commit)} did not record the state {short(point.state)}")
    return point


def at(
    store: Store, commit: CommitId, *, turn: int | None = None, token: int | None = None, branch: str | None = None
) -> ResolvedPoint:
    """The place after `turn` turns, or after `token` tokens, of a commit's state; its end when neither is given."""
    if turn is not None and token is not None:
        raise BadPoint(f"turn={turn} and token={token}: give one of the two")
    state_id = StateId(store.get_as(commit, Commit).state)
    state = timeline.read_state(store, state_id)
    if turn is None and token is None:
        token, turn = state.num_tokens, state.num_turns
    elif turn is not None:
        if not 0 <= turn <= state.num_turns:
            raise NotFound(f"{short(commit)} has {state.num_turns} turns; :turn={turn} is not in 0 … {state.num_turns}")
        token = timeline.read_turns(store, state)[turn - 1].end if turn else 0
    assert token is not None
    if not 0 <= token <= state.num_tokens:
        raise NotFound(
            f"{short(commit)} has {state.num_tokens} tokens; :token={token} is not in 0 … {state.num_tokens}"
        )
    if turn is None:
        turn = sum(t.end <= token for t in timeline.read_turns(store, state))
    return ResolvedPoint(
        commit=commit, state=state_id, num_tokens=token, turn=turn, at_end=token == state.num_tokens, branch=branch
    )


def _named(store: Store, point: Point) -> CommitId:
    name = store.head if point.name == "HEAD" else point.name
    if point.moved:
        return _moved(store, name, point.moved)
    ref = store.ref(name)
    if ref is not None and ref.target is not None:
        return ref.target
    return _by_id(store, point.name)


def _moved(store: Store, name: str, moved: int) -> CommitId:
    """Where the ref stood `moved` moves ago."""
    before = store.stood(name, moved)
    if len(before) < moved:
        raise NotFound(f"{name}@{{{moved}}}: {name!r} has moved {len(before)} times since it was made")
    return before[moved - 1]


def _by_id(store: Store, name: str) -> CommitId:
    found = store.find(name) if _HEX.match(name) else []
    if len(found) > 1:
        some = ", ".join(short(c, len(name) + 6) for c in found[:6])
        raise BadPoint(f"{name!r} begins the ids of {len(found)} commits ({some}); write more digits")
    left = [one for one in store.absent() if _HEX.match(name) and one.startswith(f"b3:{name}")]
    if not found and left:
        store.get_as(left[0], Commit)
    if not found:
        raise NotFound(f"there is no branch, tag or commit {name!r}{known_names(store)}")
    return found[0]


def known_names(store: Store) -> str:
    """What could have been meant, as the end of a sentence."""
    from thaw.remote import settings

    waiting = [f"{point} (not fetched yet)" for point in settings.promised(store)]
    names = [*(ref.name for ref in store.refs()), *waiting]
    if not names:
        return "; the repository has no commits yet"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"; there are: {', '.join(names[:8])}{more}"


def _ancestor(store: Store, commit: CommitId, point: Point) -> CommitId:
    for steps in range(point.back):
        parents = store.get_as(commit, Commit).parents
        if not parents:
            raise NotFound(f"{point}: the history of {point.name!r} goes back {steps} commits, not {point.back}")
        commit = CommitId(parents[0])
    return commit
