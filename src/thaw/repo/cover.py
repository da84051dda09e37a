"""What a point needs of each cache group, and whether it is stored: tokens of the windows, the state at the point.

Full groups need every token and always have them. A window needs the last tokens, a point state exists only where one
was kept; so on models with such groups not every token of a session can be continued from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from thaw.core.cache import CacheGroup, keeps_all, list_of, point_groups, token_groups
from thaw.core.errors import NotKept
from thaw.core.objects import Segment, SegmentEntry, StatesAtToken
from thaw.repo import cut
from thaw.repo.timeline import Timeline
from thaw.store import Store

NAMED = 8
"""So many of the tokens that can be continued from are named in a refusal."""


def blobs_at(timeline: Timeline, num_kv: int) -> Iterator[tuple[SegmentEntry, Segment, dict[str, tuple[str, ...]]]]:
    """Each entry of the first `num_kv` tokens, with the blobs of it that are needed to go on there."""
    unneeded = {group.name: group.covers(num_kv).start for group in token_groups(timeline.groups)}
    for entry, segment in zip(timeline.entries, timeline.segments, strict=True):
        if entry.start < num_kv:
            end = entry.start + min(entry.length, num_kv - entry.start)
            yield entry, segment, {g: ids for g, ids in segment.blobs.items() if end > unneeded.get(g, 0)}


def state_at(timeline: Timeline, num_kv: int) -> StatesAtToken | None:
    """The point states after `num_kv` tokens."""
    return next((point for point in _points(timeline) if point.token == num_kv), None)


def num_kv_at(timeline: Timeline, num_tokens: int) -> int:
    """Tokens whose KV is used at this point: those of `cut.num_kv_at`, or, where the state before the last token was
    not kept and the one after it was, all of them. Such a point continues with new tokens alone."""
    num_kv, state = cut.num_kv_at(timeline.state, num_tokens), timeline.state
    if not num_kv or num_kv == num_tokens or not point_groups(timeline.groups) or num_tokens > state.num_kv:
        return num_kv
    return num_tokens if state_at(timeline, num_kv) is None and state_at(timeline, num_tokens) else num_kv


def require(timeline: Timeline, num_tokens: int) -> None:
    """Raise `NotKept`, naming what is missing and where to continue from, unless the first `num_tokens` can be gone on
    from."""
    missing = _missing(timeline, num_kv_at(timeline, num_tokens))
    if missing is None:
        return
    found = resumable(timeline)
    some = ", ".join(map(str, found[-NAMED:])) or "none"
    more = "… " * (len(found) > NAMED)
    new = with_new_tokens(timeline, found)
    also = f"; with new tokens also {list_of(new).removesuffix(' tokens')}" if new else ""
    raise NotKept(
        f"a session cannot continue from token {num_tokens}: {missing}. In this commit it can from these: "
        f"{more}{some}{also}. Name one of them (:token=…), append the tokens to a new session, or allow recompute "
        "(policy='recompute', --recompute), which reads what comes after the nearest earlier point again."
    )


def whole_until(store: Store, groups: Sequence[CacheGroup], entries: Sequence[SegmentEntry], num_kv: int) -> int:
    """How many tokens of stored `entries` may stand before what a session writes that ends at `num_kv`: all of them, or
    those before the first of its windows' tokens that is not there. An engine may fork a session where the parent's
    commits hold no window."""
    end = at = entries[-1].start + entries[-1].length if entries else 0
    for group in (group for group in token_groups(groups) if not keeps_all([group])):
        first = group.covers(num_kv).start
        for entry in entries:
            needed = max(first, entry.start)
            if needed >= min(entry.start + entry.length, num_kv) or not store.has(entry.segment):
                continue
            segment = store.get_as(entry.segment, Segment)
            if group.name not in segment.blobs or segment.first_of(group.name) > needed:
                at = min(at, needed)
    return min(at, end)


def nearest(timeline: Timeline, num_tokens: int) -> int:
    """The most of the first `num_tokens` tokens that KV and states are kept for, so that the rest can be read again;
    0 where nothing earlier is kept."""
    kept = (point.token for point in _points(timeline) if point.token < num_tokens)
    return max((n for n in kept if _missing(timeline, n) is None), default=0)


def points(timeline: Timeline) -> list[int]:
    """The numbers of tokens after which states are kept, in order."""
    return sorted(point.token for point in _points(timeline))


def with_new_tokens(timeline: Timeline, found: Collection[int]) -> list[int]:
    """The tokens beside `found` that can be continued from with new tokens alone: those that a state is kept after."""
    return [n for n in points(timeline) if n not in found and _missing(timeline, n) is None]


def resumable(timeline: Timeline) -> list[int]:
    """Every number of tokens that can be continued from with KV, in order."""
    state, groups = timeline.state, timeline.groups
    if not point_groups(groups):
        wanted = range(2, state.num_tokens + 1)
        return [n for n in wanted if _missing(timeline, cut.num_kv_at(state, n)) is None]
    near = {point.token + 1 for point in _points(timeline)} | {state.num_tokens}
    return [n for n in sorted(near) if n <= state.num_tokens and _missing(timeline, cut.num_kv_at(state, n)) is None]


def _missing(timeline: Timeline, num_kv: int) -> str | None:
    if num_kv and point_groups(timeline.groups) and state_at(timeline, num_kv) is None:
        return f"no state was kept after {num_kv} tokens"
    for group in token_groups(timeline.groups):
        covered = group.covers(num_kv)
        for entry, segment in zip(timeline.entries, timeline.segments, strict=True):
            end = min(entry.start + entry.length, num_kv)
            needed = range(max(covered.start, entry.start), end)
            if needed and (group.name not in segment.blobs or segment.first_of(group.name) > needed.start):
                return f"cache group {group.name} is not kept at token {needed.start}, which its window needs"
    return None


def _points(timeline: Timeline) -> Iterator[StatesAtToken]:
    for entry, segment in zip(timeline.entries, timeline.segments, strict=True):
        yield from (point for point in segment.states if point.token <= entry.start + entry.length)
