"""Packs on the worker's side: a hydrate plan into the arena, a record into a pack, on this rank's blobs.

The bytes go straight between a store's tiers and the arena; every blob is verified as it is read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from thaw.core.cache import SAFETENSORS, CacheGroup, TokenGroup, point_groups, token_groups
from thaw.core.prefix import windows
from thaw.data.locations import BlobLocation, StoreMount
from thaw.data.pack import PackItem, stream_blobs, write_pack
from thaw.data.reader import ReadStats
from thaw.data.readers.orders import BlobRows, Placed
from thaw.data.tiers.mounted import Mounted
from thaw.engines import restoring
from thaw.engines.base import HydratePlan
from thaw.engines.restoring import TokenRange
from thaw.engines.served.budget import Caller
from thaw.engines.served.mailbox import Mailbox
from thaw.engines.served.protocol import Answer, Blob
from thaw.engines.served.worker.host_cache import HostCache, HostRecord, Piece, Tensors
from thaw.engines.served.worker.rank_groups import RankGroups
from thaw.engines.served.worker.reader_processes import ReaderProcesses, readable

READERS = min(12, max(2, len(os.sched_getaffinity(0))))
"""Threads that read a plan's blobs, each with one blob of scratch. By 12 rather than 16 a session is hydrated as fast,
and the largest gap of others falls from 31 to 19 ms on 32 cores, from 36 to 21 ms on 16 (docs/performance.md)."""


class PlacedPart(NamedTuple):
    """Part of a blob, and where it belongs: of each layer's bytes, from `source` on, planes of `stored` tokens, whose
    first ones fill `place`, bytes of [layer][plane][token][width]."""

    place: np.ndarray[Any, np.dtype[np.uint8]]
    source: int
    stored: int

    def fill(self, data: memoryview) -> None:
        num_layers, num_planes, length, width = self.place.shape
        end = self.source + num_planes * self.stored * width
        layers = np.frombuffer(data, dtype=np.uint8).reshape(num_layers, -1)
        planes = layers[:, self.source : end].reshape(num_layers, num_planes, self.stored, width)
        self.place[:] = planes[:, :, :length]

    def rows(self, nbytes: int, arena: int) -> BlobRows:
        """The same of a blob of `nbytes` for a reader, whose arena begins at the address `arena` of this process."""
        num_layers, num_planes, length, width = self.place.shape
        return BlobRows(
            num_layers, num_planes, length * width,
            source=self.source, layer_step=nbytes // num_layers, plane_step=self.stored * width,
            place=self.place.__array_interface__["data"][0] - arena, row_step=self.place.strides[1],
        )  # fmt: skip


Wanted: TypeAlias = tuple[BlobLocation, tuple[PlacedPart, ...]]


@dataclass(frozen=True)
class Read:
    """What a plan brought into the arena."""

    pieces: tuple[Piece, ...] = ()
    points: dict[int, Tensors] = field(default_factory=dict)
    nbytes: int = 0
    seconds: float = 0.0


class PackIO:
    """`interior`: what is written holds the windows of all tokens, not those of its end alone. `readers`: processes
    that read in place of this one's threads, into an arena that they share."""

    def __init__(
        self, groups: RankGroups, mail: Mailbox, arena: HostCache, *, interior: bool = False, readers: int = 0
    ) -> None:
        self._interior = interior
        self._groups, self._mail, self._arena = groups, mail, arena
        self._token_groups, self._point_groups = token_groups(groups.groups), point_groups(groups.groups)
        self.readers = ReaderProcesses(readers, arena.slab) if readers and arena.slab is not None else None

    def counts(self) -> dict[str, int]:
        """Of readers, where there are any."""
        return {} if self.readers is None else {"reader_loads": self.readers.loads, "reader_waits": self.readers.waits}

    def close(self) -> None:
        """What is read from now on is read by threads."""
        if self.readers is not None:
            self.readers.close()

    # -- from packs

    def read(self, plan: HydratePlan, caller: Caller, since: int = 0) -> Read:
        """The plan's tokens from `since` on, where one of its slices begins, in one piece, and its states; every blob
        verified in scratch memory before it is laid out there. It counts for `caller`. Raises `CorruptBlob` for a plan
        that is not of these cache groups. Only where every group keeps all tokens may `since` be other than 0."""
        restoring.check_cover(plan)
        restoring.check_names(plan, self._groups.groups)
        if plan.num_kv <= since:
            return Read()
        found = [restoring.runs(plan, group) for group in self._token_groups]
        states = restoring.states(plan, self._groups.groups)
        kept = [restoring.kept_from(runs, plan.num_kv) for runs in found]
        late = tuple(kept[self._token_groups.index(strip.group)] for strip in self._groups.strips)
        length = plan.num_kv - since
        piece = Piece(since, length, self._arena.allocate(length, caller, late), late=late)
        wanted: list[Wanted] = []
        for group, runs, first in zip(self._token_groups, found, kept, strict=True):
            wanted += self._wanted(piece, group, [run for run in runs if run.start >= max(first, since)])
        points = {}
        for point, _ in states:
            points[point.token] = self._arena.allocate_states(caller)
            own = [point.blobs[group.name][index] for group in self._point_groups for index in self._groups.held(group)]
            wanted += [(place, (_whole(t),)) for place, t in zip(own, points[point.token], strict=True)]
        tensors = (*piece.tensors, *(tensor for state in points.values() for tensor in state))
        stats = self._by_readers(plan.mount, wanted, tensors) or _by_threads(plan.mount, wanted)
        return Read((piece,), points, stats.nbytes, stats.seconds)

    def _by_readers(self, mount: StoreMount, wanted: Sequence[Wanted], tensors: Tensors) -> ReadStats | None:
        """None: there are none, what is wanted lies where they cannot reach it, or they died."""
        slab, readers = self._arena.slab, self.readers
        if readers is None or slab is None or not readers.most or not readable(mount):
            return None
        if any(slab.offset(tensor) is None for tensor in tensors):
            return None  # spilled
        arena = slab.memory.data_ptr()
        return readers.read(mount, [_placed(place, parts, arena) for place, parts in wanted])

    def _wanted(self, piece: Piece, group: TokenGroup, runs: Sequence[TokenRange]) -> list[Wanted]:
        """This rank's blobs of a token group, each with its place in the piece."""
        strips = self._groups.strips_of(group)
        # numpy: torch would start threads of its own in each reader
        bytes_of = [piece.tensors[strip].view(torch.uint8).numpy() for strip in strips]
        first = piece.first(strips[0])

        def parts(row: int, run: TokenRange) -> tuple[PlacedPart, ...]:
            found, at, slots = list[PlacedPart](), 0, slice(run.start - first, run.stop - first)
            for strip in bytes_of:
                found.append(PlacedPart(strip[row, :, :, slots], at, run.stored))
                at += strip.shape[2] * run.stored * strip.shape[4]
            return tuple(found)

        return [
            (run.places[index], parts(row, run)) for run in runs for row, index in enumerate(self._groups.held(group))
        ]

    # -- into a pack

    def write(self, record: HostRecord, base: int, num_kv: int, *, store: str, pack: str, num_tokens: int) -> Answer:
        """Tokens [base, num_kv) of the record, and the states after them, into `pack` of the store: on disk and synced
        when this returns."""
        started = time.perf_counter()
        record.wait(base, num_kv)
        made = [part for a, b in windows(base, num_kv) for part in self._segment(record, a, b, num_kv)]
        result = write_pack(Mounted(self._mail.mount(store)), pack, [item for _, item in made]) if made else None
        found = result.blobs if result is not None else ()
        blobs = tuple(
            part(blob=x.blob, pack=x.pack, offset=x.offset, nbytes=x.nbytes)
            for (part, _), x in zip(made, found, strict=True)
        )
        stages = {"write": time.perf_counter() - started, **(result.stages_s if result is not None else {})}
        return Answer(
            num_tokens=num_tokens, num_kv=num_kv, epoch=record.epoch, blobs=blobs, stages_s=stages,
            packs={result.name: result.nbytes} if result is not None else {},
        )  # fmt: skip

    def _segment(
        self, record: HostRecord, start: int, stop: int, end: int
    ) -> list[tuple[Callable[..., Blob], PackItem]]:
        """What this rank writes of tokens [start, stop) and of the states after tokens of (start, stop], in a snapshot
        that ends after `end` tokens: each blob as it is to be told, and its bytes."""
        out: list[tuple[Callable[..., Blob], PackItem]] = []
        told = partial(Blob, start=start, length=stop - start)
        for group in self._token_groups:
            # Of a window only what continues from the end needs, or from one token earlier: the last one runs again.
            there = record.first(self._groups.strips_of(group)[0], stop)
            first = max(start, there, 0 if self._interior else group.covers(end - 1).start)
            if first < stop:
                of_group = partial(told, group=group.name, first=first)
                out += [
                    (partial(of_group, index=index), self._item(record, group, row, first, stop))
                    for row, index in self._rows(group)
                ]
        for token in sorted(token for token in record.points if start < token <= stop):
            at = 0
            for states in self._point_groups:
                of_state = partial(told, group=states.name, first=start, point=token)
                out += [
                    (partial(of_state, index=index), self._state(record.points[token][at + row], at + row))
                    for row, index in self._rows(states)
                ]
                at += len(self._groups.held(states))
        return out

    def _rows(self, group: CacheGroup) -> list[tuple[int, int]]:
        """(place among those that this rank holds, number) of each blob that it writes."""
        written = self._groups.written(group)
        return [(row, index) for row, index in enumerate(self._groups.held(group)) if index in written]

    def _item(self, record: HostRecord, group: TokenGroup, row: int, start: int, stop: int) -> PackItem:
        return PackItem(
            name_prefix="",
            dtype=SAFETENSORS[group.dtype],
            shape=group.blob_shape(stop - start),
            nbytes=group.token_nbytes_per_blob * (stop - start),
            read=partial(self._bytes, record, group, row, start, stop),
        )

    def _bytes(self, record: HostRecord, group: TokenGroup, row: int, start: int, stop: int) -> memoryview:
        parts = [
            torch.cat([view[row] for _, _, view in record.spans(strip, start, stop)], dim=2)
            for strip in self._groups.strips_of(group)
        ]
        whole = parts[0] if len(parts) == 1 else torch.cat([part.flatten(1) for part in parts], dim=1)
        return _bytes_of(whole)

    def _state(self, tensor: torch.Tensor, row: int) -> PackItem:
        shape, dtype = self._groups.states[row]
        return PackItem("", SAFETENSORS[dtype], shape, tensor.nbytes, partial(_bytes_of, tensor))


def _whole(state: torch.Tensor) -> PlacedPart:
    return PlacedPart(state.view(-1).view(torch.uint8).numpy().reshape(1, 1, 1, -1), 0, 1)


def _placed(place: BlobLocation, parts: Sequence[PlacedPart], arena: int) -> Placed:
    return place, tuple(part.rows(place.nbytes, arena) for part in parts)


def _by_threads(mount: StoreMount, wanted: Sequence[Wanted]) -> ReadStats:
    def fill(number: int, data: memoryview) -> None:
        for part in wanted[number][1]:
            part.fill(data)

    return stream_blobs(Mounted(mount), [place for place, _ in wanted], fill, threads=READERS)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
