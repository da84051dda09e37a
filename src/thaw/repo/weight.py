"""What a point weighs: the blobs it needs, counted by id, so that shared bytes count once."""

from __future__ import annotations

from collections.abc import Collection

from thaw.repo import cover
from thaw.repo.timeline import Timeline
from thaw.store import Store


def blobs_of(timeline: Timeline, num_kv: int, *, with_boundary: bool) -> set[str]:
    """Ids of the blobs that are needed to go on after `num_kv` tokens, and of the boundary's hidden state."""
    state = cover.state_at(timeline, num_kv)
    named = [blobs for _, _, blobs in cover.blobs_at(timeline, num_kv)] + ([state.blobs] if state else [])
    blobs = {blob for one in named for ids in one.values() for blob in ids}
    boundary = timeline.state.boundary
    if with_boundary and boundary is not None and boundary.hidden is not None:
        blobs.add(boundary.hidden)
    return blobs


def weigh(store: Store, blobs: Collection[str]) -> int:
    """Bytes of these blobs."""
    return sum(location.nbytes for location in store.locate(blobs).values())
