"""Plain strided pages: caches on an accelerator, NHD or HND or any other stride order.

Tokens go through two staging buffers: while one is copied over the bus on a stream of its own, pages are read into (or
written from) the other on the caller's stream. Pinned host memory that is dense enough is copied to and from directly,
the rest by way of pinned staging. Each direction has buffers and a stream of its own, so a load and a save may run at
once, each on a thread of its own. The same code runs on host tensors, where a stream is None and all happens at once.

    stage   [H, layers of the part, planes, tokens of the part, D], dense
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from thaw.engines.vllm.worker.layout.base import KVLayout, spans

STAGING = 128 << 20
"""Bytes of device memory for both staging buffers of loads, and of pinned host memory for their twins."""

GATHER_STAGING = 32 << 20
"""The same for saves. Smaller: what is on its way to the host holds up the engine's own small copies, and these are the
tokens of a step. 16 MiB take 0.3 ms."""

SHORT_RUN = 256 << 10
"""Bytes below which a transfer costs more by being one than by its bytes: dense runs shorter than this are staged."""


@dataclass(frozen=True)
class Part:
    """Layers [first, last) of tokens [start, stop): what fits a staging buffer."""

    first: int
    last: int
    start: int
    stop: int


class TorchPages(KVLayout):
    """Caches in which number d of K and V of token slot n is at [block, head, n, d] and [block, head, n, D + d]; of a
    latent the first alone.

    Staging is taken here, not under a request.
    """

    kind = "torch-pages"

    @property
    def on_its_own(self) -> bool:
        return self.device.type == "cuda"

    def describe(self) -> dict[str, str]:
        card = {"accelerator": torch.cuda.get_device_name(self.device)} if self.on_its_own else {}
        return super().describe() | card

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], *, staging: int = 0) -> None:
        super().__init__(kv_caches)
        planes = (self.num_planes, self.head_dim)
        self._pages = [torch.unflatten(cache.view(self.bits), 3, planes) for cache in self._caches]
        self._token_numel = self.num_kv_heads * self.num_planes * self.head_dim
        least = self._token_numel * self.block_size
        self._in = _Ring(staging or STAGING, least, self.bits, self.device)
        self._out = _Ring(staging or GATHER_STAGING, least, self.bits, self.device)

    def _gather(self, block_ids: Sequence[int], start: int, stop: int, out: torch.Tensor) -> None:
        ids, out, pinned = self._upload(block_ids), out.view(self.bits), out.is_pinned()

        def read(slot: _Slot, part: Part) -> None:
            self._read(slot.stage(self._shape(part)), ids, part)

        def download(slot: _Slot, part: Part) -> None:
            slot.download(_cut(out, part, start), self._shape(part), pinned)

        with self._out.lock:
            self._out.pump(self._parts(self._out, start, stop), (self._current(), read), (self._out.copies, download))

    def _scatter(self, block_ids: Sequence[int], start: int, stop: int, source: torch.Tensor) -> None:
        ids, source, pinned = self._upload(block_ids), source.view(self.bits), source.is_pinned()

        def upload(slot: _Slot, part: Part) -> None:
            slot.upload(_cut(source, part, start), self._shape(part), pinned)

        def write(slot: _Slot, part: Part) -> None:
            self._write(slot.stage(self._shape(part)), ids, part)

        with self._in.lock:
            self._in.pump(self._parts(self._in, start, stop), (self._in.copies, upload), (self._current(), write))

    def _read(self, stage: torch.Tensor, ids: torch.Tensor, part: Part) -> None:
        """Pages into the stage [H, layers of the part, planes, tokens of the part, D]."""
        for slots, blocks, numbers in self._pieces(stage, ids, part):
            numbers.copy_(slots.index_select(0, blocks).permute(1, 3, 0, 2, 4))

    def _write(self, stage: torch.Tensor, ids: torch.Tensor, part: Part) -> None:
        for slots, blocks, numbers in self._pieces(stage, ids, part):
            slots.index_copy_(0, blocks, numbers.permute(2, 0, 3, 1, 4))

    def _pieces(
        self, stage: torch.Tensor, ids: torch.Tensor, part: Part
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Slots of all pages [B, H, S, P, D], ids of the blocks meant [F], their place in the stage [H, P, F, S, D]."""
        for span in spans(part.start, part.stop, self.block_size, self.num_blocks):
            blocks = ids[span.blocks]
            for layer in range(part.first, part.last):
                slots = self._pages[layer][:, :, span.lo : span.hi]
                numbers = torch.unflatten(stage[:, layer - part.first, :, span.tokens], 2, (span.count, span.width))
                yield slots, blocks, numbers

    def _parts(self, ring: _Ring, start: int, stop: int) -> Iterator[Part]:
        window = ring.room // self._token_numel // self.block_size * self.block_size
        while start < stop:
            end = min(stop, start - start % self.block_size + window)
            layers = max(1, ring.room // ((end - start) * self._token_numel))
            for first in range(0, self.num_layers, layers):
                yield Part(first, min(self.num_layers, first + layers), start, end)
            start = end

    def _shape(self, part: Part) -> tuple[int, ...]:
        return self.num_kv_heads, part.last - part.first, self.num_planes, part.stop - part.start, self.head_dim

    def _current(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None


class LatentPages(TorchPages):
    """Latents: one head, and one plane. `num_halved`: see `hf.latents`; vLLM has pairs."""

    kind = "latent-pages"
    num_planes = 1

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], *, num_halved: int = 0, staging: int = 0) -> None:
        super().__init__(kv_caches, staging=staging)
        self._num_halved = num_halved

    def gather_now(self, block_ids: Sequence[int], start: int, stop: int, out: torch.Tensor) -> bool:
        """False: there is no launch that does it (`strided_triton`)."""
        return False

    def scatter_now(self, block_ids: Sequence[int], start: int, stop: int, source: torch.Tensor) -> bool:
        return False

    def _read(self, stage: torch.Tensor, ids: torch.Tensor, part: Part) -> None:
        super()._read(stage, ids, part)
        if self._num_halved:
            roped = stage[..., -self._num_halved :]
            roped.copy_(torch.cat([roped[..., 0::2], roped[..., 1::2]], dim=-1))

    def _write(self, stage: torch.Tensor, ids: torch.Tensor, part: Part) -> None:
        if self._num_halved:
            roped = stage[..., -self._num_halved :]
            roped.copy_(torch.stack(roped.chunk(2, dim=-1), dim=-1).flatten(-2))
        super()._write(stage, ids, part)


class _Ring:
    """Two staging buffers of one direction and the stream that crosses the bus. `room`: elements of one buffer."""

    def __init__(self, nbytes: int, least: int, bits: torch.dtype, device: torch.device) -> None:
        self.room = max(nbytes // 2 // bits.itemsize, least)
        self.lock = threading.Lock()
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._slots = tuple(_Slot(self.room, bits, device) for _ in range(2))

    def pump(self, parts: Iterator[Part], first: _Step, then: _Step) -> None:
        """Every part through a buffer: filled on one stream, emptied on the other, the two buffers by turns, never more
        than two under way. On return both streams have done it."""
        for number, part in enumerate(parts):
            slot = self._slots[number % len(self._slots)]
            slot.wait()
            for stream, work in (first, then):
                with slot.turn(stream):
                    work(slot, part)
        for slot in self._slots:
            slot.wait()


class _Slot:
    """A staging buffer, its pinned twin on the host, and the event that ends the last turn on it."""

    def __init__(self, numel: int, bits: torch.dtype, device: torch.device) -> None:
        self._buffer = torch.empty(numel, dtype=bits, device=device)
        self._twin, self._event = None, None
        if device.type == "cuda":
            self._twin = torch.empty(numel, dtype=bits, pin_memory=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def stage(self, shape: tuple[int, ...]) -> torch.Tensor:
        return self._buffer[: torch.Size(shape).numel()].view(shape)

    def wait(self) -> None:
        """Until the last turn on it is over."""
        if self._event is not None:
            self._event.synchronize()

    @contextlib.contextmanager
    def turn(self, stream: torch.cuda.Stream | None) -> Iterator[None]:
        """Work queued inside runs on `stream`, after the turn before."""
        if stream is None or self._event is None:
            yield
            return
        with torch.cuda.stream(stream):
            stream.wait_event(self._event)
            yield
            self._event.record(stream)

    def download(self, target: torch.Tensor, shape: tuple[int, ...], pinned: bool) -> None:
        """The stage into host memory: in the order of the stream where it goes there directly, else at once."""
        if self._twin is None or (pinned and _is_dense(target)):
            _copy_runs(target, self.stage(shape))
            return
        twin = self._twin[: target.numel()].view(shape)
        twin.copy_(self.stage(shape), non_blocking=True)
        torch.cuda.current_stream(self._buffer.device).synchronize()
        target.copy_(twin)

    def upload(self, source: torch.Tensor, shape: tuple[int, ...], pinned: bool) -> None:
        """Host memory into the stage, in the order of the stream."""
        if self._twin is None or self._event is None or (pinned and _is_dense(source)):
            _copy_runs(self.stage(shape), source)
            return
        self._event.synchronize()  # the twin may still be on its way to the device
        twin = self._twin[: source.numel()].view(shape)
        twin.copy_(source)
        self.stage(shape).copy_(twin, non_blocking=True)


_Step = tuple[torch.cuda.Stream | None, Callable[[_Slot, Part], None]]
"""A stream and what is done on it."""


def _cut(host: torch.Tensor, part: Part, start: int) -> torch.Tensor:
    """The part of a canonical host tensor whose first token is `start`."""
    return host[:, part.first : part.last, :, part.start - start : part.stop - start]


def _is_dense(host: torch.Tensor) -> bool:
    """Whether `host` consists of dense runs that are worth a transfer each."""
    while host.dim() > 2 and not host.is_contiguous():
        host = host[0]
    return host.is_contiguous() and host.nbytes >= SHORT_RUN


def _copy_runs(target: torch.Tensor, source: torch.Tensor) -> None:
    """target.copy_(source) by runs that are dense on both sides, each one transfer."""
    if target.dim() <= 2 or (target.is_contiguous() and source.is_contiguous()):
        target.copy_(source, non_blocking=True)
        return
    for one, other in zip(target, source, strict=True):
        _copy_runs(one, other)
