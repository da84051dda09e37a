"""The commit tree as lines of text: one row a commit, children above their parents.

    ● c3 second child
    │ ● c2 first child
    ├─╯
    ● c1 parent

A column waits for one commit. Several columns that wait for the same commit join just above its row; a column that is
free is used again, so the drawing stays narrow. Pure: (id, parents) in, gutters out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

PARTS = ("node", "pass", "over", "left", "tee", "end", "split", "new", "cross")
UNICODE = dict(zip(PARTS, "●│─├┴╯┬╮┼", strict=True))
ASCII = dict(zip(PARTS, "*|-++'+.|", strict=True))


class GraphRow(NamedTuple):
    """`gutter` to the left of the commit `id`; a row that only joins or splits lines has no id."""

    gutter: str
    id: str | None


def draw(commits: Iterable[tuple[str, tuple[str, ...]]], glyphs: dict[str, str]) -> Iterator[GraphRow]:
    """Rows for commits in an order where children come first."""
    columns: list[str | None] = []
    for identifier, parents in commits:
        mine = [i for i, waits in enumerate(columns) if waits == identifier]
        if len(mine) > 1:
            yield GraphRow(_bridge(columns, mine, glyphs, glyphs["tee"], glyphs["end"]), None)
            for i in mine[1:]:
                columns[i] = None
            _trim(columns)
        at = mine[0] if mine else _free(columns)
        columns[at] = identifier
        yield GraphRow(_row(columns, at, glyphs), identifier)
        columns[at] = parents[0] if parents else None
        new = [_open(columns, parent, at) for parent in parents[1:]]
        if new:
            yield GraphRow(_bridge(columns, sorted({at, *new}), glyphs, glyphs["split"], glyphs["new"]), None)
        _trim(columns)


def _trim(columns: list[str | None]) -> None:
    while columns and columns[-1] is None:
        columns.pop()


def _free(columns: list[str | None], after: int = -1) -> int:
    for i, waits in enumerate(columns):
        if waits is None and i > after:
            return i
    columns.append(None)
    return len(columns) - 1


def _open(columns: list[str | None], parent: str, after: int) -> int:
    at = _free(columns, after)
    columns[at] = parent
    return at


def _row(columns: Sequence[str | None], at: int, glyphs: dict[str, str]) -> str:
    cells = [glyphs["node"] if i == at else glyphs["pass"] if waits else " " for i, waits in enumerate(columns)]
    return " ".join(cells)


def _bridge(columns: Sequence[str | None], ends: Sequence[int], glyphs: dict[str, str], tee: str, last: str) -> str:
    """A horizontal line from the first of `ends` to the last, through the columns between."""
    out = ""
    for i, waits in enumerate(columns):
        inside = ends[0] < i < ends[-1]
        if i == ends[0]:
            out += glyphs["left"]
        elif i == ends[-1]:
            out += last
        elif i in ends:
            out += tee
        elif inside:
            out += glyphs["cross"] if waits else glyphs["over"]
        else:
            out += glyphs["pass"] if waits else " "
        out += glyphs["over"] if ends[0] <= i < ends[-1] else " "
    return out.rstrip()
