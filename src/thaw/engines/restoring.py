"""What an engine reads of a plan: the blobs of each cache group, checked against the group before a byte is used.

Shared by every engine, so that none guesses a group: a blob of the wrong group, size, first token or point is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from thaw.core import kv_ranges
from thaw.core.cache import CacheGroup, TokenGroup, list_of, point_groups, token_groups
from thaw.core.errors import CorruptBlob, NotKept, PolicyMismatch, Unsupported
from thaw.core.identity import ModelIdentity, compare
from thaw.core.kv_ranges import KVRange
from thaw.data.locations import BlobLocation
from thaw.engines.base import HydratePlan, PointSlice, Slice


class TokenRange(NamedTuple):
    """Tokens [start, stop) of a token group: the first of `stored` tokens in a blob of each place."""

    start: int
    stop: int
    stored: int
    places: tuple[BlobLocation, ...]


def check_weights(plan: HydratePlan, running: ModelIdentity) -> None:
    """Raise `Refused` where the plan's KV is of another model than runs, or, unless the plan asks for that, of other
    weights or another policy."""
    compare(plan.identity, running, stale_kv=plan.stale_kv)
    found = kv_ranges.stale(plan.kv_ranges, running.policy, running.weights)
    if found and not plan.stale_kv:
        raise PolicyMismatch(
            f"the plan's KV was computed under other policies than {running.policy!r}, which runs: "
            f"{kv_ranges.text(found)}. Recompute it (policy='recompute'), or take it as it is (stale_kv=True)."
        )


def ranges_of(plan: HydratePlan) -> tuple[KVRange, ...]:
    """Which weights computed the plan's KV. Raises `CorruptBlob` where the plan says so of other tokens than it has."""
    if not plan.kv_ranges and plan.num_kv:
        of = plan.identity
        return (KVRange(start=0, end=plan.num_kv, policy=of.policy, weights=of.weights),)
    if plan.kv_ranges:
        try:
            kv_ranges.check(plan.kv_ranges, plan.num_kv)
        except ValueError as error:
            raise CorruptBlob(str(error)) from None
    return plan.kv_ranges


def refuse_stale(plan: HydratePlan, engine: str) -> None:
    """For an engine that does not keep KV of other weights. Raises `Unsupported` where the plan asks for that."""
    if plan.stale_kv:
        raise Unsupported(
            f"stale_kv: the {engine} engine does not take KV of other weights or another policy with this model; "
            "recompute it (policy='recompute')"
        )


def check_kept(plan: HydratePlan) -> None:
    """Raise `NotKept` for a plan that can only be recomputed."""
    if plan.not_kept:
        raise NotKept(plan.not_kept)


def check_cover(plan: HydratePlan) -> None:
    """Raise `CorruptBlob` unless the plan's segments join, lie in windows, and end at `num_kv`."""
    at = 0
    for piece in plan.slices:
        inside = piece.start // 256 == (piece.start + piece.stored - 1) // 256
        if piece.start != at or not 1 <= piece.length <= piece.stored <= 256 or not inside:
            raise CorruptBlob(f"the state's segments do not join: one starts at {piece.start}, expected {at}")
        at += piece.length
    if at != plan.num_kv or not plan.num_kv <= len(plan.tokens):
        raise CorruptBlob(f"the state's segments cover {at} tokens; it says num_kv {plan.num_kv} of {len(plan.tokens)}")


def check_names(plan: HydratePlan, groups: Sequence[CacheGroup]) -> None:
    """Raise `CorruptBlob` for blobs of a group that the model has not."""
    known = {group.name for group in token_groups(groups)}
    for piece in plan.slices:
        strange = set(piece.blobs) - known
        if strange:
            raise CorruptBlob(f"the segment at {piece.start} has blobs of {sorted(strange)}, which the model has not")


def runs(plan: HydratePlan, group: TokenGroup) -> list[TokenRange]:
    """All that the plan has of a group, in the order of tokens. Raises `CorruptBlob` where something is missing that
    its point needs, or is not of the group's size."""
    covered = group.covers(plan.num_kv)
    found = []
    for piece in plan.slices:
        stop = piece.start + piece.length
        blobs, start = piece.blobs.get(group.name, ()), piece.first.get(group.name, piece.start)
        needed = range(max(covered.start, piece.start), min(covered.stop, stop))
        if blobs or needed:
            _check_blobs(piece, group, needed.start if needed else piece.start + piece.stored)
        if blobs and start < stop:
            found.append(TokenRange(start, stop, piece.start + piece.stored - start, blobs))
    return found


def kept_from(found: Sequence[TokenRange], num_kv: int) -> int:
    """The first token of those that are there without a gap up to `num_kv`."""
    at = num_kv
    for run in reversed(found):
        if run.stop != at:
            break
        at = run.start
    return at


def _check_blobs(piece: Slice, group: TokenGroup, needed: int) -> None:
    """The blobs of a group that tokens from `needed` on are taken from."""
    blobs, first = piece.blobs.get(group.name, ()), piece.first.get(group.name, piece.start)
    if len(blobs) != group.num_blobs:
        raise CorruptBlob(
            f"the segment at {piece.start} has {len(blobs)} blobs of cache group {group.name!r}; expected "
            f"{group.num_blobs} (it has blobs of {sorted(piece.blobs)})"
        )
    if not piece.start <= first <= needed:
        raise CorruptBlob(
            f"the segment at {piece.start} has cache group {group.name!r} from token {first} on; it is needed from "
            f"{needed} on"
        )
    for location in blobs:
        if location.nbytes != group.token_nbytes_per_blob * (piece.start + piece.stored - first):
            raise CorruptBlob(
                f"blob {location.blob} has {location.nbytes} bytes, not those of "
                f"{piece.start + piece.stored - first} tokens of cache group {group.name!r}"
            )


def states(plan: HydratePlan, groups: Sequence[CacheGroup]) -> list[tuple[PointSlice, list[BlobLocation]]]:
    """The plan's point states, each with all its blobs in order. Raises `CorruptBlob` where they are not the model's or
    the one at `num_kv` is missing."""
    groups = point_groups(groups)
    found = []
    for point in plan.points:
        if set(point.blobs) != {group.name for group in groups}:
            raise CorruptBlob(f"the states after {point.token} tokens are of {sorted(point.blobs)}, not of the model's")
        places = [place for group in groups for place in point.blobs[group.name]]
        sizes = [nbytes for group in groups for _, nbytes in group.blobs]
        if [place.nbytes for place in places] != sizes or not 0 < point.token <= plan.num_kv:
            raise CorruptBlob(
                f"the states after {point.token} tokens have blobs of {[place.nbytes for place in places]} bytes; "
                f"expected {sizes}, after at most {plan.num_kv} tokens"
            )
        found.append((point, places))
    if groups and plan.num_kv and plan.num_kv not in {point.token for point in plan.points}:
        raise CorruptBlob(
            f"the plan has no state after {plan.num_kv} tokens; it has states after "
            f"{list_of([point.token for point in plan.points])}"
        )
    return found


def num_shared(plan: HydratePlan, loaded: Sequence[Slice]) -> int:
    """How many of a plan's first tokens are of the very blobs that others were read from."""
    at = 0
    for piece, other in zip(plan.slices, loaded, strict=False):
        if _named(piece) != _named(other):
            break
        at += piece.length
    return at


def _named(piece: Slice) -> tuple[object, ...]:
    blobs = {group: [place.blob for place in places] for group, places in piece.blobs.items()}
    return piece.start, piece.length, piece.stored, piece.first, blobs
