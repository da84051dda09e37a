"""What `match` looks up: for each segment, the tokens of its window as a state that uses it has them.

Rows are ordered by window hash and these tokens, so the longest common prefix with any tokens is that with a neighbour
in this order, however many sessions begin alike: two rows are read. A row's state uses the segment, and most of it of
all states that did when it was written.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import msgspec

from thaw.core.canonical import decode_stored
from thaw.core.errors import CorruptBlob, CorruptDatabase
from thaw.core.ids import ObjectId, StateId
from thaw.core.prefix import WINDOW
from thaw.store.schema import check
from thaw.store.settings import REBUILD

T = TypeVar("T")
Row = tuple[str, bytes, str, str, int]
"""window, key, segment, state, check: a row of `segments`."""
CACHE_ENTRIES = 4096


class _Segment(msgspec.Struct):
    start: int
    tokens: tuple[int, ...]
    window: str


class _Entry(msgspec.Struct):
    segment: str
    start: int
    length: int


class _Node(msgspec.Struct):
    entries: tuple[_Entry, ...]


class _State(msgspec.Struct):
    nodes: tuple[str, ...]
    num_kv: int
    tail_tokens: tuple[int, ...]


def key_of(tokens: Sequence[int]) -> bytes:
    """Token ids as big-endian u32, which sort as the tokens do."""
    try:
        return struct.pack(f">{len(tokens)}I", *tokens)
    except struct.error:
        raise CorruptBlob("an object has a token id beyond 32 bits") from None


class Windows:
    """Makes rows. `read` gives the verified bytes of an object."""

    def __init__(self, read: Callable[[str], bytes]) -> None:
        self._read = read
        self._nodes: dict[str, _Node] = {}
        self._segments: dict[str, _Segment] = {}

    def rows(self, homes: Iterable[tuple[str, str]], *, whole: bool = True) -> Iterator[Row]:
        """A row for each (segment, state that uses it). A damaged one raises `CorruptBlob`; unless `whole`, it is left
        out."""
        for segment, state in homes:
            try:
                yield self._row(segment, state)
            except CorruptBlob:
                if whole:
                    raise

    def _row(self, segment: str, state: str) -> Row:
        of = self._segment(segment)
        key = key_of(self._tokens(state, of.start // WINDOW * WINDOW))
        return of.window, key, segment, state, _check(of.window, key, segment, state)

    def _tokens(self, state: str, start: int) -> list[int]:
        """The state's tokens in the window that begins at `start`."""
        of, tokens = self._parse(state, _State), list[int]()
        for node in of.nodes:
            entries = self._node(node).entries
            if entries and entries[-1].start + entries[-1].length <= start:
                continue
            for entry in entries:
                if start <= entry.start < start + WINDOW:
                    tokens += self._segment(entry.segment).tokens[: entry.length]
            if entries and entries[-1].start >= start + WINDOW:
                break
        if start <= of.num_kv < start + WINDOW:
            tokens += of.tail_tokens
        return tokens[:WINDOW]

    def _node(self, identifier: str) -> _Node:
        return self._kept(self._nodes, identifier, _Node)

    def _segment(self, identifier: str) -> _Segment:
        return self._kept(self._segments, identifier, _Segment)

    def _kept(self, cache: dict[str, T], identifier: str, kind: type[T]) -> T:
        if identifier not in cache:
            if len(cache) >= CACHE_ENTRIES:
                cache.clear()
            cache[identifier] = self._parse(identifier, kind)
        return cache[identifier]

    def _parse(self, identifier: str, kind: type[T]) -> T:
        try:
            return decode_stored(self._read(identifier), kind)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise CorruptBlob(f"object {str(identifier)[:80]} is not what a state is made of: {error}") from None


def _check(window: str, key: bytes, segment: str, state: str) -> int:
    return check("segments", window, key.hex(), segment, state)


def insert(connection: sqlite3.Connection, rows: Iterable[Row]) -> None:
    """Rows that are there already stay."""
    connection.executemany("INSERT OR IGNORE INTO segments VALUES (?, ?, ?, ?, ?)", rows)


_SELECT = 'SELECT "window", "key", segment, state, "check" FROM segments WHERE "window" = ?'


def find(connection: sqlite3.Connection, window: str) -> list[tuple[ObjectId, StateId]]:
    """All segments of a window, each with its state."""
    return sorted({_found(row, window) for row in connection.execute(_SELECT, (window,))})


def nearest(connection: sqlite3.Connection, window: str, tokens: Sequence[int]) -> list[StateId]:
    """The states whose tokens in this window are most like these: two at most, and none that is stored is more."""
    key = key_of(tokens)
    queries = ('AND "key" <= ? ORDER BY "key" DESC LIMIT 1', 'AND "key" >= ? ORDER BY "key" LIMIT 1')
    found = [row for query in queries for row in connection.execute(f"{_SELECT} {query}", (window, key))]
    return list(dict.fromkeys(_found(row, window)[1] for row in found))


def _found(row: Row, window: str) -> tuple[ObjectId, StateId]:
    of, key, segment, state, said = row
    if of != window or not isinstance(key, bytes) or said != _check(of, key, segment, state):
        raise CorruptDatabase(f"the row of {str(segment)[:80]} in segments does not match its check. {REBUILD}")
    return ObjectId(segment), StateId(state)
