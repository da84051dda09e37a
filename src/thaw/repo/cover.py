"""What a point needs of each cache group, and whether it is stored: tokens of the windows, the state at the point.

Full groups need every token and always have them. A window needs the last tokens, a point state exists only where one
was kept; so on models with such groups not every token of a session can be gone on from.
"""

from __future__ import annotations

from collections.abc import Iterator

from thaw.core.cache import point_groups, token_groups
from thaw.core.errors import NotKept
from thaw.core.objects import Segment, SegmentEntry, StatesAtToken
from thaw.repo import cut
from thaw.repo.timeline import Timeline

NAMED = 8
"""So many of the tokens that can be gone on from are named in a refusal."""


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


def require(timeline: Timeline, num_tokens: int) -> None:
    """Raise `NotKept`, naming what is missing and where to go on from, unless the first `num_tokens` can be gone on
    from."""
    missing = _missing(timeline, cut.num_kv_at(timeline.state, num_tokens))
    if missing is None:
        return
    found = resumable(timeline)
    some = ", ".join(map(str, found[-NAMED:])) or "none"
    more = "… " * (len(found) > NAMED)
    raise NotKept(
        f"token {num_tokens} cannot be gone on from: {missing}. Of this commit's tokens these can: {more}{some}. Name "
        "one of them (:token=…), append the tokens to a new session, or allow recompute (policy='recompute', "
        "--recompute)."
    )


def resumable(timeline: Timeline) -> list[int]:
    """Every number of tokens that can be gone on from with KV, in order."""
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
