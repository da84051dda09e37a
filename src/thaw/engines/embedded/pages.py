"""Paged KV: a session's cache as pages of 256 tokens in shared extents.

A *page* holds one window of all layers: a full page of one head is byte for byte a blob. An *extent* is memory for
several pages, made by the backend. A session lists *runs* of pages; forking shares the runs of full pages by
reference and copies the partial tail page only. Pages are append-only: token slots below `num_tokens` are never
written again, so a fork taken at a step boundary stays consistent while the parent goes on (no lock, no copy).

    pages [0, num_tokens // 256)      full, shared freely, immutable
    page   num_tokens // 256          partial: private to one session
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

from thaw.core.identity import CacheGroup
from thaw.core.prefix import WINDOW

PAGE = WINDOW
GROW_PAGES = 4
"""Pages in an extent that a decoding session adds when it runs out."""


class Extent(abc.ABC):
    """Memory for `num_pages` pages, zero or garbage at first. Heads and pages count from 0."""

    num_pages: int

    @abc.abstractmethod
    def page(self, head: int, page: int) -> memoryview | None:
        """Writable bytes of a whole page of one head, or None where the memory is not the host's."""

    @abc.abstractmethod
    def gather(self, head: int, page: int, start: int, stop: int) -> memoryview:
        """A copy of token slots [start, stop) as [layer][K|V][token][head_dim] bytes."""

    @abc.abstractmethod
    def scatter(self, head: int, page: int, start: int, stop: int, data: memoryview, stored: int) -> None:
        """Fill slots [start, stop) from the first tokens of blob bytes that hold `stored` tokens."""

    @abc.abstractmethod
    def copy_page(self, page: int, source: Extent, source_page: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` slots of a page of `source`, all heads."""


class ExtentFactory(abc.ABC):
    group: CacheGroup

    @abc.abstractmethod
    def extent(self, num_pages: int) -> Extent: ...


@dataclass(frozen=True)
class Run:
    """Pages [start, start + count) of a session are pages [first, first + count) of `extent`."""

    extent: Extent
    first: int
    start: int
    count: int


class PagedKV:
    """The KV of one session; `num_tokens` tokens have been computed."""

    def __init__(self, factory: ExtentFactory) -> None:
        self.factory = factory
        self.runs: list[Run] = []
        self.num_tokens = 0

    @property
    def num_pages(self) -> int:
        return self.runs[-1].start + self.runs[-1].count if self.runs else 0

    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens` tokens in all. Never moves a page."""
        missing = -(-num_tokens // PAGE) - self.num_pages
        if missing > 0:
            count = missing if not self.runs else max(missing, GROW_PAGES)
            self.runs.append(Run(self.factory.extent(count), 0, self.num_pages, count))

    def locate(self, page: int) -> tuple[Extent, int]:
        """The extent of a page and its index there."""
        for run in self.runs:
            if run.start <= page < run.start + run.count:
                return run.extent, run.first + page - run.start
        raise IndexError(f"page {page} of {self.num_pages}")

    def full_runs(self, num_pages: int) -> list[Run]:
        """The runs that make up pages [0, num_pages)."""
        out = []
        for run in self.runs:
            count = min(run.count, num_pages - run.start)
            if count > 0:
                out.append(Run(run.extent, run.first, run.start, count))
        return out

    def fork(self, at: int) -> PagedKV:
        """The first `at` tokens as a PagedKV of their own: full pages shared, the tail page copied."""
        assert 0 <= at <= self.num_tokens, (at, self.num_tokens)
        child = PagedKV(self.factory)
        whole, tail = divmod(at, PAGE)
        child.runs = self.full_runs(whole)
        if tail:
            source, index = self.locate(whole)
            extent = self.factory.extent(1)
            extent.copy_page(0, source, index, tail)
            child.runs.append(Run(extent, 0, whole, 1))
        child.num_tokens = at
        return child

    def read(self, head: int, start: int, stop: int) -> memoryview:
        """Tokens [start, stop) of one window and head as blob bytes; without a copy when it is a whole host page."""
        page, begin = divmod(start, PAGE)
        extent, index = self.locate(page)
        if begin == 0 and stop - start == PAGE:
            whole = extent.page(head, index)
            if whole is not None:
                return whole
        return extent.gather(head, index, begin, begin + stop - start)

    def target(self, head: int, start: int, stop: int) -> memoryview | None:
        """Where blob bytes of [start, stop) may be written in place: a whole host page, else None (use `write`)."""
        page, begin = divmod(start, PAGE)
        if begin or stop - start != PAGE:
            return None
        extent, index = self.locate(page)
        return extent.page(head, index)

    def write(self, head: int, start: int, stop: int, data: memoryview, stored: int) -> None:
        """Fill [start, stop) of one window from the first tokens of a blob that holds `stored` tokens."""
        page, begin = divmod(start, PAGE)
        extent, index = self.locate(page)
        extent.scatter(head, index, begin, begin + stop - start, data, stored)
