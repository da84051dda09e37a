"""Pages of vLLM's CPU attention: each (block, head) page is packed in an order that depends on the instruction set.

The order is not assumed but learnt, once a process for each (dtype, head_dim, block_size, isa): numbered values are
written through vLLM's own `cpu_attn_reshape_and_cache` into a scratch cache, and where they turn up is the packing.
It is believed only after random bits (for 16-bit dtypes: all 65536 patterns) written through the op came back equal.
So reading is an index, and writing is the op itself: slots that it is not given keep their bytes.

    page   [2ND] packed, as in the cache       index   [2][N, D] where number d of slot n of K and V lies in its half
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from thaw.core.errors import Unsupported
from thaw.engines.vllm.worker.layout.base import BITS, KVLayout, Span, spans

SCRATCH = 4 << 20
"""Bytes of pages that are unpacked at a time: few enough for a core's cache, many enough for threads to share."""

WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DIGIT_BITS = 7
"""Numbered values are written by digits below 128, which every dtype holds exactly."""


class CpuPackedPages(KVLayout):
    """Caches of the CPU backend; `isa` is found as the backend finds it, unless given.

    Any processor packs for any `isa`; only attention over pages for AMX needs a processor that has it, and only a found
    "amx" is one that the engine is about to run."""

    kind = "cpu-packed"

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], *, isa: str | None = None) -> None:
        super().__init__(kv_caches)
        for name, cache in zip(self.layer_names, self._caches, strict=True):
            if not cache[0, 0].is_contiguous():
                raise Unsupported(f"layer {name!r} has a cache of strides {list(cache.stride())}; its pages lie apart")
        if isa is None:
            isa = _attention_isa(self.dtype, self.block_size, self.head_dim)
            if isa == "amx":
                _ask_for_tiles()
        self.isa = isa
        self._packing = learn_packing(self.dtype, self.head_dim, self.block_size, self.isa)
        self._pages = [cache.view(self.bits).flatten(2) for cache in self._caches]
        page = self._pages[0][0]
        self._max_blocks = max(1, SCRATCH // page.nbytes)
        self._packed = page.new_empty(self._max_blocks, *page.shape)
        self._rows = page.new_empty(self._max_blocks * page.numel() // 2)

    def describe(self) -> dict[str, str]:
        return super().describe() | {"isa": self.isa}

    def _gather(self, block_ids: Sequence[int], start: int, stop: int, out: torch.Tensor) -> None:
        ids, out = self._upload(block_ids), out.view(self.bits)
        for span in spans(start, stop, self.block_size, self._max_blocks):
            blocks, packed = ids[span.blocks], self._packed[: span.count]
            shape = (span.count, self.num_kv_heads, span.width, self.head_dim)
            rows = self._rows[: torch.Size(shape).numel()].view(shape)
            indexes = [half.of(span) for half in self._packing]
            for layer, pages in enumerate(self._pages):
                torch.index_select(pages, 0, blocks, out=packed)
                for side, (half, index) in enumerate(zip(self._packing, indexes, strict=True)):
                    half.unpack(packed.chunk(2, dim=2)[side], index, rows.flatten(2))
                    target = torch.unflatten(out[:, layer, side, span.tokens], 1, (span.count, span.width))
                    target.copy_(rows.transpose(0, 1))

    def _scatter(self, block_ids: Sequence[int], start: int, stop: int, source: torch.Tensor) -> None:
        if source.stride(-1) != 1:
            source = source.contiguous()
        positions = torch.arange(start, stop)
        slots = self._upload(block_ids)[positions // self.block_size] * self.block_size + positions % self.block_size
        for layer, cache in enumerate(self._caches):
            _write(cache, source[:, layer, 0].transpose(0, 1), source[:, layer, 1].transpose(0, 1), slots, self.isa)


def _ask_for_tiles() -> None:
    """A process must ask Linux before its first AMX instruction, else it is killed (SIGILL). Long prompts ask by way of
    oneDNN, vLLM's attention does not; and a hydrated session may well begin with one token.

    Raises `Unsupported` where the system does not grant it."""
    if not torch.cpu._init_amx():
        raise Unsupported(
            "this processor has AMX, but the system does not let this process use it (a sandbox, an old kernel), and "
            "vLLM's attention for bfloat16 would: start vLLM with dtype float32, or elsewhere"
        )


@dataclass(frozen=True)
class Half:
    """How the keys, or the values, of a page are packed: in words of `word` bytes that lie together in both orders."""

    index: torch.Tensor
    """[N, words of D], int64: where a word of a slot lies in the half."""
    word: torch.dtype

    def of(self, span: Span) -> torch.Tensor:
        return self.index[span.lo : span.hi].reshape(1, 1, -1)

    def unpack(self, packed: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
        """Packed halves [F, H, ND] into `rows` [F, H, slots x D], the indexed slots in order; both dense in a row."""
        words = packed.view(self.word)
        torch.gather(words, 2, index.expand(*words.shape[:2], -1), out=rows.view(self.word))


@lru_cache(maxsize=16)
def learn_packing(dtype: torch.dtype, head_dim: int, block_size: int, isa: str) -> tuple[Half, Half]:
    """How pages are packed, (keys, values). Raises Unsupported when the op does not pack by a fixed order."""
    offsets = _reveal(dtype, head_dim, block_size, isa)
    half = block_size * head_dim
    ordered = torch.arange(half)
    named = f"vLLM's CPU attention ({isa}, {dtype}, head size {head_dim}, block size {block_size})"
    if not all(torch.equal(side.flatten().sort().values, ordered + half * i) for i, side in enumerate(offsets)):
        raise Unsupported(f"{named} does not pack a page by a fixed order; its caches cannot be read")
    packing = _widest(offsets[0], dtype), _widest(offsets[1] - half, dtype)
    if not _reads_back(packing, dtype, head_dim, block_size, isa):
        raise Unsupported(f"{named} changes bits, or packs one page unlike another; its caches cannot be read")
    return packing


def _reveal(dtype: torch.dtype, head_dim: int, block_size: int, isa: str) -> torch.Tensor:
    """[2, N, D]: the place in a packed page of each number, found by writing their numbers digit by digit."""
    numbers = torch.arange(2 * block_size * head_dim)
    at = torch.zeros_like(numbers)
    for shift in range(0, int(numbers[-1]).bit_length(), DIGIT_BITS):
        digits = (numbers >> shift & (1 << DIGIT_BITS) - 1).to(dtype).view(2, block_size, 1, head_dim)
        page = torch.zeros(1, 1, block_size, 2 * head_dim, dtype=dtype)
        _write(page, digits[0], digits[1], torch.arange(block_size), isa)
        at |= page.flatten().to(torch.int64) << shift
    return at.argsort().view(2, block_size, head_dim)


def _widest(offsets: torch.Tensor, dtype: torch.dtype) -> Half:
    """The half with the widest words that lie together in a row as in the page. `offsets`: [N, D], in numbers."""
    for nbytes in (8, 4, 2):
        per_word = nbytes // dtype.itemsize
        if per_word == 0 or offsets.shape[1] % per_word:
            continue
        words = torch.unflatten(offsets, 1, (-1, per_word))
        first = words[..., :1]
        if torch.equal(words, first + torch.arange(per_word)) and not (first % per_word).any():
            return Half((first.squeeze(-1) // per_word).contiguous(), WORDS[nbytes])
    raise AssertionError(f"a word of one {dtype} always lies together")


def _reads_back(packing: tuple[Half, Half], dtype: torch.dtype, head_dim: int, block_size: int, isa: str) -> bool:
    """Whether random bits, written to shuffled slots of several blocks and heads, are read back through `packing`."""
    heads, patterns = 2, 1 << 16
    blocks = max(3, -(-patterns // (block_size * heads * head_dim)))
    tokens = blocks * block_size
    shape = (tokens, heads, head_dim)
    generator = torch.Generator().manual_seed(0)
    bits = [_every_pattern(shape, BITS[dtype], generator) for _ in range(2)]
    slots = torch.randperm(tokens, generator=generator)
    cache = torch.zeros(blocks, heads, block_size, 2 * head_dim, dtype=dtype)
    _write(cache, bits[0][slots].view(dtype), bits[1][slots].view(dtype), slots, isa)
    packed = cache.view(BITS[dtype]).view(blocks, heads, 2, -1)
    whole = Span(0, blocks, 0, block_size, 0)
    for side, half in enumerate(packing):
        rows = torch.empty(blocks, heads, block_size, head_dim, dtype=BITS[dtype])
        half.unpack(packed[:, :, side], half.of(whole), rows.flatten(2))
        if not torch.equal(rows.transpose(1, 2).reshape(shape), bits[side]):
            return False
    return True


def _every_pattern(shape: tuple[int, ...], bits: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Random bits; those of 16-bit integers hold each of the 65536 patterns that fit, shuffled."""
    count = torch.Size(shape).numel()
    info = torch.iinfo(bits)
    if bits == torch.int16:
        order = torch.randperm(count, generator=generator)
        return (order % (1 << 16) + info.min).to(bits).view(shape)
    return torch.randint(info.min, info.max + 1, shape, dtype=torch.int64, generator=generator).to(bits)


def _write(cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, isa: str) -> None:
    """Canonical rows [T, H, D] into slots of a layer's cache, as the engine writes them: a page is K rows, V rows."""
    blocks, heads, block_size, width = cache.shape
    key_cache, value_cache = cache.view(blocks, heads, 2 * block_size, width // 2).chunk(2, dim=2)
    _custom_ops().cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)


def _attention_isa(dtype: torch.dtype, block_size: int, head_dim: int) -> str:
    """The instruction set that the backend picks for this cache."""
    _custom_ops()
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return str(_get_attn_isa(dtype, block_size, head_dim))


@lru_cache(maxsize=1)
def _custom_ops() -> Any:
    """vLLM's operators; an engine whose build lacks the one that packs pages is refused."""
    from vllm import _custom_ops as ops

    if not hasattr(torch.ops._C, "cpu_attn_reshape_and_cache"):
        raise Unsupported("this vLLM has no cpu_attn_reshape_and_cache: the packing of its CPU caches is unknown")
    return ops
