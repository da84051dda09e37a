"""Paged KV: a session's cache as pages of 256 tokens in shared extents.

A *page* holds one window of all layers and cache groups, a *column* for each blob of a segment (`cache.columns`): a
full page of one column is byte for byte a blob. An *extent* is memory for several pages, made by the backend. A session
lists *runs* of pages; forking shares the runs of full pages by reference and copies the partial tail page only. Pages
are append-only: token slots below `num_tokens` are never written again, so a fork taken at a step boundary stays
consistent while the parent goes on (no lock, no copy). Point states are immutable values, kept by the number of tokens
that they are of, and shared with forks: a child has no state of its own until it runs.

    pages [0, num_tokens // 256)      full, shared freely, immutable
    page   num_tokens // 256          partial: private to one session
"""

from __future__ import annotations

import abc
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from thaw.core.cache import CacheGroup, TokenGroup, list_of, point_groups, token_groups
from thaw.core.errors import NotKept
from thaw.core.prefix import WINDOW

PAGE = WINDOW
GROW_PAGES = 4
"""Pages in an extent that a decoding session adds when it runs out."""


class Extent(abc.ABC):
    """Memory for `num_pages` pages, zero or garbage at first. Columns and pages count from 0."""

    num_pages: int

    @abc.abstractmethod
    def page(self, column: int, page: int) -> memoryview | None:
        """Writable bytes of a whole page of one column, or None where the memory is not the host's."""

    @abc.abstractmethod
    def gather(self, column: int, page: int, start: int, stop: int) -> memoryview:
        """A copy of token slots [start, stop) as blob bytes; for full groups [layer][K|V][token][head_dim]."""

    @abc.abstractmethod
    def scatter(self, column: int, page: int, start: int, stop: int, data: memoryview, stored: int) -> None:
        """Fill slots [start, stop) from the first tokens of blob bytes that hold `stored` tokens."""

    @abc.abstractmethod
    def copy_page(self, page: int, source: Extent, source_page: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` slots of a page of `source`, all columns."""


class StateBlob(Protocol):
    """A blob of a point state: `bytes(blob)` are its bytes and `len(blob)` their number. It never changes."""

    def __len__(self) -> int: ...

    def __bytes__(self) -> bytes: ...


States: TypeAlias = tuple[StateBlob, ...]
"""All blobs of a model's point states after some number of tokens, group by group."""


class ExtentFactory(abc.ABC):
    """`keeps_interior`: windows and point states of all tokens are kept; else those of the last tokens and those that
    were asked for, and the `recent_points` states before the last one. `point_multiple`: a prefill that is
    cut at a multiple of it has its recurrent kernel's chunks where one that is not cut has them."""

    groups: tuple[CacheGroup, ...]
    keeps_interior: bool = True
    point_multiple: int = 1
    recent_points: int = 0

    @abc.abstractmethod
    def extent(self, num_pages: int) -> Extent: ...


@dataclass(frozen=True)
class PageRange:
    """Pages [start, start + count) of a session are pages [first, first + count) of `extent`."""

    extent: Extent
    first: int
    start: int
    count: int


class PagedKV:
    """The KV of one session; `num_tokens` tokens have been computed. `points[n]`: the point states after n tokens; they
    exist for `num_tokens` wherever the model has such groups. `asked`: the tokens whose states and windows are not let
    go of."""

    def __init__(self, factory: ExtentFactory) -> None:
        self.factory = factory
        self.runs: list[PageRange] = []
        self.num_tokens = 0
        self.points: dict[int, States] = {}
        self.asked: set[int] = set()
        self.there: dict[str, tuple[range, ...]] = {}
        """Of a session that was brought back: the tokens of each group that its pages have, in order and apart from one
        another. The last range has no end: what is computed here is there."""

    @property
    def num_pages(self) -> int:
        return self.runs[-1].start + self.runs[-1].count if self.runs else 0

    def reserve(self, num_tokens: int, *, ahead: int = GROW_PAGES) -> None:
        """Make room for `num_tokens` tokens in all, in `ahead` pages at least where there are some. Never moves a
        page."""
        missing = -(-num_tokens // PAGE) - self.num_pages
        if missing > 0:
            count = missing if not self.runs else max(missing, ahead)
            self.runs.append(PageRange(self.factory.extent(count), 0, self.num_pages, count))

    def locate(self, page: int) -> tuple[Extent, int]:
        """The extent of a page and its index there."""
        for run in self.runs:
            if run.start <= page < run.start + run.count:
                return run.extent, run.first + page - run.start
        raise IndexError(f"page {page} of {self.num_pages}")

    def full_runs(self, num_pages: int) -> list[PageRange]:
        """The runs that make up pages [0, num_pages)."""
        out = []
        for run in self.runs:
            count = min(run.count, num_pages - run.start)
            if count > 0:
                out.append(PageRange(run.extent, run.first, run.start, count))
        return out

    def fork(self, at: int) -> PagedKV:
        """The first `at` tokens as a PagedKV of their own: full pages and states shared, the tail page copied. Raises
        `NotKept` where what is needed there is not kept."""
        assert 0 <= at <= self.num_tokens, (at, self.num_tokens)
        self._require(at)
        child = PagedKV(self.factory)
        whole, tail = divmod(at, PAGE)
        child.runs = self.full_runs(whole)
        if tail:
            source, index = self.locate(whole)
            extent = self.factory.extent(1)
            extent.copy_page(0, source, index, tail)
            child.runs.append(PageRange(extent, 0, whole, 1))
        child.num_tokens = at
        child.points = {token: state for token, state in self.points.items() if token <= at}
        child.asked = {token for token in self.asked if token <= at}
        child.there = there_until(self.there, at)
        return child

    def keep(self, state: States) -> None:
        """The point states after `num_tokens` tokens; earlier ones go where they are neither recent nor asked for, nor
        the interior is kept."""
        self.points[self.num_tokens] = state
        if not self.factory.keeps_interior:
            oldest = self.num_tokens - max(1, self.factory.recent_points)
            self.points = {
                token: state for token, state in self.points.items() if token >= oldest or token in self.asked
            }

    def ask(self, tokens: Iterable[int]) -> None:
        """Do not let go of the states and windows after these numbers of tokens, which are there or to come. Raises
        `NotKept`."""
        wanted = set(tokens)
        read = {token for token in wanted if token <= self.num_tokens}
        gone = read - self.points.keys()
        if gone and point_groups(self.factory.groups):
            raise NotKept(
                f"no state is kept after {list_of(gone)}, which this session has read already: it has states after "
                f"{list_of(self.points)}. Ask for a state before its tokens are appended"
            )
        for token in read:
            self._require_windows(token)
        self.asked |= wanted

    def next_asked(self) -> int | None:
        """The next number of tokens at which a prefill is to stop for a state."""
        if not point_groups(self.factory.groups):
            return None
        return min((token for token in self.asked if token > self.num_tokens), default=None)

    def lasting(self) -> list[int]:
        """The tokens whose states a snapshot holds: all that there are where the interior is kept, else the present
        end's, recent ones, and those that were asked for."""
        oldest = 0 if self.factory.keeps_interior else self.num_tokens - self.factory.recent_points
        return sorted(token for token in self.points if token >= oldest or token in self.asked)

    def before(self, num_tokens: int) -> int:
        """How many tokens of KV a session of the first `num_tokens` tokens continues with: all but the last, which runs
        again; or all of them, where the state before the last is not kept and the one after it is."""
        last = min(self.num_tokens, max(num_tokens - 1, 0))
        if not point_groups(self.factory.groups) or not last or last in self.points:
            return last
        return num_tokens if num_tokens <= self.num_tokens and num_tokens in self.points else last

    def nearest(self, num_tokens: int) -> int:
        """The most tokens, fewer than `num_tokens`, that a fork can have; 0 where there is nothing to begin with."""
        last = min(self.num_tokens, num_tokens - 1)
        ends = {last, *(r.stop for group in token_groups(self.factory.groups) for r in self.kept(group))}
        found = self.points if point_groups(self.factory.groups) else ends
        return max((n for n in found if 0 < n <= last and self._lacking(n) is None), default=0)

    def kept(self, group: TokenGroup) -> list[range]:
        """The tokens of a group that are kept, in order and apart from one another: what is needed to go on from here,
        from one token earlier, and from what was asked for. Where there are states, that begins behind the asked token,
        elsewhere with it: it runs again."""
        end, again = self.num_tokens, 0 if point_groups(self.factory.groups) else 1
        wanted = [range(group.covers(max(end - 1, 0)).start, end)]
        wanted += [range(group.covers(token - again).start, token) for token in self.asked if 0 < token <= end]
        if self.factory.keeps_interior:
            wanted = [range(end)]
        return _both(_joined(wanted), self.there.get(group.name, (range(sys.maxsize),)))

    def first_stored(self, group: TokenGroup, start: int, stop: int) -> int:
        """The first token of [start, stop) from which a group is stored up to `stop`; `stop` where nothing is kept."""
        there = self.there.get(group.name, (range(sys.maxsize),))
        whole = max((r.start for r in there if r.start < stop <= r.stop), default=stop)
        first = max(start, whole)
        return min((max(r.start, first) for r in self.kept(group) if r.start < stop and r.stop > first), default=stop)

    def _require(self, at: int) -> None:
        if at and point_groups(self.factory.groups) and at not in self.points:
            raise NotKept(
                f"no state is kept after {at} tokens: this session has states after {list_of(self.points)}. Go on from "
                f"one of these, {NotKept.way_out}"
            )
        self._require_windows(at)

    def _require_windows(self, at: int) -> None:
        group = self._lacking(at)
        if group is not None:
            covered, have = group.covers(at), ", ".join(f"{r.start} to {r.stop - 1}" for r in self.kept(group))
            raise NotKept(
                f"after {at} tokens the group {group.name} needs tokens {covered.start} to {covered.stop - 1}; "
                f"this session has {have}. Continue from its present end or from a point that was asked for, "
                f"{NotKept.way_out}"
            )

    def _lacking(self, at: int) -> TokenGroup | None:
        """A group of which not all is kept that a session of `at` tokens needs."""
        for group in token_groups(self.factory.groups):
            covered = group.covers(at)
            if covered and not any(r.start <= covered.start and covered.stop <= r.stop for r in self.kept(group)):
                return group
        return None

    def read(self, column: int, start: int, stop: int) -> memoryview:
        """Tokens [start, stop) of one window and column as blob bytes; without a copy when it is a whole host page."""
        page, begin = divmod(start, PAGE)
        extent, index = self.locate(page)
        if begin == 0 and stop - start == PAGE:
            whole = extent.page(column, index)
            if whole is not None:
                return whole
        return extent.gather(column, index, begin, begin + stop - start)

    def target(self, column: int, start: int, stop: int) -> memoryview | None:
        """Where blob bytes of [start, stop) may be written in place: a whole host page, else None (use `write`)."""
        page, begin = divmod(start, PAGE)
        if begin or stop - start != PAGE:
            return None
        extent, index = self.locate(page)
        return extent.page(column, index)

    def write(self, column: int, start: int, stop: int, data: memoryview, stored: int) -> None:
        """Fill [start, stop) of one window from the first tokens of a blob that holds `stored` tokens."""
        page, begin = divmod(start, PAGE)
        extent, index = self.locate(page)
        extent.scatter(column, index, begin, begin + stop - start, data, stored)


def there_until(there: Mapping[str, Sequence[range]], at: int) -> dict[str, tuple[range, ...]]:
    """What is there of the first `at` tokens, and all that follows."""
    return {
        group: tuple(_joined([*_both(ranges, (range(at),)), range(at, sys.maxsize)])) for group, ranges in there.items()
    }


def _joined(ranges: Iterable[range]) -> list[range]:
    """The same tokens in order, those that touch as one."""
    out: list[range] = []
    for one in sorted((r for r in ranges if r), key=lambda r: r.start):
        if out and one.start <= out[-1].stop:
            out[-1] = range(out[-1].start, max(out[-1].stop, one.stop))
        else:
            out.append(one)
    return out


def _both(some: Iterable[range], others: Sequence[range]) -> list[range]:
    """The tokens that are in both."""
    pairs = (range(max(a.start, b.start), min(a.stop, b.stop)) for a in some for b in others)
    return [pair for pair in pairs if pair]
