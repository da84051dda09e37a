"""KV between vLLM's paged caches and thaw's canonical blobs.

vLLM hands a worker one tensor a layer, logical [B, H, N, 2D]: B blocks, H KV heads of this rank, N token slots, keys
then values of D numbers each. Where the bytes lie is the backend's business: any stride order on an accelerator
(`strided.TorchPages`), a packing of its own inside each page on a CPU (`packed.CpuPackedPages`). Host tensors
here are canonical, [H, L, 2, T, D]: the slice of one head is a blob's [layer][K|V][token][head_dim], so neither block
size nor packing ever reaches a snapshot. Bits are moved as integers: a NaN keeps its payload.

A latent (MLA) is one head of one plane: [B, 1, N, D] there, [1, L, 1, T, D] here. No backend packs it; the order of its
numbers is that of `hf.latents`.

Layers may lie in tensors of their own or in one buffer; only shapes and strides are used, never a tensor's storage.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from thaw.core.errors import Unsupported

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
"""The cache dtypes that are moved, and the integer that carries their bits."""


@dataclass(frozen=True)
class Span:
    """Slots [lo, hi) of `count` blocks, from the block table's entry `first` on; token `at` of the copy is the first.

    `count` is 1 unless whole blocks are meant (lo 0, hi the block size).
    """

    first: int
    count: int
    lo: int
    hi: int
    at: int

    @property
    def width(self) -> int:
        """Tokens of each block."""
        return self.hi - self.lo

    @property
    def tokens(self) -> slice:
        """Where they are among the tokens of the copy."""
        return slice(self.at, self.at + self.count * self.width)

    @property
    def blocks(self) -> slice:
        return slice(self.first, self.first + self.count)


def spans(start: int, stop: int, block_size: int, max_blocks: int) -> Iterator[Span]:
    """Tokens [start, stop) in order: a partial first block, whole ones by at most `max_blocks`, a partial last one."""
    at = start
    while at < stop:
        block, lo = divmod(at, block_size)
        whole = (stop - at) // block_size if lo == 0 else 0
        count = min(whole, max_blocks) or 1
        hi = block_size if whole else min(block_size, lo + stop - at)
        yield Span(block, count, lo, hi, at - start)
        at += count * (hi - lo)


class KVLayout(abc.ABC):
    """The paged caches of one worker, as canonical KV. One call at a time; block ids are checked, nothing is waited for
    on the engine's behalf: what a step still writes must be ordered before `gather` on the current stream."""

    kind: str
    num_planes: ClassVar[int] = 2
    """Of a token in a head: K and V, or 1 of a latent."""

    @property
    def on_its_own(self) -> bool:
        """Whether copies run beside the steps of others: by hardware of their own, started from any thread."""
        return False

    def __init__(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        self.layer_names = layer_order(kv_caches)
        self._caches = [kv_caches[name] for name in self.layer_names]
        first = self._caches[0]
        self.num_blocks, self.num_kv_heads, self.block_size, width = first.shape
        self.head_dim = width // self.num_planes
        self.num_layers = len(self._caches)
        self.dtype, self.device = first.dtype, first.device
        self.bits = BITS[first.dtype]

    def gather(self, block_ids: Sequence[int], start: int, stop: int, out: torch.Tensor) -> None:
        """Copy tokens [start, stop) into `out`, a host tensor [num_kv_heads, num_layers, num_planes, stop - start,
        head_dim] of the cache dtype, contiguous or a strided view. Token p lives in block block_ids[p // block_size],
        slot p % block_size. On return `out` is whole."""
        self._check(block_ids, start, stop, out)
        if start < stop:
            self._gather(block_ids, start, stop, out)

    def scatter(self, block_ids: Sequence[int], start: int, stop: int, source: torch.Tensor) -> None:
        """The inverse; slots outside [start, stop) keep their bytes. On return `source` may be reused, and work queued
        later on the current stream sees the KV."""
        self._check(block_ids, start, stop, source)
        if start < stop:
            self._scatter(block_ids, start, stop, source)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (source, destination) of all layers. Every source of a layer is read before any destination
        is written; no destination may be named twice."""
        if not pairs:
            return
        sources, targets = ([pair[side] for pair in pairs] for side in (0, 1))
        self._check_ids(sources)
        self._check_ids(targets)
        assert len(set(targets)) == len(targets), "a destination is named twice"
        read, write = self._upload(sources), self._upload(targets)
        for cache in self._caches:
            pages = cache.view(self.bits)
            pages.index_copy_(0, write, pages.index_select(0, read))

    def describe(self) -> dict[str, str]:
        """What a person is told about the layout, as plain strings."""
        return {
            "kind": self.kind,
            "layers": str(self.num_layers),
            "block size": str(self.block_size),
            "shape": str(list(self._caches[0].shape)),
            "strides": " or ".join(sorted({str(list(cache.stride())) for cache in self._caches})),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "isa": "none",
        }

    @abc.abstractmethod
    def _gather(self, block_ids: Sequence[int], start: int, stop: int, out: torch.Tensor) -> None: ...

    @abc.abstractmethod
    def _scatter(self, block_ids: Sequence[int], start: int, stop: int, source: torch.Tensor) -> None: ...

    def _upload(self, ids: Sequence[int]) -> torch.Tensor:
        """Block ids on the device. Pinned, for an upload from pageable memory would wait for the whole stream."""
        host = torch.tensor(ids, dtype=torch.int64)
        return host if self.device.type == "cpu" else host.pin_memory().to(self.device, non_blocking=True)

    def _check(self, block_ids: Sequence[int], start: int, stop: int, host: torch.Tensor) -> None:
        shape = (self.num_kv_heads, self.num_layers, self.num_planes, stop - start, self.head_dim)
        assert 0 <= start <= stop <= len(block_ids) * self.block_size, (start, stop, len(block_ids), self.block_size)
        assert tuple(host.shape) == shape, (tuple(host.shape), shape)
        assert host.dtype == self.dtype and host.device.type == "cpu", (host.dtype, self.dtype, host.device)
        self._check_ids(block_ids)

    def _check_ids(self, block_ids: Sequence[int]) -> None:
        """The writers below do not look: an id out of range would hit memory that is not the cache."""
        if block_ids and not 0 <= min(block_ids) <= max(block_ids) < self.num_blocks:
            raise IndexError(f"block ids {min(block_ids)}..{max(block_ids)} in a cache of {self.num_blocks} blocks")


def layer_order(names: Mapping[str, object]) -> tuple[str, ...]:
    """Layer names by the numbers in them ("model.layers.10.self_attn.attn"), not by the order of the mapping."""
    numbers = {name: tuple(int(part) for part in name.split(".") if part.isdecimal()) for name in names}
    unnumbered = sorted(name for name, key in numbers.items() if not key)
    if unnumbered or len(set(numbers.values())) != len(numbers):
        what = f"layer {unnumbered[0]!r} has no number" if unnumbered else "two layers have the same number"
        raise Unsupported(f"the order of the KV caches is unknown: {what} among {len(numbers)} layers")
    return tuple(sorted(numbers, key=numbers.__getitem__))
