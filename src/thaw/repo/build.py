"""From a capture to objects: segments, nodes, turns, the state, put into a transaction.

What the engine captured is put behind what was kept; full nodes of 64 entries come out with the ids that they had, so
that a commit writes what is new and not what is long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from thaw.core import prefix
from thaw.core.cache import point_groups, token_groups
from thaw.core.canonical import U64
from thaw.core.errors import LawBroken
from thaw.core.ids import ObjectId, StateId
from thaw.core.objects import (
    NODE_ENTRIES,
    AnySegment,
    Segment,
    SegmentEntry,
    SegmentNode,
    State,
    Turn,
    TurnNode,
    with_points,
    with_ranges,
)
from thaw.core.prefix import WINDOW
from thaw.engines.base import Captured, CapturedSegment, Codec
from thaw.engines.text import text_after
from thaw.repo.context import Context
from thaw.repo.kept import Kept
from thaw.store import Transaction

T = TypeVar("T")


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """`kept`: what is stored once the transaction is committed; `full_nodes`: nodes that may be remembered then."""

    state_id: StateId
    full_nodes: tuple[tuple[SegmentNode | TurnNode, ObjectId], ...]
    kept: Kept


def build(context: Context, tx: Transaction, kept: Kept, captured: Captured) -> Built:
    """Put the objects of `captured`, whose KV before `captured.segments` is `kept`; referenced ones first."""
    _check_cover(kept, captured)
    model_id = tx.put(captured.identity)
    chains = kept.chains_for(_root(captured, model_id, context.store.namespace), captured.tokens)
    segments = [_segment(captured, piece, chains) for piece in captured.segments]
    entries = (
        *kept.entries,
        *(SegmentEntry(segment=tx.put(s), start=s.start, length=len(s.tokens)) for s in segments),
    )
    turns = _turns(tx, kept, _tiled(captured.turns, captured.tokens, context.engine.codec))
    nodes = _Nodes(context, tx)
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
        state_id=StateId(tx.put(with_ranges(state, captured.kv_ranges))),
        full_nodes=tuple(nodes.full),
        kept=Kept(
            model=model_id,
            entries=entries,
            chains=chains[: captured.num_kv // WINDOW + 1],
            turns=tuple(turns),
            kv_ranges=captured.kv_ranges,
        ),
    )


def _root(captured: Captured, model: ObjectId, namespace: str) -> str:
    """As `kept.root_of`, of what is to become a state."""
    return prefix.stale_root(captured.salt, namespace) if captured.kv_ranges else prefix.root(model, namespace)


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
    _check_groups(captured)


def _check_groups(captured: Captured) -> None:
    """What the end of the capture needs of each group must be there."""
    groups, num_kv = captured.identity.groups, captured.num_kv
    for piece in captured.segments:
        for group in token_groups(groups):
            number = len(piece.blobs.get(group.name, ()))
            needed = group.covers(num_kv).start < piece.start + piece.length
            if number != group.num_blobs and (number or needed):
                raise LawBroken(
                    f"the engine captured {number} blobs of cache group {group.name} at token {piece.start}, not "
                    f"{group.num_blobs}. This is a bug in the engine's adapter."
                )
    last = captured.segments[-1].points if captured.segments else ()
    if captured.segments and point_groups(groups) and num_kv not in {point.token for point in last}:
        raise LawBroken(f"the engine captured no state after {num_kv} tokens. This is a bug in the engine's adapter.")


def _segment(captured: Captured, piece: CapturedSegment, chains: Sequence[str]) -> AnySegment:
    window = piece.start // WINDOW
    end = piece.start + piece.length
    segment = Segment(
        start=piece.start,
        tokens=captured.tokens[piece.start : end],
        window=chains[window],
        prefix=prefix.extend(chains[window], captured.tokens[window * WINDOW : end]),
        blobs=piece.blobs,
    )
    return with_points(segment, piece.first, piece.points) if piece.first or piece.points else segment


def _tiled(turns: Sequence[Turn], tokens: Sequence[int], codec: Codec) -> list[Turn]:
    """`turns` without gaps: tokens that no turn covers yet (a capture in the middle of a prefill) become a prompt."""
    out: list[Turn] = []
    for start, turn in (*((t.start, t) for t in turns), (len(tokens), None)):
        end = out[-1].end if out else 0
        if start > end:
            text = text_after(codec, tokens[:end], tokens[end:start])
            out.append(Turn(kind="prompt", start=end, end=start, text=text))
        if turn is not None:
            out.append(turn)
    return out


def _turns(tx: Transaction, kept: Kept, turns: Sequence[Turn]) -> list[tuple[Turn, ObjectId]]:
    """Every turn with its id; those not known to be stored are put."""
    known = kept.turns
    return [
        (turn, known[i][1] if i < len(known) and (known[i][0] is turn or known[i][0] == turn) else tx.put(turn))
        for i, turn in enumerate(turns)
    ]


def _parts(entries: Sequence[T]) -> list[tuple[T, ...]]:
    return [tuple(entries[i : i + NODE_ENTRIES]) for i in range(0, len(entries), NODE_ENTRIES)]


class _Nodes:
    """Puts the nodes that are not known to be stored."""

    def __init__(self, context: Context, tx: Transaction) -> None:
        self._context, self._tx = context, tx
        self.full: list[tuple[SegmentNode | TurnNode, ObjectId]] = []

    def of(self, nodes: Sequence[SegmentNode] | Sequence[TurnNode]) -> tuple[str, ...]:
        return tuple(self._id(node) for node in nodes)

    def _id(self, node: SegmentNode | TurnNode) -> ObjectId:
        known = self._context.node_id(node)
        if known is not None:
            return known
        identifier = self._tx.put(node)
        if len(node.entries) == NODE_ENTRIES:
            self.full.append((node, identifier))
        return identifier
