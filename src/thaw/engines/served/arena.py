"""The arena: the KV of every record in host memory, a rank's own heads, canonical.

A record is a list of pieces, append-only; a fork shares its parent's pieces (a cut one by reference too), so it costs
no bytes. A piece is [head][layer][K|V][token][head_dim]. Memory beyond the budget is a file's: mapped, unlinked, paged
by the operating system, and has a budget of its own. Beside an accelerator all of the memory is one pinned slab, taken
at boot (`slab`). Each piece counts for the caller whose record it was made for, as long as anybody's record has it.

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
from thaw.engines.served.budget import EVERYBODY, GUEST, Budget, Caller, Room, Shares, mib
from thaw.engines.served.slab import Slab

MAX_PIECES = 64
"""A record of more pieces is joined into one: loads should not walk through crumbs."""
TIGHT_TOKENS = 1 << 17
"""Whoever has room for so many more is not told how much it is."""


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
    """`epoch`: of the weights that computed it. `broken`: why it can no longer be used. `caller`: whose it is."""

    pieces: tuple[Piece, ...]
    epoch: int
    broken: str = ""
    caller: Caller = GUEST

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
    """`nbytes` of memory and `spill_nbytes` of files in the folder `spill`, of both of which each caller has its share.
    `pinned`: memory that the accelerator reads and writes by itself. Pieces are then never joined: a load walks over
    crumbs without cost there."""

    def __init__(
        self, nbytes: int, spill: Path | None, heads: int, layers: int, head_dim: int, dtype: torch.dtype,
        *, spill_nbytes: int, shares: Shares, pinned: bool = False,
    ):  # fmt: skip
        self._memory, self._files = Budget("arena", nbytes, shares, mib), Budget("spill", spill_nbytes, shares, mib)
        self._spill = spill
        self._slab = Slab(nbytes) if pinned else None
        self._shape, self._dtype = (heads, layers, 2, head_dim), dtype
        self._lock = threading.RLock()  # Python's collector may end a tensor while it is held

    @property
    def used(self) -> int:
        """Bytes in memory and in files."""
        return self._memory.total + self._files.total

    @property
    def spilled(self) -> int:
        return self._files.total

    def room(self, caller: Caller) -> Room:
        """What may still be kept for the caller in one piece, and the limits that say so."""
        with self._lock:
            left = max(self._memory.left(caller), self._files.left(caller))
            beyond = left + 1
            why = f"{self._memory.refusal(caller, beyond)}; {self._files.refusal(caller, beyond)}"
        return Room(num_tokens=left // self._nbytes(1), why=why)

    def tight(self) -> dict[Caller, Room]:
        """The callers with room for less than `TIGHT_TOKENS`; `EVERYBODY` among them when that is all that one who has
        nothing yet could have."""
        with self._lock:
            asked = {*self._memory.callers(), *self._files.callers(), GUEST, EVERYBODY}
        found = {caller: self.room(caller) for caller in asked}
        return {caller: room for caller, room in found.items() if room.num_tokens < TIGHT_TOKENS}

    def allocate(self, num_tokens: int, caller: Caller) -> torch.Tensor:
        """[head][layer][K|V][num_tokens][head_dim], not set. Raises `StorageFailed` when there is no room, saying which
        limit was reached."""
        heads, layers, two, dim = self._shape
        shape, nbytes = (heads, layers, two, num_tokens, dim), self._nbytes(num_tokens)
        tensor = self._from_memory(shape, nbytes, caller)
        return tensor if tensor is not None else self._from_files(shape, nbytes, caller)

    def _nbytes(self, num_tokens: int) -> int:
        heads, layers, two, dim = self._shape
        return heads * layers * two * num_tokens * dim * self._dtype.itemsize

    def _from_memory(self, shape: Sequence[int], nbytes: int, caller: Caller) -> torch.Tensor | None:
        """None: what is left of it is too little, or too much in pieces."""
        with self._lock:
            if self._memory.refusal(caller, nbytes):
                return None
            self._memory.take(caller, nbytes)
        tensor = None
        try:
            tensor = self._in_memory(shape, nbytes)
        finally:
            if tensor is None:
                self._give_back(self._memory, caller, nbytes)
        if tensor is not None:
            weakref.finalize(tensor, self._give_back, self._memory, caller, nbytes)
        return tensor

    def _in_memory(self, shape: Sequence[int], nbytes: int) -> torch.Tensor | None:
        if self._slab is None:
            return torch.empty(shape, dtype=self._dtype)
        found = self._slab.take(nbytes)
        if found is None:
            return None
        tensor = found[1][:nbytes].view(self._dtype).view(*shape)
        weakref.finalize(tensor, self._slab.give_back, found[0], nbytes)
        return tensor

    def _from_files(self, shape: Sequence[int], nbytes: int, caller: Caller) -> torch.Tensor:
        with self._lock:
            if why := self._files.refusal(caller, nbytes):
                whole = f"{self._memory.refusal(caller, nbytes)}; {why}".removeprefix("; ")
                raise StorageFailed(
                    f"{mib(nbytes)} more of KV have no room: {whole}. Close sessions, or start the engine with more"
                )
            self._files.take(caller, nbytes)
        try:
            tensor = self._mapped(shape, nbytes)
        except BaseException:
            self._give_back(self._files, caller, nbytes)
            raise
        weakref.finalize(tensor, self._give_back, self._files, caller, nbytes)
        return tensor

    def _give_back(self, budget: Budget, caller: Caller, nbytes: int) -> None:
        with self._lock:
            budget.give_back(caller, nbytes)

    def _mapped(self, shape: Sequence[int], nbytes: int) -> torch.Tensor:
        try:
            with tempfile.TemporaryFile(dir=self._spill) as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)
                memory = mmap.mmap(file.fileno(), nbytes)
        except OSError as error:
            raise StorageFailed(
                f"the arena is full ({mib(self._memory.total)} in memory) and {mib(nbytes)} more do not fit on the "
                f"disk: {error}. Close sessions, or start the engine with a larger arena."
            ) from None
        return torch.frombuffer(memory, dtype=self._dtype).view(*shape)

    def joined(self, pieces: Sequence[Piece], caller: Caller) -> tuple[Piece, ...]:
        """The same tokens in one piece, when there are too many."""
        if len(pieces) <= MAX_PIECES or self._slab is not None:
            return tuple(pieces)
        stop = pieces[-1].stop
        tensor = self.allocate(stop, caller)
        for piece in pieces:
            tensor[:, :, :, piece.start : piece.stop] = piece.tensor[:, :, :, : piece.length]
        return (Piece(0, stop, tensor),)
