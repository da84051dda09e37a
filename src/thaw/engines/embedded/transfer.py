"""Capture and hydrate of an embedded engine: the bytes between pages and packs, on an I/O thread.

A cut is taken by the driver at a step boundary and costs one tail page: full pages are immutable and shared, so the
session goes on while they are written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from thaw.core.errors import CorruptBlob, InvalidRequest, NotHit
from thaw.core.identity import CacheGroup, ModelIdentity
from thaw.core.objects import Boundary, Turn
from thaw.core.prefix import windows
from thaw.core.proof import Proof
from thaw.data.locations import BlobLocation
from thaw.data.pack import PackItem, read_blob, read_blobs, write_pack
from thaw.engines.base import Captured, CapturedSegment, CapturePlan, HydratePlan, Slice, WrittenPack
from thaw.engines.embedded.backend import Backend, Row
from thaw.engines.embedded.pages import PagedKV
from thaw.engines.embedded.session import LiveSession

SAFETENSORS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "uint8": "U8"}


@dataclass
class Cut:
    """A session at one step boundary; nothing in it changes any more."""

    policy: str
    epoch: int
    tokens: tuple[int, ...]
    kv: PagedKV
    turns: tuple[Turn, ...]
    seed: int
    salt: str
    share_prefix: bool
    boundary: Boundary | None
    hidden: tuple[bytes, str, tuple[int, ...]] | None
    cut_s: float


def cut(session: LiveSession, backend: Backend) -> Cut:
    """Take the session as it is. On the driver's thread, between steps."""
    started = time.perf_counter()
    hidden = None if session.row is None else backend.row_bytes(session.row)
    return Cut(
        policy=session.policy,
        epoch=session.epoch,
        tokens=tuple(session.tokens),
        kv=session.kv.fork(session.kv.num_tokens),
        turns=session.all_turns(),
        seed=session.seed,
        salt=session.salt,
        share_prefix=session.share_prefix,
        boundary=session.boundary(backend),
        hidden=hidden,
        cut_s=time.perf_counter() - started,
    )


def write(taken: Cut, plan: CapturePlan, identity: ModelIdentity) -> Captured:
    """Write what `plan` lacks of a cut into its pack; returns when it is synced."""
    group, num_kv = taken.kv.factory.group, taken.kv.num_tokens
    if not 0 <= plan.base <= num_kv:
        raise InvalidRequest(f"capture from token {plan.base}: the session has KV for {num_kv} tokens")
    spans = windows(plan.base, num_kv)
    items = [_item(taken.kv, group, head, a, b) for a, b in spans for head in range(group.num_kv_heads)]
    if taken.hidden is not None:
        items.append(_hidden_item(*taken.hidden))
    result = write_pack(plan.mount.packs, plan.packs[0], items) if items else None
    blobs = result.blobs if result is not None else ()
    heads = group.num_kv_heads
    segments = tuple(
        CapturedSegment(
            start=a, length=b - a, blobs={group.name: tuple(x.blob for x in blobs[i * heads : (i + 1) * heads])}
        )
        for i, (a, b) in enumerate(spans)
    )
    return Captured(
        identity=identity,
        tokens=taken.tokens,
        num_kv=num_kv,
        segments=segments,
        blobs=tuple(blobs),
        packs=(WrittenPack(name=result.name, nbytes=result.nbytes),) if result is not None else (),
        turns=taken.turns,
        seed=taken.seed,
        salt=taken.salt,
        share_prefix=taken.share_prefix,
        boundary=_with_hidden(taken, blobs),
        stages_s={"cut": taken.cut_s, **(result.stages_s if result is not None else {})},
    )


def _item(kv: PagedKV, group: CacheGroup, head: int, start: int, stop: int) -> PackItem:
    return PackItem(
        name_prefix="",
        dtype=SAFETENSORS[group.dtype],
        shape=(group.num_layers, 2, stop - start, group.head_dim),
        nbytes=group.token_nbytes_per_head * (stop - start),
        read=partial(kv.read, head, start, stop),
    )


def _hidden_item(data: bytes, dtype: str, shape: tuple[int, ...]) -> PackItem:
    return PackItem(name_prefix="", dtype=SAFETENSORS[dtype], shape=shape, nbytes=len(data), read=lambda: data)


def _with_hidden(taken: Cut, blobs: Sequence[BlobLocation]) -> Boundary | None:
    if taken.boundary is None or taken.hidden is None:
        return taken.boundary
    _, dtype, shape = taken.hidden
    return msgspec.structs.replace(taken.boundary, hidden=blobs[-1].blob, hidden_dtype=dtype, hidden_shape=shape)


@dataclass
class Loaded:
    kv: PagedKV
    row: Row | None
    proof: Proof


def load(plan: HydratePlan, backend: Backend) -> Loaded:
    """Read and verify a plan's KV into new pages. Raises `CorruptBlob`, `NotHit`, `InvalidRequest`."""
    started = time.perf_counter()
    _check_cover(plan)
    kv = PagedKV(backend)
    kv.reserve(plan.num_kv)
    allocated = time.perf_counter()
    wanted, staged = _targets(plan.slices, kv, backend.group)
    stats = read_blobs(plan.mount.packs, wanted)
    for head, piece, data in staged:
        kv.write(head, piece.start, piece.start + piece.length, memoryview(data), piece.stored)
    kv.num_tokens = sum(piece.length for piece in plan.slices)
    row = _hidden_row(plan, backend)
    if kv.num_tokens != plan.num_kv:
        raise NotHit(f"{kv.num_tokens} of {plan.num_kv} tokens were loaded; nothing was recomputed")
    proof = Proof(
        num_prompt_tokens=len(plan.tokens),
        num_cached_tokens=kv.num_tokens,
        matched=plan.num_kv,
        first_mismatch=None,
        nbytes=stats.nbytes,
        verification="disk-verified",
        continuation="decode-exact",
        share_prefix=plan.share_prefix,
        stages_s={"allocate": allocated - started, "read": stats.seconds, "load": time.perf_counter() - started},
    )
    return Loaded(kv, row, proof)


def _check_cover(plan: HydratePlan) -> None:
    at = 0
    for piece in plan.slices:
        inside = piece.start // 256 == (piece.start + piece.stored - 1) // 256
        if piece.start != at or not 1 <= piece.length <= piece.stored <= 256 or not inside:
            raise CorruptBlob(f"the state's segments do not join: one starts at {piece.start}, expected {at}")
        at += piece.length
    if at != plan.num_kv or not plan.num_kv <= len(plan.tokens):
        raise CorruptBlob(f"the state's segments cover {at} tokens; it says num_kv {plan.num_kv} of {len(plan.tokens)}")


def _targets(
    slices: Sequence[Slice], kv: PagedKV, group: CacheGroup
) -> tuple[list[tuple[BlobLocation, memoryview | None]], list[tuple[int, Slice, bytearray]]]:
    """Where each blob is read to: whole pages in place, the rest into staging that is cut afterwards."""
    wanted: list[tuple[BlobLocation, memoryview | None]] = []
    staged: list[tuple[int, Slice, bytearray]] = []
    for piece in slices:
        blobs = piece.blobs.get(group.name, ())
        if len(blobs) != group.num_kv_heads or set(piece.blobs) != {group.name}:
            raise CorruptBlob(f"the segment at {piece.start} has blobs {sorted(piece.blobs)}; expected {group.name!r}")
        for head, location in enumerate(blobs):
            if location.nbytes != group.token_nbytes_per_head * piece.stored:
                raise CorruptBlob(
                    f"blob {location.blob} has {location.nbytes} bytes, not those of {piece.stored} tokens"
                )
            target = kv.target(head, piece.start, piece.start + piece.length) if piece.length == piece.stored else None
            if target is None:
                staging = bytearray(location.nbytes)
                staged.append((head, piece, staging))
                target = memoryview(staging)
            wanted.append((location, target))
    return wanted, staged


def _hidden_row(plan: HydratePlan, backend: Backend) -> Row | None:
    bound = plan.boundary
    if bound is None or plan.hidden is None or bound.position != len(plan.tokens) or plan.num_kv != len(plan.tokens):
        return None
    return backend.row_from(read_blob(plan.mount.packs, plan.hidden), str(bound.hidden_dtype), bound.hidden_shape)
