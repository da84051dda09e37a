"""From a capture to objects: segments, nodes, turns, the state. Pure, apart from asking which nodes are known.

What the engine captured is put behind what was kept; full nodes of 64 entries come out with the ids that they had, so
that a commit writes what is new and not what is long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from thaw.core import objects, prefix
from thaw.core.canonical import U64
from thaw.core.errors import LawBroken
from thaw.core.ids import ObjectId, StateId
from thaw.core.objects import (
    NODE_ENTRIES,
    AnyObject,
    Segment,
    SegmentEntry,
    SegmentNode,
    State,
    Turn,
    TurnNode,
)
from thaw.core.prefix import WINDOW
from thaw.engines.base import Captured, CapturedSegment, Codec
from thaw.repo.context import Context
from thaw.repo.kept import Kept

T = TypeVar("T")


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """`new`: objects that the store may lack, referenced ones first. `kept`: what is stored once they are."""

    state: State
    state_id: StateId
    new: tuple[AnyObject, ...]
    full_nodes: tuple[tuple[SegmentNode | TurnNode, ObjectId], ...]
    kept: Kept


def build(context: Context, kept: Kept, captured: Captured) -> Built:
    """The objects of `captured`, whose KV before `captured.segments` is `kept`."""
    model_id = objects.encode(captured.identity)[0]
    _check_cover(kept, captured)
    chains = kept.chains_for(model_id, captured.tokens)
    segments = [_segment(captured, piece, chains) for piece in captured.segments]
    ids = [objects.encode(segment)[0] for segment in segments]
    entries = (
        *kept.entries,
        *(SegmentEntry(segment=i, start=s.start, length=len(s.tokens)) for i, s in zip(ids, segments, strict=True)),
    )
    turns, new_turns = _turns(kept, _tiled(captured.turns, captured.tokens, context.engine.codec))
    nodes = _Nodes(context)
    state = State(
        model=model_id,
        num_tokens=len(captured.tokens),
        num_kv=captured.num_kv,
        nodes=nodes.of([SegmentNode(entries=part) for part in _parts(entries)]),
        tail_tokens=captured.tokens[captured.num_kv :],
        turn_nodes=nodes.of([TurnNode(entries=part) for part in _parts([turn_id for _, turn_id in turns])]),
        num_turns=len(turns),
        seed=U64(captured.seed),
        salt=captured.salt,
        share_prefix=captured.share_prefix,
        boundary=captured.boundary,
    )
    return Built(
        state=state,
        state_id=objects.state_id(state),
        new=(captured.identity, *segments, *new_turns, *nodes.new, state),
        full_nodes=tuple(nodes.full),
        kept=Kept(model=model_id, entries=entries, chains=chains[: captured.num_kv // WINDOW + 1], turns=tuple(turns)),
    )


def _check_cover(kept: Kept, captured: Captured) -> None:
    """The engine's segments must go from the end of `kept` to num_kv without a gap."""
    end = kept.end
    for piece in captured.segments:
        if (
            piece.start != end
            or piece.length < 1
            or piece.start // WINDOW != (piece.start + piece.length - 1) // WINDOW
        ):
            raise LawBroken(
                f"the engine captured tokens [{piece.start}, {piece.start + piece.length}) after [0, {end}): segments "
                f"must follow one another and stay inside windows of {WINDOW}. This is a bug in the engine's adapter."
            )
        end += piece.length
    if end != captured.num_kv:
        raise LawBroken(
            f"the engine captured KV up to token {end} of {captured.num_kv}. This is a bug in the engine's adapter."
        )


def _segment(captured: Captured, piece: CapturedSegment, chains: Sequence[str]) -> Segment:
    window = piece.start // WINDOW
    end = piece.start + piece.length
    return Segment(
        start=piece.start,
        tokens=captured.tokens[piece.start : end],
        window=chains[window],
        prefix=prefix.extend(chains[window], captured.tokens[window * WINDOW : end]),
        blobs=piece.blobs,
    )


def _tiled(turns: Sequence[Turn], tokens: Sequence[int], codec: Codec) -> list[Turn]:
    """`turns` without gaps: tokens that no turn covers yet (a capture in the middle of a prefill) become a prompt."""
    out: list[Turn] = []
    for start, turn in ((t.start, t) for t in turns):
        end = out[-1].end if out else 0
        if start > end:
            out.append(Turn(kind="prompt", start=end, end=start, text=codec.decode(tokens[end:start])))
        out.append(turn)
    end = out[-1].end if out else 0
    if end < len(tokens):
        out.append(Turn(kind="prompt", start=end, end=len(tokens), text=codec.decode(tokens[end:])))
    return out


def _turns(kept: Kept, turns: Sequence[Turn]) -> tuple[list[tuple[Turn, ObjectId]], list[Turn]]:
    """(every turn with its id, those not known to be stored)."""
    known = kept.turns
    pairs: list[tuple[Turn, ObjectId]] = []
    new: list[Turn] = []
    for i, turn in enumerate(turns):
        if i < len(known) and (known[i][0] is turn or known[i][0] == turn):
            pairs.append((turn, known[i][1]))
        else:
            new.append(turn)
            pairs.append((turn, objects.encode(turn)[0]))
    return pairs, new


def _parts(entries: Sequence[T]) -> list[tuple[T, ...]]:
    return [tuple(entries[i : i + NODE_ENTRIES]) for i in range(0, len(entries), NODE_ENTRIES)]


class _Nodes:
    """Collects the nodes that have to be written."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.new: list[SegmentNode | TurnNode] = []
        self.full: list[tuple[SegmentNode | TurnNode, ObjectId]] = []

    def of(self, nodes: Sequence[SegmentNode] | Sequence[TurnNode]) -> tuple[str, ...]:
        ids = []
        for node in nodes:
            identifier, is_new = self._context.node_id(node)
            if is_new:
                self.new.append(node)
                if len(node.entries) == NODE_ENTRIES:
                    self.full.append((node, identifier))
            ids.append(identifier)
        return tuple(ids)
