"""Plain strided pages, moved by one kernel for all layers and heads.

A transfer of a few megabytes (a fork's last block, what a turn added) is one launch that reads or writes pinned host
memory itself, in the order of the caller's stream: nobody waits for it. Larger ones go through `strided`'s staging
buffers, with this kernel between stage and pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl

from thaw.engines.vllm.worker.layout.strided import Part, TorchPages

TILE = 16
"""Tokens of one program: of one layer and one head."""


@triton.jit(do_not_specialize=["tokens", "start", "row", "layers", "first"])
def _move(  # type: ignore[no-untyped-def]
    pages, ids, host, tokens, start, row, layers, first,
    page_b: tl.constexpr, page_h: tl.constexpr, page_n: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TOKENS: tl.constexpr, TO_PAGES: tl.constexpr,
):  # fmt: skip
    """Tokens [start, start + tokens) between pages and `host`, [H][layers][2][row][D] from its first token on.

    `pages`: addresses of the layers' caches. Layer l of `host` is layer first + l."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    layer, head = tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, DP)
    there = t < tokens
    inside = there[:, None] & (d < D)[None, :]
    position = start + t
    block = tl.load(ids + position // N, mask=there, other=0)
    page = tl.load(pages + first + layer).to(tl.pointer_type(host.dtype.element_ty))
    at = page + (block * page_b + head.to(tl.int64) * page_h + (position % N) * page_n)[:, None] + d[None, :]
    plane = tl.cast(row, tl.int64) * D
    k = host + (tl.cast(head, tl.int64) * layers + layer) * 2 * plane + t[:, None].to(tl.int64) * D + d[None, :]
    if TO_PAGES:
        tl.store(at, tl.load(k, mask=inside), mask=inside)
        tl.store(at + D, tl.load(k + plane, mask=inside), mask=inside)
    else:
        tl.store(k, tl.load(at, mask=inside), mask=inside)
        tl.store(k + plane, tl.load(at + D, mask=inside), mask=inside)


class TritonPages(TorchPages):
    """See the module's text. The kernels are compiled here, not under a request."""

    kind = "triton-pages"

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], *, staging: int = 0) -> None:
        super().__init__(kv_caches, staging=staging)
        first = self._caches[0]
        alike = all(cache.stride() == first.stride() for cache in self._caches) and first.stride(3) == 1
        self._table = None
        if alike:
            addresses = [cache.data_ptr() for cache in self._caches]
            self._table = torch.tensor(addresses, dtype=torch.int64).to(self.device)
            self._warm()

    def gather_now(self, block_ids: Sequence[int], start: int, stop: int, out: torch.Tensor) -> bool:
        """`gather` into pinned memory by one launch, in the order of the current stream: `out` is whole once that is
        done with it. False, and nothing done, if `out` is not pinned or its tokens are not a run of a whole tensor."""
        return self._launch(block_ids, start, stop, out, to_pages=False)

    def scatter_now(self, block_ids: Sequence[int], start: int, stop: int, source: torch.Tensor) -> bool:
        """`scatter` likewise: `source` must stay as it is until the current stream is done with it."""
        return self._launch(block_ids, start, stop, source, to_pages=True)

    def _launch(self, block_ids: Sequence[int], start: int, stop: int, host: torch.Tensor, *, to_pages: bool) -> bool:
        self._check(block_ids, start, stop, host)
        row = _row(host)
        if self._table is None or row is None or not host.is_pinned():
            return False
        if start < stop:
            lo, hi = start // self.block_size, -(-stop // self.block_size)
            ids = self._upload(block_ids[lo:hi])
            part = Part(0, self.num_layers, start - lo * self.block_size, stop - lo * self.block_size)
            self._move(host.view(self.bits), ids, part, row, to_pages)
        return True

    def _read(self, stage: torch.Tensor, ids: torch.Tensor, part: Part) -> None:
        if self._table is None:
            super()._read(stage, ids, part)
        else:
            self._move(stage, ids, part, part.stop - part.start, to_pages=False)

    def _write(self, stage: torch.Tensor, ids: torch.Tensor, part: Part) -> None:
        if self._table is None:
            super()._write(stage, ids, part)
        else:
            self._move(stage, ids, part, part.stop - part.start, to_pages=True)

    def _move(self, host: torch.Tensor, ids: torch.Tensor, part: Part, row: int, to_pages: bool) -> None:
        tokens, layers = part.stop - part.start, part.last - part.first
        page_b, page_h, page_n, _ = self._caches[0].stride()
        grid = (-(-tokens // TILE), layers, self.num_kv_heads)
        with torch.cuda.device(self.device):
            _move[grid](
                self._table, ids, host, tokens, part.start, row, layers, part.first, page_b, page_h, page_n,
                self.block_size, self.head_dim, triton.next_power_of_2(self.head_dim), TILE, to_pages,
            )  # fmt: skip

    def _warm(self) -> None:
        """One token of block 0, which vLLM never gives to anyone: out of it and back into it."""
        shape = (self.num_kv_heads, self.num_layers, 2, 1, self.head_dim)
        host = torch.empty(shape, dtype=self.dtype, pin_memory=True)
        for move in (self.gather_now, self.scatter_now):
            move([0], 0, 1, host)
        torch.cuda.synchronize(self.device)
        self.gather([0], 0, 1, host)
        self.scatter([0], 0, 1, host)


def _row(host: torch.Tensor) -> int | None:
    """Tokens between two planes of a run of tokens of a whole [H, L, 2, T, D]; None of anything else."""
    _, layers, _, _, width = host.shape
    plane = host.stride(2)
    whole = (layers * 2 * plane, 2 * plane, plane, width, 1)
    return plane // width if host.stride() == whole and plane % width == 0 else None
