"""From what an engine captured to what an engine hydrates, without a repository in between.

Also the means of the negative control: `tampered` changes one block of KV and hashes it again, so that every check
accepts it and only the numbers can tell.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from thaw.core import kv_ranges
from thaw.core.ids import digest
from thaw.core.objects import Boundary, Turn, without_chat
from thaw.data.locations import BlobLocation, StoreMount
from thaw.data.pack import PackItem, read_blob, write_pack
from thaw.data.tiers.folder import folder_mount
from thaw.data.tiers.mounted import Mounted
from thaw.engines.base import Captured, CapturePlan, HydratePlan, PointSlice, Slice

_NUMBERS = itertools.count()


def mount_at(folder: Path) -> StoreMount:
    """A store that is nothing but a folder of packs."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder_mount(digest(str(folder).encode())[3:35], folder)


def capture_plan(mount: StoreMount, base: int = 0, num_packs: int = 1) -> CapturePlan:
    """A capture into packs of its own."""
    return CapturePlan(mount=mount, packs=tuple(_pack_name() for _ in range(num_packs)), base=base)


def plan_from(captured: Captured, mount: StoreMount, *earlier: Captured, at: int | None = None) -> HydratePlan:
    """The plan that brings `captured` back, or its first `at` tokens.

    `earlier` are the captures that hold what comes before this one's `base`, in order. As everywhere in thaw, a point
    whose last hidden state is not kept has no KV for its last token: that token runs again.
    """
    whole = at is None or at == len(captured.tokens)
    end = len(captured.tokens) if at is None else at
    boundary = captured.boundary if whole else None
    hidden = _find_hidden(captured, boundary)
    num_kv = captured.num_kv if whole and hidden is not None else min(captured.num_kv, max(end - 1, 0))
    return HydratePlan(
        identity=captured.identity,
        mount=mount,
        tokens=captured.tokens[:end],
        num_kv=num_kv,
        slices=slices_of((*earlier, captured), num_kv),
        points=points_of((*earlier, captured), num_kv),
        turns=turns_at(captured.turns, end),
        seed=int(captured.seed),
        salt=captured.salt,
        share_prefix=captured.share_prefix,
        boundary=boundary,
        hidden=hidden,
        kv_ranges=kv_ranges.cut(captured.kv_ranges, num_kv),
    )


def slices_of(captures: Sequence[Captured], num_kv: int) -> tuple[Slice, ...]:
    """The captured segments, in order, as far as token `num_kv`."""
    out = []
    for captured in captures:
        where = {location.blob: location for location in captured.blobs}
        out += [
            Slice(
                start=segment.start,
                length=min(segment.length, num_kv - segment.start),
                stored=segment.length,
                blobs=_located(segment.blobs, where),
                first=segment.first,
            )
            for segment in captured.segments
            if segment.start < num_kv
        ]
    return tuple(out)


def points_of(captures: Sequence[Captured], num_kv: int) -> tuple[PointSlice, ...]:
    """The captured point states after at most `num_kv` tokens, in order."""
    out = []
    for captured in captures:
        where = {location.blob: location for location in captured.blobs}
        points = [point for segment in captured.segments for point in segment.points if point.token <= num_kv]
        out += [PointSlice(token=point.token, blobs=_located(point.blobs, where)) for point in points]
    return tuple(out)


def _located(
    blobs: Mapping[str, Sequence[str]], where: Mapping[str, BlobLocation]
) -> dict[str, tuple[BlobLocation, ...]]:
    return {group: tuple(where[blob] for blob in ids) for group, ids in blobs.items()}


def turns_at(turns: Sequence[Turn], end: int) -> tuple[Turn, ...]:
    """The turns of the first `end` tokens; a completion cut through is unfinished, so `resume` repeats the parent."""
    return tuple(turn if turn.end <= end else _cut(turn, end) for turn in turns if turn.start < end)


def _cut(turn: Turn, end: int) -> Turn:
    count = end - turn.start
    return msgspec.structs.replace(
        without_chat(turn),
        end=end,
        text="",
        finish_reason=None,
        stop_reason=None,
        logprobs=None if turn.logprobs is None else turn.logprobs[:count],
        top_logprobs=None if turn.top_logprobs is None else turn.top_logprobs[:count],
        entropies=turn.entropies and turn.entropies[:count],
    )


def _find_hidden(captured: Captured, boundary: Boundary | None) -> BlobLocation | None:
    if boundary is None or boundary.hidden is None:
        return None
    return next(location for location in captured.blobs if location.blob == boundary.hidden)


def tampered(
    plan: HydratePlan, change: Callable[[bytes], bytes], *, piece: int = 0, head: int = 0, group: str | None = None
) -> HydratePlan:
    """`plan` with one blob (of the first group, unless `group` is named) changed and hashed anew, in a pack of its own:
    it loads without complaint."""
    group = group or plan.identity.groups[0].name
    victim = plan.slices[piece]
    old = victim.blobs[group][head]
    data = change(read_blob(Mounted(plan.mount), old))
    assert len(data) == old.nbytes and digest(data) != old.blob, "the change must keep the size and change the bytes"
    item = PackItem(name_prefix="", dtype="U8", shape=(len(data),), nbytes=len(data), read=lambda: data)
    new = write_pack(Mounted(plan.mount), _pack_name(), [item]).blobs[0]
    heads = [new if i == head else location for i, location in enumerate(victim.blobs[group])]
    changed = msgspec.structs.replace(victim, blobs={**victim.blobs, group: tuple(heads)})
    slices = (*plan.slices[:piece], changed, *plan.slices[piece + 1 :])
    return msgspec.structs.replace(plan, slices=slices)


def halves_swapped(data: bytes) -> bytes:
    """One blob's first and second half of bytes swapped: other KV, made of the same ordinary numbers."""
    half = len(data) // 2
    return data[half:] + data[:half]


def flip_byte(packs: Path, location: BlobLocation, at: int = 0) -> None:
    """Damage a stored blob in place: what a failing disk does."""
    with (packs / location.pack).open("r+b") as file:
        file.seek(location.offset + at)
        byte = file.read(1)[0]
        file.seek(location.offset + at)
        file.write(bytes([byte ^ 0x01]))


def _pack_name() -> str:
    return f"test-{os.getpid()}-{next(_NUMBERS)}.safetensors"
