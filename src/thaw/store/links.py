"""What an object points to: read from its canonical bytes without building it.

The bytes must have been verified against their id first.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import msgspec

from thaw.core import canonical
from thaw.core.errors import CorruptBlob


class _Commit(msgspec.Struct, tag_field="type", tag="thaw.commit/1"):
    state: str
    parents: tuple[str, ...]


class _NamespacedCommit(_Commit, tag="thaw.commit/2"):
    namespace: str


class _Boundary(msgspec.Struct):
    hidden: str | None = None


class _State(msgspec.Struct, tag_field="type", tag="thaw.state/1"):
    model: str
    nodes: tuple[str, ...]
    turn_nodes: tuple[str, ...]
    boundary: _Boundary | None = None


class _StaleState(_State, tag="thaw.state/2"):
    pass


class _Entry(msgspec.Struct):
    segment: str
    length: int


class _Segments(msgspec.Struct, tag_field="type", tag="thaw.segments/1"):
    entries: tuple[_Entry, ...]


class _Segment(msgspec.Struct, tag_field="type", tag="thaw.segment/1"):
    blobs: dict[str, tuple[str, ...]]
    window: str


class _Point(msgspec.Struct):
    blobs: dict[str, tuple[str, ...]]


class _GroupedSegment(_Segment, tag="thaw.segment/2"):
    points: tuple[_Point, ...]


class _Turns(msgspec.Struct, tag_field="type", tag="thaw.turns/1"):
    entries: tuple[str, ...]


class _Turn(msgspec.Struct, tag_field="type", tag="thaw.turn/1"):
    pass


class _ChatTurn(msgspec.Struct, tag_field="type", tag="thaw.turn/2"):
    pass


class _Model(msgspec.Struct, tag_field="type", tag="thaw.model/1"):
    pass


class _GroupedModel(msgspec.Struct, tag_field="type", tag="thaw.model/2"):
    pass


_DECODER = msgspec.json.Decoder(
    _Commit
    | _NamespacedCommit
    | _State
    | _StaleState
    | _Segments
    | _Segment
    | _GroupedSegment
    | _Turns
    | _Turn
    | _ChatTurn
    | _Model
    | _GroupedModel
)


@dataclass(frozen=True)
class Links:
    """An object's kind and what must exist for it to be whole.

    `window`: a segment's lookup hash, else "". `lengths`: how much of each object a node of segments uses, else ().
    """

    kind: str
    objects: tuple[str, ...] = ()
    blobs: tuple[str, ...] = ()
    window: str = ""
    lengths: tuple[int, ...] = ()

    def without(self, absent: Collection[str]) -> tuple[str, ...]:
        """`objects` but for those parents of a commit that were not fetched. All else must be there, whatever it is."""
        if self.kind != "commit" or not absent:
            return self.objects
        return (self.objects[0], *(parent for parent in self.objects[1:] if parent not in absent))

    @property
    def parents(self) -> tuple[str, ...]:
        """Of a commit."""
        return self.objects[1:] if self.kind == "commit" else ()

    @property
    def state(self) -> str | None:
        """What a commit recorded."""
        return self.objects[0] if self.kind == "commit" else None


def links(data: bytes, what: str = "an object") -> Links:
    """The links in an object's bytes. Raises `NewerFormat` for a version that is not known yet, `CorruptBlob` when they
    are not of a known kind and form."""
    try:
        value = _DECODER.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        canonical.refuse_newer(data, what)
        raise CorruptBlob(f"{what} is not of a kind this thaw knows: {error}") from None
    match value:
        case _Commit():
            return Links("commit", (value.state, *value.parents))
        case _State():
            hidden = value.boundary.hidden if value.boundary is not None else None
            return Links("state", (value.model, *value.nodes, *value.turn_nodes), (hidden,) if hidden else ())
        case _Segments():
            entries = value.entries
            return Links("segments", tuple(e.segment for e in entries), lengths=tuple(e.length for e in entries))
        case _Turns():
            return Links("turns", value.entries)
        case _Segment():
            points = value.points if isinstance(value, _GroupedSegment) else ()
            named = [value.blobs, *(point.blobs for point in points)]
            blobs = tuple(blob for one in named for heads in one.values() for blob in heads)
            return Links("segment", (), blobs, value.window)
        case _Turn() | _ChatTurn():
            return Links("turn")
    return Links("model")
