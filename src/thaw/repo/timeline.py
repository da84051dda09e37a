"""Reading a state: its segment entries, tokens and turns, checked as they are read.

A state's objects come from files that anybody may have written, so nothing is taken on trust: entries must follow one
another without a gap, stay inside their segments and end at num_kv; turns must tile [0, num_tokens). Anything else is
`CorruptBlob`, naming the object.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from thaw.core import kv_ranges
from thaw.core.cache import CacheGroup
from thaw.core.errors import CorruptBlob
from thaw.core.identity import ModelIdentity
from thaw.core.ids import StateId
from thaw.core.kv_ranges import KVRange
from thaw.core.objects import Segment, SegmentEntry, SegmentNode, State, Turn, TurnNode
from thaw.store import Store


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """A state, read: `segments[i]` is what `entries[i]` names, `turn_ids[i]` the id of `turns[i]`. `groups`: the cache
    groups of its model."""

    state: State
    groups: tuple[CacheGroup, ...]
    entries: tuple[SegmentEntry, ...]
    segments: tuple[Segment, ...]
    tokens: tuple[int, ...]
    turns: tuple[Turn, ...]
    turn_ids: tuple[str, ...]


def read(store: Store, state: State) -> Timeline:
    """Everything about `state` but the bytes of its KV."""
    entries = read_entries(store, state)
    segments = tuple(segment for _, segment in read_segments(store, entries))
    tokens = [t for e, s in zip(entries, segments, strict=True) for t in s.tokens[: e.length]]
    return Timeline(
        state=state,
        groups=store.get_as(state.model, ModelIdentity).groups,
        entries=entries,
        segments=segments,
        tokens=(*tokens, *state.tail_tokens),
        turns=read_turns(store, state),
        turn_ids=read_turn_ids(store, state),
    )


def ranges_at(timeline: Timeline, num_kv: int, model: ModelIdentity, *, whole: bool = False) -> tuple[KVRange, ...]:
    """Which weights computed the KV of the first `num_kv` tokens; () where `model`'s did, unless `whole`."""
    all_of_model = KVRange(start=0, end=timeline.state.num_kv, policy=model.policy, weights=model.weights)
    ranges = kv_ranges.cut(timeline.state.ranges or (all_of_model,), num_kv)
    return ranges if whole else kv_ranges.stale(ranges, model.policy, model.weights)


def read_state(store: Store, state_id: StateId) -> State:
    return store.get_as(state_id, State)


def read_entries(store: Store, state: State) -> tuple[SegmentEntry, ...]:
    """The entries that cover exactly [0, num_kv)."""
    entries: list[SegmentEntry] = []
    for node_id in state.nodes:
        entries += store.get_as(node_id, SegmentNode).entries
    end = 0
    for entry in entries:
        if entry.start != end:
            raise CorruptBlob(f"segment {entry.segment} is at token {entry.start}; the one before it ends at {end}")
        end += entry.length
    if end != state.num_kv:
        raise CorruptBlob(f"a state's segments end at token {end}; it says that {state.num_kv} tokens have KV")
    return tuple(entries)


def read_segments(store: Store, entries: tuple[SegmentEntry, ...]) -> Iterator[tuple[SegmentEntry, Segment]]:
    """Each entry with its segment."""
    for entry in entries:
        segment = store.get_as(entry.segment, Segment)
        if segment.start != entry.start or entry.length > len(segment.tokens):
            raise CorruptBlob(
                f"an entry uses {entry.length} tokens at {entry.start} of segment {entry.segment}, "
                f"which holds {len(segment.tokens)} at {segment.start}"
            )
        yield entry, segment


def read_tokens(store: Store, state: State) -> tuple[int, ...]:
    """All token ids of the state."""
    tokens: list[int] = []
    for entry, segment in read_segments(store, read_entries(store, state)):
        tokens += segment.tokens[: entry.length]
    return (*tokens, *state.tail_tokens)


def read_window(store: Store, state: State, start: int, end: int) -> tuple[int, ...]:
    """Token ids in [start, end), as far as the state goes; reads only the segments that hold them."""
    tokens: list[int] = []
    wanted = tuple(e for e in read_entries(store, state) if e.start < end and e.start + e.length > start)
    for entry, segment in read_segments(store, wanted):
        tokens += segment.tokens[max(0, start - entry.start) : min(entry.length, end - entry.start)]
    tail = range(max(start, state.num_kv), min(end, state.num_tokens))
    return (*tokens, *(state.tail_tokens[i - state.num_kv] for i in tail))


def read_turn_ids(store: Store, state: State) -> tuple[str, ...]:
    ids = [turn for node in state.turn_nodes for turn in store.get_as(node, TurnNode).entries]
    if len(ids) != state.num_turns:
        raise CorruptBlob(f"a state lists {len(ids)} turns; it says that it has {state.num_turns}")
    return tuple(ids)


def read_turns(store: Store, state: State) -> tuple[Turn, ...]:
    """The turns, which tile [0, num_tokens)."""
    turns = tuple(store.get_as(turn, Turn) for turn in read_turn_ids(store, state))
    end = 0
    for turn in turns:
        if turn.start != end or turn.end < turn.start:
            raise CorruptBlob(f"a turn covers tokens [{turn.start}, {turn.end}); the one before it ends at {end}")
        end = turn.end
    if end != state.num_tokens:
        raise CorruptBlob(f"a state's turns end at token {end}; it has {state.num_tokens}")
    return turns
