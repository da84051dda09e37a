"""The arena: the KV of every record in host memory, the blobs that a rank holds of each cache group, canonical.

A record is a list of pieces, append-only; a fork shares its parent's pieces (a cut one by reference too), so it costs
no bytes. A piece has a tensor for each strip (`rank_groups`): of a full group [head][layer][K|V][token][head_dim].
Point states are tensors by the number of tokens that they are of. Memory beyond the budget is a file's: mapped,
unlinked, paged by the operating system, and has a budget of its own. Beside an accelerator all of the memory is one
pinned slab (`pinned_buffer`). Each piece counts for the caller whose record it was made for, as long as anybody's
record has it.

A piece may still be on its way out of the accelerator: whoever reads it waits for `ready` first.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TypeAlias

import torch

from thaw.core.errors import StorageFailed
from thaw.engines.served.budget import EVERYBODY, GUEST, Budget, Caller, Room, Shares, mib
from thaw.engines.served.worker.pinned_buffer import PinnedBuffer
from thaw.engines.served.worker.rank_groups import RankGroups

MAX_PIECES = 64
"""A record of more pieces is joined into one: loads should not walk through crumbs."""
TIGHT_TOKENS = 1 << 17
"""Whoever has room for so many more is not told how much it is."""


Tensors: TypeAlias = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Piece:
    """Tokens [start, start + length), a tensor a strip; they are the first of its fourth dimension."""

    start: int
    length: int
    tensors: Tensors
    ready: Callable[[], None] | None = None
    """Waits until the tensors are whole; raises why they never will be. None: they are."""
    late: tuple[int, ...] = ()
    """How many of the first tokens each tensor leaves out, because no window reaches back to them. Empty: none."""

    @property
    def stop(self) -> int:
        return self.start + self.length

    def first(self, strip: int) -> int:
        """The token that the strip's tensor begins with."""
        return self.start + (self.late[strip] if self.late else 0)

    def view(self, strip: int, start: int, stop: int) -> torch.Tensor:
        """Tokens [start, stop) of a strip, which are all there."""
        first = self.first(strip)
        return self.tensors[strip][:, :, :, start - first : stop - first]


@dataclass
class HostRecord:
    """`epoch`: of the weights that computed it. `broken`: why it can no longer be used. `caller`: whose it is.
    `points`: the states that are kept, by the number of tokens that they are of. `recent`: those of a session's last
    steps, as they lie in the engine's own pages."""

    pieces: tuple[Piece, ...]
    epoch: int
    broken: str = ""
    caller: Caller = GUEST
    points: dict[int, Tensors] = field(default_factory=dict)
    recent: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def num_kv(self) -> int:
        return self.pieces[-1].stop if self.pieces else 0

    def cut(self, num_kv: int) -> tuple[Piece, ...]:
        """The pieces of the first `num_kv` tokens."""
        return tuple(
            piece if piece.stop <= num_kv else replace(piece, length=num_kv - piece.start)
            for piece in self.pieces
            if piece.start < num_kv
        )

    def upto(self, num_kv: int, caller: Caller | None = None) -> HostRecord:
        """A record of the first `num_kv` tokens, and the states after them; of this caller unless another is named."""
        points = {token: state for token, state in self.points.items() if token <= num_kv}
        return HostRecord(self.cut(num_kv), self.epoch, caller=self.caller if caller is None else caller, points=points)

    def first(self, strip: int, stop: int) -> int:
        """The first token of those of a strip that are there without a gap up to `stop`."""
        at = stop
        for piece in reversed(self.cut(stop)):
            if piece.stop != at:
                break
            at = min(at, piece.first(strip))
            if at > piece.start:
                break
        return at

    def wait(self, start: int, stop: int) -> None:
        """Until every piece of [start, stop) is whole."""
        for piece in self.pieces:
            if piece.ready is not None and piece.start < stop and start < piece.stop:
                piece.ready()

    def spans(self, strip: int, start: int, stop: int) -> list[tuple[int, int, torch.Tensor]]:
        """(start, stop, view) of every run of a strip's tokens in [start, stop), in order."""
        out = []
        for piece in self.pieces:
            a, b = max(start, piece.first(strip)), min(stop, piece.stop)
            if a < b:
                out.append((a, b, piece.view(strip, a, b)))
        return out


class HostCache:
    """`nbytes` of memory and `spill_nbytes` of files in the folder `spill`, of both of which each caller has its share.
    `pinned`: memory that the accelerator reads and writes by itself. Pieces are then never joined: a load walks over
    crumbs without cost there. `shared`: readers in other processes write into it, and it is one slab as well. Where the
    model has states, a request keeps that of its end beside its tokens, and `early_states` more if its client may end
    it early."""

    def __init__(
        self, nbytes: int, spill: Path | None, groups: RankGroups,
        *, spill_nbytes: int, shares: Shares, pinned: bool = False, shared: bool = False, early_states: int = 0,
    ):  # fmt: skip
        self._memory, self._files = Budget("arena", nbytes, shares, mib), Budget("spill", spill_nbytes, shares, mib)
        self._spill = spill
        self._slab = PinnedBuffer(nbytes, pin=pinned, shared=shared) if pinned or shared else None
        self._groups = groups
        self._early_nbytes = early_states * groups.state_nbytes
        self._lock = threading.RLock()  # Python's collector may end a tensor while it is held

    @property
    def used(self) -> int:
        """Bytes in memory and in files."""
        return self._memory.total + self._files.total

    @property
    def spilled(self) -> int:
        return self._files.total

    @property
    def slab(self) -> PinnedBuffer | None:
        """All of the memory in one; None where each tensor has its own."""
        return self._slab

    def room(self, caller: Caller) -> Room:
        """What may still be kept for the caller in one piece, and the limits that say so."""
        with self._lock:
            left = max(self._memory.left(caller), self._files.left(caller))
            beyond = left + 1
            why = f"{self._memory.refusal(caller, beyond)}; {self._files.refusal(caller, beyond)}"
        state, early = self._groups.state_nbytes, self._early_nbytes
        if not state:
            return Room(num_tokens=left // self._groups.token_nbytes, why=why)
        why += f"; beside its tokens a request keeps states of {mib(state)}, {mib(state + early)} with stop strings"
        return Room(
            num_tokens=self._tokens(left - state),
            why=why,
            num_early=self._tokens(left - state - early),
            state_tokens=-(-state // self._groups.token_nbytes),
        )

    def _tokens(self, nbytes: int) -> int:
        return max(0, nbytes) // self._groups.token_nbytes

    def tight(self) -> dict[Caller, Room]:
        """The callers with room for less than `TIGHT_TOKENS`; `EVERYBODY` among them when that is all that one who has
        nothing yet could have."""
        with self._lock:
            asked = {*self._memory.callers(), *self._files.callers(), GUEST, EVERYBODY}
        found = {caller: self.room(caller) for caller in asked}
        return {caller: room for caller, room in found.items() if room.least < TIGHT_TOKENS}

    def allocate(self, num_tokens: int, caller: Caller, late: Sequence[int] = ()) -> Tensors:
        """A piece's tensors of `num_tokens` tokens, not set; `late` as the piece has it. Raises `StorageFailed` when
        there is no room, saying which limit was reached."""
        lengths = [num_tokens - left_out for left_out in late] or [num_tokens] * len(self._groups.strips)
        wanted = [(strip.shape(n), strip.group.dtype) for strip, n in zip(self._groups.strips, lengths, strict=True)]
        return self._allocate(wanted, caller)

    def allocate_states(self, caller: Caller) -> Tensors:
        """A tensor for each blob of the point states, not set. Raises as `allocate`."""
        return self._allocate(self._groups.states, caller)

    def allocate_raw(self, shape: Sequence[int], caller: Caller) -> torch.Tensor:
        """Bytes for a state as it lies in the engine's pages, not set. Raises as `allocate`."""
        return self._tensor(shape, torch.int8, caller)

    def _allocate(self, wanted: Sequence[tuple[tuple[int, ...], str]], caller: Caller) -> Tensors:
        return tuple(self._tensor(shape, getattr(torch, dtype), caller) for shape, dtype in wanted)

    def _tensor(self, shape: Sequence[int], dtype: torch.dtype, caller: Caller) -> torch.Tensor:
        nbytes = prod(shape) * dtype.itemsize
        tensor = self._from_memory(shape, dtype, nbytes, caller)
        return tensor if tensor is not None else self._from_files(shape, dtype, nbytes, caller)

    def _from_memory(
        self, shape: Sequence[int], dtype: torch.dtype, nbytes: int, caller: Caller
    ) -> torch.Tensor | None:
        """None: what is left of it is too little, or too much in pieces."""
        with self._lock:
            if self._memory.refusal(caller, nbytes):
                return None
            self._memory.take(caller, nbytes)
        tensor = None
        try:
            tensor = self._in_memory(shape, dtype, nbytes)
        finally:
            if tensor is None:
                self._give_back(self._memory, caller, nbytes)
        if tensor is not None:
            weakref.finalize(tensor, self._give_back, self._memory, caller, nbytes)
        return tensor

    def _in_memory(self, shape: Sequence[int], dtype: torch.dtype, nbytes: int) -> torch.Tensor | None:
        if self._slab is None:
            return torch.empty(shape, dtype=dtype)
        found = self._slab.take(nbytes)
        if found is None:
            return None
        tensor = found[1][:nbytes].view(dtype).view(*shape)
        weakref.finalize(tensor, self._slab.give_back, found[0], nbytes)
        return tensor

    def _from_files(self, shape: Sequence[int], dtype: torch.dtype, nbytes: int, caller: Caller) -> torch.Tensor:
        with self._lock:
            if why := self._files.refusal(caller, nbytes):
                whole = f"{self._memory.refusal(caller, nbytes)}; {why}".removeprefix("; ")
                raise StorageFailed(
                    f"{mib(nbytes)} more of KV have no room: {whole}. Close sessions, or start the engine with more"
                )
            self._files.take(caller, nbytes)
        try:
            tensor = self._mapped(shape, dtype, nbytes)
        except BaseException:
            self._give_back(self._files, caller, nbytes)
            raise
        weakref.finalize(tensor, self._give_back, self._files, caller, nbytes)
        return tensor

    def _give_back(self, budget: Budget, caller: Caller, nbytes: int) -> None:
        with self._lock:
            budget.give_back(caller, nbytes)

    def _mapped(self, shape: Sequence[int], dtype: torch.dtype, nbytes: int) -> torch.Tensor:
        try:
            with tempfile.TemporaryFile(dir=self._spill) as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)
                memory = mmap.mmap(file.fileno(), nbytes)
        except OSError as error:
            raise StorageFailed(
                f"the arena is full ({mib(self._memory.total)} in memory) and {mib(nbytes)} more do not fit on the "
                f"disk: {error}. Close sessions, or start the engine with a larger arena."
            ) from None
        return torch.frombuffer(memory, dtype=dtype).view(*shape)

    def joined(self, pieces: Sequence[Piece], caller: Caller) -> tuple[Piece, ...]:
        """The same tokens in one piece, when there are too many."""
        if len(pieces) <= MAX_PIECES or self._slab is not None:
            return tuple(pieces)
        stop, record = pieces[-1].stop, HostRecord(tuple(pieces), 0)
        late = tuple(record.first(strip, stop) for strip in range(len(self._groups.strips)))
        whole = Piece(0, stop, self.allocate(stop, caller, late), late=late)
        for strip, first in enumerate(late):
            for a, b, view in record.spans(strip, first, stop):
                whole.view(strip, a, b).copy_(view)
        return (whole,)
