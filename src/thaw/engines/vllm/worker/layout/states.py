"""Recurrent states between vLLM's pages and the blobs of a point state.

A page holds one layer's state: the convolution [column][channel] in the model's dtype, then the state matrices of all
heads in theirs, then padding. vLLM hands it over as bytes. On a CPU a delta rule's matrix lies there as [key][value],
as in a blob, though vLLM's spec says the reverse, as its kernels on a GPU have it; Mamba2's lies as [channel][state].

    raw    [layers, bytes of a state]: the pages as they are, copied behind each step of a request with stop strings
    blobs  a tensor [layer][…shape] for each head of each part, as `cache.PointState` says
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod

import torch

from thaw.core.cache import PointState, StatePart
from thaw.core.errors import Unsupported
from thaw.engines.hf.recurrent import RECURRENT
from thaw.engines.served.worker.host_cache import Tensors


class StatePages:
    """The states of one point group. `tables[i]`: the layers of vLLM's i-th group that keeps states, by their numbers
    in the model. `turned`: a matrix lies in a page with its two axes the other way round than in a blob. Calls for
    different blocks may run at once.

    Raises `Unsupported` for pages that do not hold the group's parts."""

    def __init__(
        self,
        group: PointState,
        pages: Mapping[int, torch.Tensor],
        tables: Sequence[Sequence[int]],
        *,
        turned: bool = False,
    ) -> None:
        self.group, self._turned = group, turned
        self._convs = [part for part in group.parts if part.name != RECURRENT]
        self._matrix = next((part for part in group.parts if part.name == RECURRENT), None)
        self._dtype: torch.dtype = getattr(torch, self._convs[0].dtype)
        self._columns, self._channels = self._convs[0].shape[1], sum(p.num_heads * p.shape[0] for p in self._convs)
        self._conv_nbytes = self._columns * self._channels * self._dtype.itemsize
        self.nbytes = group.nbytes // group.num_layers
        table_of = {layer: i for i, layers in enumerate(tables) for layer in layers}
        if tuple(sorted(table_of)) != group.layer_numbers or len(table_of) != sum(map(len, tables)):
            raise Unsupported(f"vLLM keeps states of layers {sorted(table_of)}; the model's config names {group}")
        self._pages = [(_flat(pages[layer], self.nbytes, layer), table_of[layer]) for layer in group.layer_numbers]

    def read(self, blocks: Sequence[int], raw: torch.Tensor) -> None:
        """Copy the state that lies in `blocks`, one for each table, into `raw`."""
        for row, (page, table) in enumerate(self._pages):
            raw[row].copy_(page[blocks[table]])

    def blobs(self, raw: torch.Tensor, out: Tensors) -> None:
        """The raw state as blobs, into `out`."""
        self._save(list(raw), out)

    def save(self, blocks: Sequence[int], out: Tensors) -> None:
        """Copy the state that lies in `blocks`, one for each table, as blobs into `out`."""
        self._save([page[blocks[table]] for page, table in self._pages], out)

    def _save(self, rows: Sequence[torch.Tensor], out: Tensors) -> None:
        for row, state in enumerate(rows):
            at = 0
            for part, view in self._views(state):
                for head in range(part.num_heads):
                    out[at][row].copy_(view[head])
                    at += 1

    def write(self, blobs: Tensors, blocks: Sequence[int]) -> None:
        """Copy a state's blobs into `blocks`, one for each table."""
        for row, (page, table) in enumerate(self._pages):
            at = 0
            for part, view in self._views(page[blocks[table]]):
                for head in range(part.num_heads):
                    view[head].copy_(blobs[at][row])
                    at += 1

    def describe(self) -> dict[str, str]:
        """What a person is told, as plain strings."""
        return {"state": f"{self.nbytes} bytes a layer, {len(self._pages)} layers"}

    def _views(self, state: torch.Tensor) -> list[tuple[StatePart, torch.Tensor]]:
        """Each part of one layer's state, as [head][…shape] over its bytes."""
        conv_CK = state[: self._conv_nbytes].view(self._dtype).view(self._columns, self._channels).t()
        widths = [part.num_heads * part.shape[0] for part in self._convs]
        begins = [0, *accumulate(widths)]
        found = [
            (part, torch.unflatten(conv_CK[begin : begin + width], 0, (part.num_heads, part.shape[0])))
            for part, begin, width in zip(self._convs, begins, widths, strict=False)
        ]
        if self._matrix is not None:
            rows, columns = self._matrix.shape
            shape = (self._matrix.num_heads, *((columns, rows) if self._turned else (rows, columns)))
            matrices = state[self._conv_nbytes :].view(getattr(torch, self._matrix.dtype)).view(shape)
            found.append((self._matrix, matrices.transpose(1, 2) if self._turned else matrices))
        return found


def _flat(page: torch.Tensor, nbytes: int, layer: int) -> torch.Tensor:
    """[blocks, bytes] over a layer's pages."""
    if page.dtype != torch.int8 or page.dim() != 4 or prod(page.shape[1:]) != nbytes or page.stride(3) != 1:
        raise Unsupported(
            f"layer {layer}: vLLM keeps a state of {list(page.shape)} {page.dtype}, and the model's config says that "
            f"it has {nbytes} bytes"
        )
    return page.view(page.shape[0], nbytes) if page.is_contiguous() else page[:, 0, 0]
