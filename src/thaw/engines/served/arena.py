"""The arena: the KV of every record in host memory, a rank's own heads, canonical.

A record is a list of pieces, append-only; a fork shares its parent's pieces (a cut one by reference too), so it costs
no bytes. A piece is [head][layer][K|V][token][head_dim]. Memory beyond the budget is a file's: mapped, unlinked, paged
by the operating system. Beside an accelerator all of the budget is one pinned slab, taken at boot (`slab`).

A piece may still be on its way out of the accelerator: whoever reads it waits for `ready` first.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from thaw.core.errors import StorageFailed
from thaw.engines.served.slab import Slab

MAX_PIECES = 64
"""A record of more pieces is joined into one: loads should not walk through crumbs."""


@dataclass(frozen=True)
class Piece:
    """Tokens [start, start + length) are the first `length` of `tensor`'s fourth dimension."""

    start: int
    length: int
    tensor: torch.Tensor
    ready: Callable[[], None] | None = None
    """Waits until the tensor is whole; raises why it never will be. None: it is."""

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass
class Record:
    """`epoch`: of the weights that computed it. `broken`: why it can no longer be used."""

    pieces: tuple[Piece, ...]
    epoch: int
    broken: str = ""

    @property
    def num_kv(self) -> int:
        return self.pieces[-1].stop if self.pieces else 0

    def cut(self, num_kv: int) -> tuple[Piece, ...]:
        """The pieces of the first `num_kv` tokens."""
        return tuple(
            piece if piece.stop <= num_kv else Piece(piece.start, num_kv - piece.start, piece.tensor, piece.ready)
            for piece in self.pieces
            if piece.start < num_kv
        )

    def wait(self, start: int, stop: int) -> None:
        """Until every piece of [start, stop) is whole."""
        for piece in self.pieces:
            if piece.ready is not None and piece.start < stop and start < piece.stop:
                piece.ready()

    def spans(self, start: int, stop: int) -> list[tuple[int, int, torch.Tensor]]:
        """(start, stop, view) of every run of tokens of [start, stop), in order."""
        out = []
        for piece in self.pieces:
            a, b = max(start, piece.start), min(stop, piece.stop)
            if a < b:
                out.append((a, b, piece.tensor[:, :, :, a - piece.start : b - piece.start]))
        return out


class Arena:
    """`pinned`: memory that the accelerator reads and writes by itself. Pieces are then never joined: a load walks over
    crumbs without cost there."""

    def __init__(
        self, nbytes: int, spill: Path | None, heads: int, layers: int, head_dim: int, dtype: torch.dtype,
        *, pinned: bool = False,
    ):  # fmt: skip
        self._budget, self._spill = nbytes, spill
        self._slab = Slab(nbytes) if pinned else None
        self._shape, self._dtype = (heads, layers, 2, head_dim), dtype
        self._lock = threading.RLock()  # Python's collector may end a tensor while it is held
        self._used = 0
        self.spilled = 0

    @property
    def used(self) -> int:
        return self._used

    def allocate(self, num_tokens: int) -> torch.Tensor:
        """[head][layer][K|V][num_tokens][head_dim], not set. Raises `StorageFailed` when there is no room."""
        heads, layers, two, dim = self._shape
        shape = (heads, layers, two, num_tokens, dim)
        nbytes = heads * layers * two * num_tokens * dim * self._dtype.itemsize
        with self._lock:
            fits = self._used + nbytes <= self._budget
            self._used += nbytes
        if self._slab is not None:
            return self._from(self._slab, shape, nbytes)
        try:
            tensor = torch.empty(shape, dtype=self._dtype) if fits else self._mapped(shape, nbytes)
        except BaseException:
            self._give_back(nbytes, spilled=0)
            raise
        weakref.finalize(tensor, self._give_back, nbytes, 0 if fits else nbytes)
        return tensor

    def _from(self, slab: Slab, shape: Sequence[int], nbytes: int) -> torch.Tensor:
        found = slab.take(nbytes)
        try:
            tensor = self._mapped(shape, nbytes) if found is None else found[1][:nbytes].view(self._dtype).view(*shape)
        except BaseException:
            self._give_back(nbytes, spilled=0)
            raise
        weakref.finalize(tensor, self._give_back, nbytes, nbytes if found is None else 0)
        if found is not None:
            weakref.finalize(tensor, slab.give_back, found[0], nbytes)
        return tensor

    def _give_back(self, nbytes: int, spilled: int) -> None:
        with self._lock:
            self._used -= nbytes
            self.spilled -= spilled

    def _mapped(self, shape: Sequence[int], nbytes: int) -> torch.Tensor:
        try:
            with tempfile.TemporaryFile(dir=self._spill) as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)
                memory = mmap.mmap(file.fileno(), nbytes)
        except OSError as error:
            raise StorageFailed(
                f"the arena is full ({self._used >> 20} MiB of {self._budget >> 20}) and {nbytes >> 20} MiB more "
                f"do not fit on the disk: {error}. Close sessions, or start the engine with a larger arena."
            ) from None
        with self._lock:
            self.spilled += nbytes
        return torch.frombuffer(memory, dtype=self._dtype).view(*shape)

    def joined(self, pieces: Sequence[Piece]) -> tuple[Piece, ...]:
        """The same tokens in one piece, when there are too many."""
        if len(pieces) <= MAX_PIECES or self._slab is not None:
            return tuple(pieces)
        stop = pieces[-1].stop
        tensor = self.allocate(stop)
        for piece in pieces:
            tensor[:, :, :, piece.start : piece.stop] = piece.tensor[:, :, :, : piece.length]
        return (Piece(0, stop, tensor),)
