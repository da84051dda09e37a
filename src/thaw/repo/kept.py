"""What of a session is in the store already: its *kept* part.

A session, its forks and what is hydrated from it share a lineage: the same bytes for the same tokens. `Kept` is the
leading run of tokens of one session whose KV is stored, as segment entries. Forks inherit it, cut where the fork cuts;
a commit writes what lies behind it. Immutable; nothing here is written anywhere.

It is only ever a saving: where it turns out wrong (gc took the segments, the model changed) the commit starts from an
empty one and writes all.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from thaw.core import kv_ranges, prefix
from thaw.core.ids import ObjectId
from thaw.core.kv_ranges import KVRange
from thaw.core.objects import SegmentEntry, State, Turn
from thaw.core.prefix import WINDOW
from thaw.repo.timeline import Timeline

MAX_PIECES = 8
"""A full window that lies in this many pieces is written once more as one segment."""


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens [0, end) of a session are in the store.

    `chains[k]` is the prefix hash before window k, as far as known. `turns` are stored turns with their ids.
    `kv_ranges`: which weights computed them, where that is not `model`'s alone.
    """

    model: ObjectId | None = None
    entries: tuple[SegmentEntry, ...] = ()
    chains: tuple[str, ...] = ()
    turns: tuple[tuple[Turn, ObjectId], ...] = ()
    kv_ranges: tuple[KVRange, ...] = ()

    @property
    def end(self) -> int:
        return self.entries[-1].start + self.entries[-1].length if self.entries else 0

    def cut(self, num_kv: int) -> Kept:
        """The part before token `num_kv`. A cut inside a segment keeps its first tokens and re-cuts nothing."""
        if num_kv >= self.end:
            return self
        entries = [e for e in self.entries if e.start + e.length <= num_kv]
        if len(entries) < len(self.entries) and (partial := self.entries[len(entries)]).start < num_kv:
            entries.append(msgspec.structs.replace(partial, length=num_kv - partial.start))
        return Kept(
            model=self.model,
            entries=tuple(entries),
            chains=self.chains[: num_kv // WINDOW + 1],
            turns=tuple(pair for pair in self.turns if pair[0].end <= num_kv),
            kv_ranges=kv_ranges.cut(self.kv_ranges, num_kv),
        )

    def usable(self, model: ObjectId | None, ranges: Sequence[KVRange]) -> Kept:
        """What of it a session has whose KV is `model`'s (None: not known), or of `ranges`: the same weights must have
        computed it. A stale session's segments are no other's."""
        if ranges:
            return self.cut(kv_ranges.agreement(self.kv_ranges, ranges)) if self.kv_ranges else Kept()
        return Kept() if self.kv_ranges or self.model not in (None, model) else self

    def base(self, num_kv: int, *, rewrite: bool = True) -> int:
        """Where the next capture starts in a session with `num_kv` tokens of KV: at the end of what is kept, or, with
        `rewrite`, at the start of its last window when that has filled up in many small pieces."""
        window = self.end // WINDOW * WINDOW
        pieces = sum(e.start >= window for e in self.entries[-WINDOW:])
        return window if rewrite and pieces >= MAX_PIECES and num_kv >= window + WINDOW else self.end

    def chains_for(self, root: str, tokens: Sequence[int]) -> tuple[str, ...]:
        """Prefix hashes before every window of `tokens` from `root` on, computed from where they are known."""
        chains = list(self.chains) if self.chains[:1] == (root,) else [root]
        for start in range((len(chains) - 1) * WINDOW, len(tokens) - WINDOW + 1, WINDOW):
            chains.append(prefix.extend(chains[-1], tokens[start : start + WINDOW]))
        return tuple(chains)


def root_of(state: State, namespace: str) -> str:
    """Where the prefix hashes of a state's segments begin."""
    return prefix.stale_root(state.salt, namespace) if state.ranges else prefix.root(state.model, namespace)


def of_timeline(timeline: Timeline, num_kv: int, namespace: str) -> Kept:
    """What is kept of a session hydrated from `timeline` with its first `num_kv` tokens of KV."""
    model = ObjectId(timeline.state.model)
    turns = zip(timeline.turns, timeline.turn_ids, strict=True)
    kept = Kept(
        model=model,
        entries=timeline.entries,
        turns=tuple((turn, ObjectId(i)) for turn, i in turns),
        kv_ranges=timeline.state.ranges,
    )
    chains = kept.chains_for(root_of(timeline.state, namespace), timeline.tokens[: kept.end])
    return msgspec.structs.replace(kept, chains=chains).cut(num_kv)
