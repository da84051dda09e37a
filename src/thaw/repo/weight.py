"""What a point weighs: the blobs it needs, counted by id, so that shared bytes count once."""

from __future__ import annotations

from collections.abc import Collection

from thaw.repo.timeline import Timeline
from thaw.store import Store


def blobs_of(timeline: Timeline, num_kv: int, *, with_boundary: bool) -> set[str]:
    """Ids of the blobs that hold the first `num_kv` tokens, and the boundary's hidden state."""
    blobs = {
        blob
        for entry, segment in zip(timeline.entries, timeline.segments, strict=True)
        if entry.start < num_kv
        for ids in segment.blobs.values()
        for blob in ids
    }
    boundary = timeline.state.boundary
    if with_boundary and boundary is not None and boundary.hidden is not None:
        blobs.add(boundary.hidden)
    return blobs


def weigh(store: Store, blobs: Collection[str]) -> int:
    """Bytes of these blobs."""
    return sum(location.nbytes for location in store.locate(blobs).values())
