"""One point in full: its commit, its turns with their text, its model, and what it weighs."""

from __future__ import annotations

import msgspec

from thaw.core.cache import keeps_all
from thaw.core.identity import ModelIdentity
from thaw.core.kv_ranges import KVRange
from thaw.core.objects import Boundary, Commit, Turn
from thaw.engines.text import cut_turns
from thaw.repo import cover, cut, timeline
from thaw.repo import log as logs
from thaw.repo.log import LogEntry
from thaw.repo.resolve import ResolvedPoint
from thaw.repo.weight import blobs_of, weigh
from thaw.store import Store


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """`nbytes`: bytes of the blobs that the point uses; `text` is the turns' texts, joined. `resumable`: the numbers of
    tokens that can be continued from up to here, or None where every one can. `kv_ranges`: which weights computed the
    KV, where that is not `model`'s alone."""

    point: ResolvedPoint
    entry: LogEntry
    model: ModelIdentity
    turns: tuple[Turn, ...]
    tokens: tuple[int, ...]
    num_kv: int
    seed: int
    share_prefix: bool
    boundary: Boundary | None
    nbytes: int
    num_blobs: int
    unfinished: bool
    resumable: tuple[int, ...] | None = None
    kv_ranges: tuple[KVRange, ...] = ()

    @property
    def text(self) -> str:
        return "".join(turn.text for turn in self.turns)


def show(store: Store, point: ResolvedPoint) -> Shown:
    """Read, not changed; no engine. A turn that an interior point cuts through has no text here."""
    commit = store.get_as(point.commit, Commit)
    line = timeline.read(store, timeline.read_state(store, point.state))
    num_kv = cover.num_kv_at(line, point.num_tokens)
    blobs = blobs_of(line, num_kv, with_boundary=point.at_end)
    turns = cut_turns(line.turns, line.tokens, point.num_tokens, None)
    model = store.get_as(line.state.model, ModelIdentity)
    resumable = None if keeps_all(model.groups) else tuple(cover.resumable(line))
    return Shown(
        point=point,
        entry=logs.entry(
            point.commit, commit, line.state, logs.names_at(store, [point.commit]),
            logs.StatePoints(store).of(point.state, line.state.model), store.absent(),
        ),
        model=model,
        turns=turns,
        tokens=line.tokens[: point.num_tokens],
        num_kv=num_kv,
        seed=int(line.state.seed),
        share_prefix=line.state.share_prefix,
        boundary=line.state.boundary if point.at_end else None,
        nbytes=weigh(store, blobs),
        num_blobs=len(blobs),
        unfinished=cut.unfinished(turns),
        resumable=resumable and tuple(n for n in resumable if n <= point.num_tokens),
        kv_ranges=timeline.ranges_at(line, num_kv, model),
    )  # fmt: skip
