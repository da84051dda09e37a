"""Capture and hydrate of an embedded engine: the bytes between pages and packs, on an I/O thread.

A cut is taken by the driver at a step boundary and costs one tail page: full pages are immutable and shared, so the
session goes on while they are written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeAlias

import msgspec

from thaw.core.cache import SAFETENSORS, TokenGroup, columns, point_groups, token_groups
from thaw.core.errors import InvalidRequest, NotHit
from thaw.core.identity import ModelIdentity
from thaw.core.objects import Boundary, StatesAtToken, Turn
from thaw.core.prefix import windows
from thaw.core.proof import Proof
from thaw.data.locations import BlobLocation
from thaw.data.pack import PackItem, read_blob, read_blobs, write_pack
from thaw.data.tiers.mounted import Mounted
from thaw.engines import restoring
from thaw.engines.base import Captured, CapturedSegment, CapturePlan, HydratePlan, WrittenPack
from thaw.engines.embedded.backend import Backend, Row
from thaw.engines.embedded.pages import PagedKV, there_until
from thaw.engines.embedded.session import LiveSession
from thaw.engines.embedded.stale import StaleKV
from thaw.engines.embedded.weights import Weights


@dataclass
class Cut:
    """A session at one step boundary; nothing in it changes any more."""

    policy: str
    epoch: int
    stale: StaleKV
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
    """Take the session as it is; its states are kept from here on. On the driver's thread, between steps."""
    started = time.perf_counter()
    session.kv.ask({session.kv.num_tokens} & session.kv.points.keys())
    hidden = None if session.row is None else backend.row_bytes(session.row)
    return Cut(
        policy=session.policy,
        epoch=session.epoch,
        stale=session.stale.child(session.of, session.kv.num_tokens),
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
    kv, num_kv = taken.kv, taken.kv.num_tokens
    if not 0 <= plan.base <= num_kv:
        raise InvalidRequest(f"capture from token {plan.base}: the session has KV for {num_kv} tokens")
    pieces = [_Piece(kv, start, stop) for start, stop in windows(plan.base, num_kv)]
    items = [item for piece in pieces for item in piece.items()]
    if taken.hidden is not None:
        items.append(_hidden_item(*taken.hidden))
    result = write_pack(Mounted(plan.mount), plan.packs[0], items) if items else None
    blobs = result.blobs if result is not None else ()
    ids = iter([place.blob for place in blobs])
    return Captured(
        identity=identity,
        tokens=taken.tokens,
        num_kv=num_kv,
        segments=tuple(piece.segment(ids) for piece in pieces),
        blobs=tuple(blobs),
        packs=(WrittenPack(name=result.name, nbytes=result.nbytes),) if result is not None else (),
        turns=taken.turns,
        seed=taken.seed,
        salt=taken.salt,
        share_prefix=taken.share_prefix,
        boundary=_with_hidden(taken, blobs),
        stages_s={"cut": taken.cut_s, **(result.stages_s if result is not None else {})},
        kv_ranges=taken.stale.ranges_of_cut(Weights(taken.policy, taken.epoch), num_kv),
    )


class _Piece:
    """Tokens [start, stop) of one window: what is kept of each group's tokens, and the states at tokens in
    (start, stop]."""

    def __init__(self, kv: PagedKV, start: int, stop: int) -> None:
        self._kv, self._start, self._stop = kv, start, stop
        groups = kv.factory.groups
        first = {group.name: kv.first_stored(group, start, stop) for group in token_groups(groups)}
        self._first = {name: token for name, token in first.items() if token < stop}
        self._columns = [(i, c.group) for i, c in enumerate(columns(groups)) if c.group.name in self._first]
        self._points = [token for token in kv.lasting() if start < token <= stop]
        self._states = point_groups(groups)

    def items(self) -> Iterator[PackItem]:
        for column, group in self._columns:
            yield _item(self._kv, column, group, self._first[group.name], self._stop)
        for token in self._points:
            kinds = [(part, (group.num_layers, *part.shape)) for group in self._states for part, _ in group.blobs]
            for (part, shape), data in zip(kinds, self._kv.points[token], strict=True):
                yield PackItem("", SAFETENSORS[part.dtype], shape, len(data), partial(bytes, data))

    def segment(self, ids: Iterator[str]) -> CapturedSegment:
        """With the ids of its items, which are the next of `ids`."""
        there = [group for group in token_groups(self._kv.factory.groups) if group.name in self._first]
        return CapturedSegment(
            start=self._start,
            length=self._stop - self._start,
            blobs={group.name: tuple(islice(ids, group.num_blobs)) for group in there},
            first={name: token for name, token in self._first.items() if token > self._start},
            points=tuple(
                StatesAtToken(
                    token=t, blobs={group.name: tuple(islice(ids, group.num_blobs)) for group in self._states}
                )
                for t in self._points
            ),
        )


def _item(kv: PagedKV, column: int, group: TokenGroup, start: int, stop: int) -> PackItem:
    return PackItem(
        name_prefix="",
        dtype=SAFETENSORS[group.dtype],
        shape=group.blob_shape(stop - start),
        nbytes=group.token_nbytes_per_blob * (stop - start),
        read=partial(kv.read, column, start, stop),
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


def load(plan: HydratePlan, backend: Backend, shared: PagedKV | None = None) -> Loaded:
    """Read and verify a plan's KV into new pages, behind those in `shared`, which has some of its first slices already
    and is this session's from now on. Raises `CorruptBlob`, `NotHit`, `InvalidRequest`."""
    started = time.perf_counter()
    restoring.check_cover(plan)
    kv = shared or PagedKV(backend)
    kv.reserve(plan.num_kv, ahead=1)
    allocated = time.perf_counter()
    wanted, staged = _targets(plan, kv)
    found = restoring.states(plan, backend.groups)
    states = [(point.token, [(place, bytearray(place.nbytes)) for place in places]) for point, places in found]
    wanted += [(place, memoryview(data)) for _, pairs in states for place, data in pairs]
    stats = read_blobs(Mounted(plan.mount), wanted)
    for column, start, stop, stored, staging in staged:
        kv.write(column, start, stop, memoryview(staging), stored)
    kv.num_tokens = sum(piece.length for piece in plan.slices)
    kv.points = {token: tuple(bytes(data) for _, data in pairs) for token, pairs in states}
    kv.asked = set(kv.points)
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


Staged: TypeAlias = tuple[int, int, int, int, bytearray]
"""Column, start, stop, tokens of the blob, its bytes: [start, stop) are the blob's first tokens."""


def _targets(plan: HydratePlan, kv: PagedKV) -> tuple[list[tuple[BlobLocation, memoryview | None]], list[Staged]]:
    """Where each blob is read to: whole pages in place, the rest into staging that is cut afterwards. What `kv` has by
    now is not read."""
    wanted: list[tuple[BlobLocation, memoryview | None]] = []
    staged: list[Staged] = []
    restoring.check_names(plan, kv.factory.groups)
    column = 0
    for group in token_groups(kv.factory.groups):
        found = restoring.runs(plan, group)
        for start, stop, stored, places in found:
            if stop <= kv.num_tokens:
                continue
            for index, location in enumerate(places):
                target = kv.target(column + index, start, stop) if stop - start == stored else None
                if target is None:
                    staging = bytearray(location.nbytes)
                    staged.append((column + index, start, stop, stored, staging))
                    target = memoryview(staging)
                wanted.append((location, target))
        column += group.num_blobs
        kv.there[group.name] = tuple(range(run.start, run.stop) for run in found)
    kv.there = there_until(kv.there, plan.num_kv)
    return wanted, staged


def _hidden_row(plan: HydratePlan, backend: Backend) -> Row | None:
    bound = plan.boundary
    if bound is None or plan.hidden is None or bound.position != len(plan.tokens) or plan.num_kv != len(plan.tokens):
        return None
    return backend.row_from(read_blob(Mounted(plan.mount), plan.hidden), str(bound.hidden_dtype), bound.hidden_shape)
