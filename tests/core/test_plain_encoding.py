"""The fast encoder of float-free objects writes what RFC 8785 says."""

from __future__ import annotations

import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from thaw.core import canonical
from thaw.core.objects import GroupedSegment, Segment, SegmentEntry, SegmentNode, StatesAtToken, TurnNode

IDS = st.binary(min_size=32, max_size=32).map(lambda raw: "b3:" + raw.hex())


@given(
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=256),
    st.lists(IDS, max_size=4),
    IDS,
    st.text("abcz_9", min_size=1),
)
def test_a_segment_is_canonical(tokens: list[int], blobs: list[str], some: str, group: str) -> None:
    segment = Segment(start=0, tokens=tuple(tokens), window=some, prefix=some, blobs={group: tuple(blobs), "a": ()})
    assert canonical.encode(segment) == rfc8785.dumps(canonical.to_plain(segment))


@given(st.lists(IDS, min_size=1, max_size=4), st.text("abcz_9", min_size=1), st.integers(1, 255))
def test_a_segment_with_states_is_canonical(ids: list[str], group: str, token: int) -> None:
    segment = GroupedSegment(
        start=0, tokens=tuple(range(256)), window=ids[0], prefix=ids[0], blobs={group: tuple(ids), "a": ()},
        first={group: token}, points=(StatesAtToken(token=token, blobs={group: tuple(ids), "a": ()}),),
    )  # fmt: skip
    assert canonical.encode(segment) == rfc8785.dumps(canonical.to_plain(segment))


@given(st.lists(IDS, min_size=1, max_size=64), st.integers(0, 1 << 24), st.integers(1, 256))
def test_nodes_are_canonical(ids: list[str], start: int, length: int) -> None:
    nodes = (
        TurnNode(entries=tuple(ids)),
        SegmentNode(entries=tuple(SegmentEntry(segment=i, start=start, length=length) for i in ids)),
    )
    for node in nodes:
        assert canonical.encode(node) == rfc8785.dumps(canonical.to_plain(node))
