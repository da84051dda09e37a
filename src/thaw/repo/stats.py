"""Stats: what a repository holds, what sharing saves, and whose the bytes are. Read from objects alone; no engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec

from thaw.core.cache import CacheGroup, nbytes_at
from thaw.core.identity import ModelIdentity
from thaw.core.ids import CommitId
from thaw.core.objects import Commit, Segment, State, segment_blobs
from thaw.repo import log as logs
from thaw.repo import timeline
from thaw.repo.weight import weigh
from thaw.store import Ref, Store
from thaw.store.store import DiskUsage


class RefStats(msgspec.Struct, frozen=True, kw_only=True):
    """A branch or tag. `nbytes`: KV that its tip needs; `own_nbytes`: of that, what no other branch or tag needs."""

    name: str
    kind: str
    commit: CommitId
    num_tokens: int
    nbytes: int
    own_nbytes: int


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """`whole_nbytes`: the KV of all commits if each held its own; `kv_nbytes`: what is stored of it, once.

    Of a namespace it counts the KV that its commits reach, as if nobody else had any of it; files are the whole
    repository's, and 0 there.

    `num_tokens_saved`: tokens that further children of a commit continued from and did not read again: for each commit,
    its tokens, times its children but one. `seconds_saved`: those at a rate of prefilling; None where none is known.
    """

    num_commits: int
    num_packs: int
    pack_nbytes: int
    database_nbytes: int
    kv_nbytes: int
    whole_nbytes: int
    num_tokens_saved: int
    seconds_saved: float | None
    refs: tuple[RefStats, ...]

    @property
    def dedup(self) -> float:
        """How many times what is stored the commits would take if each held its own."""
        return self.whole_nbytes / self.kv_nbytes if self.kv_nbytes else 1.0


def stats(store: Store, *, prefill_tokens_per_s: float | None = None) -> Stats:
    """Looks at all commits that branches and tags reach, and at all that is stored (of a namespace: what they need)."""
    groups: dict[str, tuple[CacheGroup, ...]] = {}
    children: Counter[str] = Counter()
    num_tokens: dict[str, int] = {}
    whole = 0
    reached: set[str] = set()
    for entry in logs.log(store, logs.tips(store)):
        state = store.get_as(entry.state, State)
        if state.model not in groups:
            groups[state.model] = store.get_as(state.model, ModelIdentity).groups
        if store.namespace:
            reached.update(one.segment for one in timeline.read_entries(store, state))
        whole += nbytes_at(groups[state.model], state.num_kv)
        num_tokens[entry.commit] = state.num_tokens
        children.update(entry.parents)
    saved = sum((num - 1) * num_tokens.get(commit, 0) for commit, num in children.items())
    used = store.usage() if not store.namespace else DiskUsage(0, 0, _weigh(store, reached), 0)
    return Stats(
        num_commits=len(num_tokens),
        num_packs=used.num_packs,
        pack_nbytes=used.pack_nbytes,
        database_nbytes=used.database_nbytes,
        kv_nbytes=used.blob_nbytes,
        whole_nbytes=whole,
        num_tokens_saved=saved,
        seconds_saved=saved / prefill_tokens_per_s if prefill_tokens_per_s else None,
        refs=_refs(store, store.refs()),
    )


def _weigh(store: Store, segments: Iterable[str]) -> int:
    blobs = {blob for one in segments for blob in segment_blobs(store.get_as(one, Segment))}
    return weigh(store, blobs)


def _refs(store: Store, refs: list[Ref]) -> tuple[RefStats, ...]:
    states = {ref.name: store.get_as(store.get_as(ref.target, Commit).state, State) for ref in refs}
    segments = {name: [e.segment for e in timeline.read_entries(store, state)] for name, state in states.items()}
    users = Counter(segment for used in segments.values() for segment in set(used))
    nbytes = {segment: weigh(store, segment_blobs(store.get_as(segment, Segment))) for segment in users}
    return tuple(
        RefStats(
            name=ref.name,
            kind=ref.kind,
            commit=ref.target,
            num_tokens=states[ref.name].num_tokens,
            nbytes=sum(nbytes[one] for one in segments[ref.name]),
            own_nbytes=sum(nbytes[one] for one in segments[ref.name] if users[one] == 1),
        )
        for ref in refs
    )
