"""Packs on the worker's side: a hydrate plan into the arena, a record's pieces into a pack, on this rank's heads.

The bytes go straight between files and the arena; every blob is verified as it is read.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from thaw.core.cache import the_full_one
from thaw.core.errors import CorruptBlob
from thaw.core.prefix import windows
from thaw.data.locations import BlobLocation
from thaw.data.pack import PackItem, stream_blobs, write_pack
from thaw.engines.base import HydratePlan, Slice
from thaw.engines.served.arena import Arena, Piece, Record
from thaw.engines.served.budget import Caller
from thaw.engines.served.mail import Mail
from thaw.engines.served.protocol import Answer, Blob, WorkerFacts

READERS = min(16, max(2, len(os.sched_getaffinity(0))))
"""Threads that read a plan's blobs, each with one blob of scratch."""
SAFETENSORS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


class Packing:
    def __init__(self, facts: WorkerFacts, mail: Mail, arena: Arena, dtype: torch.dtype) -> None:
        self._facts, self._mail, self._arena, self._dtype = facts, mail, arena, dtype

    def read(self, plan: HydratePlan, caller: Caller) -> tuple[list[Piece], int, float]:
        """All slices in one piece, every blob verified in scratch memory before it is laid out there. It counts for
        `caller`."""
        _check_cover(plan)
        if not plan.num_kv:
            return [], 0, 0.0
        tensor = self._arena.allocate(plan.num_kv, caller)
        group = the_full_one(plan.identity.groups).name
        wanted = [(piece, head, blob) for piece in plan.slices for head, blob in enumerate(self._own(piece, group))]
        for piece, _, location in wanted:
            self._check_nbytes(location, piece)

        place = tensor.view(torch.uint8).numpy()  # torch would start threads of its own in each of these

        def put(i: int, data: memoryview) -> None:
            piece, head, _ = wanted[i]
            blob = np.frombuffer(data, dtype=np.uint8).reshape(*self._blob_shape(piece.stored)[:3], -1)
            place[head, :, :, piece.start : piece.start + piece.length] = blob[:, :, : piece.length]

        packs = self._mail.store(plan.mount.uuid)
        stats = stream_blobs(packs, [location for _, _, location in wanted], put, threads=READERS)
        return [Piece(0, plan.num_kv, tensor)], stats.nbytes, stats.seconds

    def _own(self, piece: Slice, group: str) -> Sequence[BlobLocation]:
        blobs = piece.blobs.get(group, ())
        if piece.first or set(piece.blobs) != {group}:
            raise CorruptBlob(
                f"the segment at {piece.start} has blobs of {sorted(piece.blobs)}, from its start on but for "
                f"{piece.first}; expected {group!r}, from its start on"
            )
        if len(blobs) != self._facts.total_heads:
            raise CorruptBlob(
                f"the segment at {piece.start} has {len(blobs)} blobs; expected {self._facts.total_heads}"
            )
        return blobs[self._facts.first_head : self._facts.first_head + self._facts.num_heads]

    def _blob_shape(self, num_tokens: int) -> tuple[int, int, int, int]:
        return (self._facts.num_layers, 2, num_tokens, self._facts.head_dim)

    def _check_nbytes(self, location: BlobLocation, piece: Slice) -> None:
        if location.nbytes != math.prod(self._blob_shape(piece.stored)) * self._dtype.itemsize:
            raise CorruptBlob(f"blob {location.blob} has {location.nbytes} bytes, not those of {piece.stored} tokens")

    def write(
        self, pieces: Sequence[Piece], base: int, num_kv: int, *, store: str, pack: str, num_tokens: int, epoch: int
    ) -> Answer:
        """Tokens [base, num_kv) into `pack` of the store, on disk and synced when this returns."""
        started = time.perf_counter()
        record = Record(tuple(pieces), epoch)
        record.wait(base, num_kv)
        spans = windows(base, num_kv)
        heads = range(self._facts.num_heads) if self._writes() else range(0)
        items = [self._item(record, head, a, b) for a, b in spans for head in heads]
        result = write_pack(self._mail.store(store), pack, items) if items else None
        found = result.blobs if result is not None else ()
        blobs = tuple(
            Blob(start=a, length=b - a, head=self._facts.first_head + head, blob=x.blob, pack=x.pack, offset=x.offset,
                 nbytes=x.nbytes)
            for (a, b, head), x in zip([(a, b, h) for a, b in spans for h in heads], found, strict=True)
        )  # fmt: skip
        stages = {"write": time.perf_counter() - started, **(result.stages_s if result is not None else {})}
        return Answer(
            num_tokens=num_tokens, num_kv=num_kv, epoch=epoch, blobs=blobs, stages_s=stages,
            packs={result.name: result.nbytes} if result is not None else {},
        )  # fmt: skip

    def _writes(self) -> bool:
        """Replicated heads (more ranks than heads) are written once, by the first rank that has them."""
        copies = max(1, self._facts.world_size // self._facts.total_heads)
        return self._facts.rank % copies == 0

    def _item(self, record: Record, head: int, start: int, stop: int) -> PackItem:
        shape = self._blob_shape(stop - start)
        nbytes = shape[0] * shape[1] * shape[2] * shape[3] * self._dtype.itemsize
        return PackItem(
            name_prefix="",
            dtype=SAFETENSORS[self._dtype],
            shape=shape,
            nbytes=nbytes,
            read=partial(self._bytes, record, head, start, stop),
        )

    def _bytes(self, record: Record, head: int, start: int, stop: int) -> memoryview:
        out = torch.cat([view[head] for _, _, view in record.spans(start, stop)], dim=2).contiguous()
        return memoryview(out.view(torch.uint8).reshape(-1).numpy())  # type: ignore[arg-type]


def _check_cover(plan: HydratePlan) -> None:
    at = 0
    for piece in plan.slices:
        inside = piece.start // 256 == (piece.start + piece.stored - 1) // 256
        if piece.start != at or not 1 <= piece.length <= piece.stored <= 256 or not inside:
            raise CorruptBlob(f"the state's segments do not join: one starts at {piece.start}, expected {at}")
        at += piece.length
    if at != plan.num_kv or plan.num_kv > len(plan.tokens):
        raise CorruptBlob(f"the state's segments cover {at} tokens; it says num_kv {plan.num_kv} of {len(plan.tokens)}")
