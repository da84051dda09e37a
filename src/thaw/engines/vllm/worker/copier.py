"""Records to and from the engine's blocks, inside a step or beside the steps of others.

On a CPU a copy is work of the same cores: it is done at once, a load in the background by pieces that let others in. On
an accelerator the bus works by itself. What a request added is on its way to the host while the next steps run (its
blocks are held until it has arrived); the last, partial block, which every fork loads, is copied in the order of the
step's own stream, both ways, and nobody waits for it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from thaw.core.errors import StorageFailed
from thaw.engines.served.budget import Caller
from thaw.engines.served.worker.host_cache import HostCache, HostRecord, Piece, Tensors
from thaw.engines.vllm.jobs import Tables
from thaw.engines.vllm.worker.layout.base import KVLayout

SCATTER_TOKENS = 1024
"""A load in the background on a CPU lets the steps of others in after so many tokens."""


class Copier:
    """On the engine's own cores. `layouts`: one for each strip of the arena's pieces. `tables`: for each of them the
    block ids of a request, from its first token on; all have one block size."""

    def __init__(self, layouts: Sequence[KVLayout], arena: HostCache) -> None:
        self._layouts, self._arena = tuple(layouts), arena
        self._block_size = self._layouts[0].block_size
        self._lock = threading.Lock()
        self.loads = ThreadPoolExecutor(1, thread_name_prefix="thaw-load")

    def save(self, tables: Tables, start: int, stop: int, caller: Caller) -> list[Piece]:
        """Tokens [start, stop) out of the blocks, as earlier steps have written them, into memory that counts for
        `caller`."""
        tensors = self._arena.allocate(stop - start, caller)
        with self._lock:
            self._gather_all(tables, start, stop, tensors)
        return [Piece(start, stop - start, tensors)]

    def _gather_all(self, tables: Tables, start: int, stop: int, tensors: Tensors) -> None:
        for layout, blocks, tensor in zip(self._layouts, tables, tensors, strict=True):
            layout.gather(blocks, start, stop, tensor)

    def after_saves(self, done: Callable[[], None]) -> None:
        """Call `done` when all that was to be saved is."""
        done()

    def load(self, tables: Tables, record: HostRecord, start: int, stop: int) -> None:
        """Tokens [start, stop) into the blocks, for the step that is about to run."""
        for strip, (layout, blocks) in enumerate(zip(self._layouts, tables, strict=True)):
            for a, b, view in record.spans(strip, start, stop):
                for at in range(a, b, SCATTER_TOKENS):
                    end = min(b, at + SCATTER_TOKENS)
                    with self._lock:
                        layout.scatter(blocks, at, end, view[:, :, :, at - a : end - a])

    def point(self) -> Any:
        """Where the steps stand now, for `load_aside`."""
        return None

    def load_aside(self, tables: Tables, record: HostRecord, start: int, stop: int, since: Any) -> None:
        """Likewise on another thread, after the steps up to `since`; on return it is there."""
        self.load(tables, record, start, stop)

    def write_aside(self, work: Callable[[], None], since: Any) -> None:
        """Do `work`, which writes into the engine's pages, in the order of `load_aside`; on return it is there."""
        work()

    def settle(self) -> None:
        """Wait until nothing is on its way to or from the engine's pages."""
        self.loads.submit(_nothing).result()

    def close(self) -> None:
        self.loads.shutdown(wait=True, cancel_futures=True)


class AcceleratorCopier(Copier):
    """Over the bus. Pieces that a launch on the step's stream still reads or writes are kept until it is over."""

    _layouts: tuple[Any, ...]  # of TritonPages

    def __init__(self, layouts: Sequence[KVLayout], arena: HostCache) -> None:
        super().__init__(layouts, arena)
        self._device = layouts[0].device
        self._saves = ThreadPoolExecutor(1, thread_name_prefix="thaw-save")
        self._in = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._out = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._busy: deque[tuple[torch.cuda.Event, object]] = deque()

    def save(self, tables: Tables, start: int, stop: int, caller: Caller) -> list[Piece]:
        whole = max(start, stop // self._block_size * self._block_size)
        out = []
        if start < whole:
            out.append(self._save_aside(tables, start, whole, caller))
        if whole < stop:
            out.append(self._save_tail(tables, whole, stop, caller))
        return out

    def _save_aside(self, tables: Tables, start: int, stop: int, caller: Caller) -> Piece:
        tensors = self._arena.allocate(stop - start, caller)
        written = self._mark()
        done: Future[None] = self._saves.submit(self._gather, tables, start, stop, tensors, written)
        return Piece(start, stop - start, tensors, partial(_result, done))

    def _gather(self, tables: Tables, start: int, stop: int, tensors: Tensors, written: torch.cuda.Event) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._out):
            self._out.wait_event(written)
            self._gather_all(tables, start, stop, tensors)

    def _save_tail(self, tables: Tables, start: int, stop: int, caller: Caller) -> Piece:
        tensors = self._arena.allocate(stop - start, caller)
        launched = 0
        for layout, blocks, tensor in zip(self._layouts, tables, tensors, strict=True):
            if layout.gather_now(blocks, start, stop, tensor):
                launched += 1
            else:
                layout.gather(blocks, start, stop, tensor)
        if not launched:
            return Piece(start, stop - start, tensors)
        written = self._mark()
        self._keep(written, tensors)
        return Piece(start, stop - start, tensors, written.synchronize)

    def after_saves(self, done: Callable[[], None]) -> None:
        self._saves.submit(done)

    def load(self, tables: Tables, record: HostRecord, start: int, stop: int) -> None:
        for piece in record.pieces:
            for strip, (layout, blocks) in enumerate(zip(self._layouts, tables, strict=True)):
                a, b = max(start, piece.first(strip)), min(stop, piece.stop)
                if a < b:
                    self._load_piece(piece, layout, blocks, a, b, piece.view(strip, a, b))

    def _load_piece(
        self, piece: Piece, layout: Any, blocks: Sequence[int], start: int, stop: int, view: torch.Tensor
    ) -> None:
        if not _in_order(piece):
            piece.ready()  # type: ignore[misc]
        if layout.scatter_now(blocks, start, stop, view):
            self._keep(self._mark(), piece)
        else:
            if piece.ready is not None:
                piece.ready()
            layout.scatter(blocks, start, stop, view)

    def point(self) -> torch.cuda.Event:
        return self._mark()

    def load_aside(self, tables: Tables, record: HostRecord, start: int, stop: int, since: torch.cuda.Event) -> None:
        record.wait(start, stop)
        with torch.cuda.device(self._device), torch.cuda.stream(self._in):
            self._in.wait_event(since)  # the blocks' former owner may still be in that step
            for strip, (layout, blocks) in enumerate(zip(self._layouts, tables, strict=True)):
                for a, b, view in record.spans(strip, start, stop):
                    if b - a > self._block_size or not layout.scatter_now(blocks, a, b, view):
                        layout.scatter(blocks, a, b, view)
            self._in.synchronize()

    def write_aside(self, work: Callable[[], None], since: torch.cuda.Event) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._in):
            self._in.wait_event(since)
            work()
            self._in.synchronize()

    def _mark(self) -> torch.cuda.Event:
        """The point that the step's stream has reached."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _keep(self, until: torch.cuda.Event, what: object) -> None:
        while self._busy and self._busy[0][0].query():  # type: ignore[no-untyped-call]
            self._busy.popleft()
        self._busy.append((until, what))

    def settle(self) -> None:
        super().settle()
        self._saves.submit(_nothing).result()
        torch.cuda.synchronize(self._device)
        self._busy.clear()

    def close(self) -> None:
        super().close()
        self._saves.shutdown(wait=True)


def _nothing() -> None:
    """What stands behind the work of others in a queue."""


def make_copier(layouts: Sequence[KVLayout], arena: HostCache) -> Copier:
    return AcceleratorCopier(layouts, arena) if layouts[0].on_its_own else Copier(layouts, arena)


def _in_order(piece: Piece) -> bool:
    """Whether whoever is later on the step's stream finds the piece whole without waiting."""
    return piece.ready is None or isinstance(getattr(piece.ready, "__self__", None), torch.cuda.Event)


def _result(done: Future[None]) -> None:
    error = done.exception()
    if error is not None:
        raise StorageFailed(f"the session's KV could not be kept: {type(error).__name__}: {error}") from error
