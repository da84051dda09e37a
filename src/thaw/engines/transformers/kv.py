"""Extents as torch tensors, and the plan of one packed forward pass over them.

Shape letters: H KV heads, P pages, L layers, T token slots of a page (256), D head size, N packed rows (new tokens of
all feeds), G query heads a KV head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from thaw.core.cache import DTYPE_BYTES, CacheGroup, TokenGroup, token_groups
from thaw.engines.embedded.backend import Feed
from thaw.engines.embedded.pages import PAGE, Extent, PageRange

LONG = 16
"""A feed of more tokens than this reads its past as one gathered tensor; shorter ones read page by page, shared."""


class TorchExtent(Extent):
    """Token groups as torch tensors on one device: `stores[g]` is [column of the group][page][bytes of a page, as
    numbers], so a page of a column is contiguous and is a blob."""

    def __init__(self, groups: Sequence[CacheGroup], num_pages: int, device: torch.device) -> None:
        self.num_pages = num_pages
        self.groups = token_groups(groups)
        self.stores = [_store(group, num_pages, device) for group in self.groups]
        self._columns = [(g, number) for g, group in enumerate(self.groups) for number in range(group.num_blobs)]
        self._on_host = device.type == "cpu"

    @cached_property
    def kv_HPL2TD(self) -> torch.Tensor:
        """Of a model with one plain full group."""
        (planes,) = self.planes(0, slice(None))
        return planes

    def planes(self, group: int, pages: slice) -> list[torch.Tensor]:
        """Views [column][page][layer][how many alike][token slot][numbers]: one, or K and V where they differ."""
        return _planes(self.groups[group], self.stores[group][:, pages])

    def page(self, column: int, page: int) -> memoryview | None:
        group, number = self._columns[column]
        return _bytes_of(self.stores[group][number, page]) if self._on_host else None

    def gather(self, column: int, page: int, start: int, stop: int) -> memoryview:
        parts = [plane[:, :, start:stop].flatten(1) for plane in self._slots(column, page)]
        return _bytes_of(torch.cat(parts, 1).contiguous().cpu())

    def scatter(self, column: int, page: int, start: int, stop: int, data: memoryview, stored: int) -> None:
        slots = self._slots(column, page)
        raw = torch.frombuffer(bytearray(data) if data.readonly else data, dtype=torch.uint8)
        rows = raw.view(slots[0].dtype).view(slots[0].shape[0], -1)  # a layer's planes one after the other
        sizes = [plane.shape[1] * stored * plane.shape[3] for plane in slots]
        for plane, blob in zip(slots, torch.split(rows, sizes, 1), strict=True):
            tokens = blob.reshape(plane.shape[0], plane.shape[1], stored, plane.shape[3])
            plane[:, :, start:stop] = tokens[:, :, : stop - start].to(plane.device)

    def copy_page(self, page: int, source: Extent, source_page: int, num_tokens: int) -> None:
        assert isinstance(source, TorchExtent)
        for group in range(len(self.groups)):
            theirs = source.planes(group, slice(source_page, source_page + 1))
            for own, other in zip(self.planes(group, slice(page, page + 1)), theirs, strict=True):
                own[..., :num_tokens, :] = other[..., :num_tokens, :]

    def _slots(self, column: int, page: int) -> list[torch.Tensor]:
        """A page of a column: [layer][how many alike][token slot][numbers]."""
        group, number = self._columns[column]
        store = self.stores[group][number : number + 1, page : page + 1]
        return [plane[0, 0] for plane in _planes(self.groups[group], store)]


def _store(group: TokenGroup, num_pages: int, device: torch.device) -> torch.Tensor:
    numbers = PAGE * group.token_nbytes_per_blob // DTYPE_BYTES[group.dtype]
    return torch.empty((group.num_blobs, num_pages, numbers), dtype=getattr(torch, group.dtype), device=device)


def _planes(group: TokenGroup, store: torch.Tensor) -> list[torch.Tensor]:
    by_layer = (*store.shape[:2], group.num_layers)
    sizes = [count * PAGE * width for count, width in group.layer_planes]
    parts = torch.split(store.view(*by_layer, -1), sizes, 3)
    return [
        part.view(*by_layer, count, PAGE, width) for part, (count, width) in zip(parts, group.layer_planes, strict=True)
    ]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


@dataclass
class SlotWrite:
    """Packed rows [row, row + count) go to slots [slot, slot + count) of a page."""

    extent: TorchExtent
    page: int
    slot: int
    row: int
    count: int


@dataclass
class PastPages:
    """Full pages [first, first + count) of an extent, attended to by `rows`; partials go to places [place, …)."""

    extent: TorchExtent
    first: int
    count: int
    place: int
    rows: list[int] = field(default_factory=list)


@dataclass
class Tail:
    """Slots [start, stop) of a page, attended to by packed rows [row, row + count)."""

    extent: TorchExtent
    page: int
    start: int
    stop: int
    row: int
    count: int
    place: int
    causal: bool


@dataclass
class Long:
    """A long feed: rows [row, row + count) attend to `runs` ([0, start) before them) and causally to themselves."""

    runs: list[PageRange]
    start: int
    row: int
    count: int


class BatchPlan:
    """What one forward pass writes and reads: computed once, used by every layer.

    Every row's attention is a merge of partials, one a page, in page order. A page's partial is computed the same way
    whoever owns the page, so a child's bits do not depend on what it shares.
    """

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self.writes: list[SlotWrite] = []
        self.past: list[PastPages] = []
        self.tails: list[Tail] = []
        self.longs: list[Long] = []
        self.num_places = 1
        row = 0
        for feed in feeds:
            self._add(feed, row)
            row += len(feed.tokens)
        self.num_rows = row
        self.row_index = {id(p): _index(p.rows) for p in self.past}

    def _add(self, feed: Feed, row: int) -> None:
        start, count = feed.kv.num_tokens, len(feed.tokens)
        short = count <= LONG
        at = start
        while at < start + count:
            page, slot = divmod(at, PAGE)
            take = min(PAGE - slot, start + count - at)
            extent, index = feed.kv.locate(page)
            assert isinstance(extent, TorchExtent)
            self.writes.append(SlotWrite(extent, index, slot, row + at - start, take))
            if short:
                self._short(feed, page, extent, index, slot, row + at - start, take)
            at += take
        if not short:
            self.longs.append(Long(feed.kv.full_runs(feed.kv.num_pages), start, row, count))

    def _short(self, feed: Feed, page: int, extent: TorchExtent, index: int, slot: int, row: int, take: int) -> None:
        for run in feed.kv.full_runs(page):
            assert isinstance(run.extent, TorchExtent)
            self._join(run.extent, run.first, run.count, run.start, range(row, row + take))
        if take == 1:
            self.tails.append(Tail(extent, index, 0, slot + 1, row, 1, page, False))
            self.num_places = max(self.num_places, page + 1)
            return
        if slot:
            self.tails.append(Tail(extent, index, 0, slot, row, take, page, False))
        self.tails.append(Tail(extent, index, slot, slot + take, row, take, page + 1, True))
        self.num_places = max(self.num_places, page + 2)

    def _join(self, extent: TorchExtent, first: int, count: int, place: int, rows: range) -> None:
        """Rows that attend to the same pages share one call."""
        for known in self.past:
            if (known.extent is extent) and (known.first, known.count, known.place) == (first, count, place):
                known.rows.extend(rows)
                return
        self.past.append(PastPages(extent, first, count, place, list(rows)))


def _index(rows: list[int]) -> Any:
    """A slice where rows are consecutive, else an index tensor."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows)
