"""Hydrate: from a resolved point to a live session.

The plan is small values; the engine reads the packs itself. Packs may be moved by gc between the look-up and the read:
the look-up is then done once more. A reader's lease holds what the plan names while the engine reads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeAlias

import msgspec

from thaw.core import kv_ranges
from thaw.core.canonical import U64
from thaw.core.errors import InvalidRequest, NotKept, PolicyMismatch, StorageFailed, Unsupported
from thaw.core.identity import ModelIdentity
from thaw.core.objects import Segment, SegmentEntry, Turn
from thaw.core.proof import Proof
from thaw.data.locations import BlobLocation, StoreMount
from thaw.data.pack import MissingPack
from thaw.engines.base import Codec, Engine, HydratePlan, PointSlice, Policy, SessionRef, Slice
from thaw.engines.text import cut_turns
from thaw.repo import cover, cut, kept
from thaw.repo.context import Context
from thaw.repo.kept import Kept
from thaw.repo.resolve import ResolvedPoint
from thaw.repo.timeline import Timeline, ranges_at, read, read_state
from thaw.store import Store

Named: TypeAlias = dict[str, tuple[str, ...]]
"""Ids of blobs by cache group."""
POLICIES = ("exact", "fast", "recompute")


class Hydration(msgspec.Struct, frozen=True, kw_only=True):
    """A live session, its proof, and what of it the store has."""

    session: SessionRef
    proof: Proof
    kept: Kept
    plan: HydratePlan


def hydrate(
    context: Context,
    point: ResolvedPoint,
    *,
    seed: int | None = None,
    share_prefix: bool = False,
    policy: Policy = "exact",
    stale_kv: bool = False,
    beside: SessionRef | None = None,
    adapter: str | None = None,
) -> Hydration:
    """Bring `point` back. `beside`: a live session with which it may share what both have at their start.
    `adapter`: as in `HydratePlan`. Raises
    `Refused` (identity; `NotKept`), `Damaged` (bytes), `NotHit`, and `Unsupported` for `stale_kv` in an engine that
    takes no KV of other weights."""
    if policy not in POLICIES:
        raise InvalidRequest(f"policy={policy!r}: must be one of {', '.join(POLICIES)}")
    if stale_kv and policy == "recompute":
        raise InvalidRequest(
            "stale_kv=True takes KV as it is and policy='recompute' prefills it again; give one of the two"
        )
    engine = context.engine
    if stale_kv:
        require_stale_kv(engine)
    with reading(context.store, point):
        timeline = read(context.store, read_state(context.store, point.state))
        for last in (False, True):
            plan = make_plan(
                context.store, context.mount, timeline, point.num_tokens,
                codec=engine.codec, seed=seed, share_prefix=share_prefix, policy=policy, stale_kv=stale_kv,
            )  # fmt: skip
            plan = msgspec.structs.replace(plan, beside=beside, adapter=adapter)
            try:
                done = engine.hydrate(plan).result()
                break
            except MissingPack:
                if last:
                    raise
    loaded = done.proof.hit or (bool(plan.not_kept) and done.proof.num_cached_tokens == plan.num_kv > 0)
    return Hydration(
        session=done.session,
        proof=done.proof,
        kept=kept.of_timeline(timeline, plan.num_kv, context.store.namespace) if loaded else Kept(),
        plan=plan,
    )


@contextlib.contextmanager
def reading(store: Store, point: ResolvedPoint) -> Iterator[None]:
    """A reader's lease on a point; none in a repository that cannot be written to, where gc cannot run either."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(StorageFailed):
            stack.enter_context(store.reading(point.commit))
        yield


def make_plan(
    store: Store,
    mount: StoreMount,
    timeline: Timeline,
    num_tokens: int,
    *,
    codec: Codec | None = None,
    seed: int | None = None,
    share_prefix: bool = False,
    policy: Policy = "exact",
    stale_kv: bool = False,
) -> HydratePlan:
    """The plan for the first `num_tokens` tokens of a state, with every blob located that is needed there. Raises
    `NotKept` where one is not stored; with `recompute` the plan says so and names those of the nearest earlier point.
    Raises `PolicyMismatch` for KV of other weights than the state's model, unless `stale_kv` asks for it; with
    `recompute` the plan names none of it.
    """
    state = timeline.state
    model = store.get_as(state.model, ModelIdentity)
    stale = "" if stale_kv else _stale(timeline, num_tokens, model)
    if stale and policy != "recompute":
        raise PolicyMismatch(f"{stale}. Recompute it (policy='recompute'), or take it as it is (stale_kv=True)")
    not_kept = stale or (_not_kept(timeline, num_tokens) if policy == "recompute" else "")
    if not not_kept:
        cover.require(timeline, num_tokens)
    if stale:
        num_kv = 0
    else:
        num_kv = cover.nearest(timeline, num_tokens) if not_kept else cover.num_kv_at(timeline, num_tokens)
    turns = cut_turns(timeline.turns, timeline.tokens, num_tokens, codec)
    boundary = state.boundary if num_tokens == state.num_tokens and not not_kept else None
    hidden = boundary.hidden if boundary is not None else None
    used, at = list(cover.blobs_at(timeline, num_kv)), cover.state_at(timeline, num_kv)
    named = [blobs for _, _, blobs in used] + ([at.blobs] if at else [])
    found = store.locate([b for one in named for ids in one.values() for b in ids] + ([hidden] if hidden else []))
    return HydratePlan(
        identity=model,
        mount=mount,
        tokens=timeline.tokens[:num_tokens],
        num_kv=num_kv,
        slices=tuple(_slice(entry, segment, blobs, num_kv, found) for entry, segment, blobs in used),
        points=(PointSlice(token=num_kv, blobs=_located(at.blobs, found)),) if at else (),
        turns=turns if seed is None else _reseed(turns, seed),
        seed=int(state.seed) if seed is None else seed,
        salt=state.salt,
        share_prefix=state.share_prefix or share_prefix,
        boundary=boundary,
        hidden=found[hidden] if hidden else None,
        policy=policy,
        not_kept=not_kept,
        stale_kv=stale_kv,
        kv_ranges=ranges_at(timeline, num_kv, model, whole=True) if stale_kv else (),
    )


def require_stale_kv(engine: Engine) -> None:
    """Raise `Unsupported` for an engine that keeps no KV of other weights."""
    if "stale-kv" not in engine.info.capabilities:
        raise Unsupported(
            f"stale_kv=True: the {engine.info.name} engine keeps no KV of other weights or another policy with this "
            "model. Recompute it: commit before the step, and continue with policy='recompute'"
        )


def _stale(timeline: Timeline, num_tokens: int, model: ModelIdentity) -> str:
    """Of which policies the point's KV is, where that is not the model's alone; "" where it is."""
    found = ranges_at(timeline, cover.num_kv_at(timeline, num_tokens), model)
    return f"the point's KV was kept over policy steps: {kv_ranges.text(found)}" if found else ""


def _not_kept(timeline: Timeline, num_tokens: int) -> str:
    """Why the point cannot be continued from as it is stored; "" where it can."""
    try:
        cover.require(timeline, num_tokens)
    except NotKept as refusal:
        return str(refusal)
    return ""


def _slice(entry: SegmentEntry, segment: Segment, blobs: Named, num_kv: int, found: dict[str, BlobLocation]) -> Slice:
    return Slice(
        start=entry.start,
        length=min(entry.length, num_kv - entry.start),
        stored=len(segment.tokens),
        blobs=_located(blobs, found),
        first={group: segment.first_of(group) for group in blobs if segment.first_of(group) > entry.start},
    )


def _located(blobs: Named, found: dict[str, BlobLocation]) -> dict[str, tuple[BlobLocation, ...]]:
    return {group: tuple(found[blob] for blob in ids) for group, ids in blobs.items()}


def _reseed(turns: tuple[Turn, ...], seed: int) -> tuple[Turn, ...]:
    """A new seed also holds for the completion that was cut through."""
    if not cut.unfinished(turns):
        return turns
    return (*turns[:-1], msgspec.structs.replace(turns[-1], seed=U64(seed)))
