"""What an object points to: read from its canonical bytes without building it.

The bytes must have been verified against their id first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from thaw.core.errors import CorruptBlob
from thaw.core.identity import ModelIdentity
from thaw.core.objects import ChatTurn, Commit, Segment, SegmentNode, State, Turn, TurnNode

KINDS: dict[str, str] = {
    "thaw.model/1": "model",
    "thaw.segment/1": "segment",
    "thaw.segments/1": "segments",
    "thaw.turns/1": "turns",
    "thaw.turn/1": "turn",
    "thaw.turn/2": "turn",
    "thaw.state/1": "state",
    "thaw.commit/1": "commit",
}
_CLASSES: dict[type, str] = {
    ModelIdentity: "model", Segment: "segment", SegmentNode: "segments", TurnNode: "turns", Turn: "turn",
    ChatTurn: "turn", State: "state", Commit: "commit",
}  # fmt: skip


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


def kind_of(value: object) -> str:
    """The word the database uses for an object's class."""
    return _CLASSES[type(value)]


def links(data: bytes) -> Links:
    """The links in an object's bytes. Raises `CorruptBlob` when they are not of a known kind."""
    try:
        return _links(msgspec.json.decode(data))
    except (msgspec.DecodeError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CorruptBlob(f"an object is not of a kind this thaw knows: {error!r}") from None


def _links(plain: dict[str, Any]) -> Links:
    kind = KINDS[plain["type"]]
    if kind == "commit":
        return Links(kind, (plain["state"], *plain["parents"]))
    if kind == "state":
        hidden = (plain.get("boundary") or {}).get("hidden")
        return Links(kind, (plain["model"], *plain["nodes"], *plain["turn_nodes"]), (hidden,) if hidden else ())
    if kind == "segments":
        entries = plain["entries"]
        return Links(kind, tuple(e["segment"] for e in entries), lengths=tuple(e["length"] for e in entries))
    if kind == "turns":
        return Links(kind, tuple(plain["entries"]))
    if kind == "segment":
        blobs = tuple(blob for heads in plain["blobs"].values() for blob in heads)
        return Links(kind, (), blobs, plain["window"])
    return Links(kind)
