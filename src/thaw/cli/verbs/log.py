"""`thaw log`: commits, one line each, newest first; with --graph as a tree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from thaw.cli import light, output, place, view, words
from thaw.core.ids import short

if TYPE_CHECKING:
    from thaw.repo.log import LogEntry

EXAMPLE = """
thaw log --graph --all
thaw log main~3 -n 5
"""
ROOM = 60
"""Columns for the policies of a commit's KV."""


@light.verb(
    "log",
    EXAMPLE,
    light.Argument("point"),
    light.Flag("as_graph", ("--graph",), "Draw the commits as a tree."),
    light.Flag("everything", ("--all",), "Start from every branch and tag, not from one point."),
    light.LightNumber("limit", ("-n",), int, 1, "Show at most N commits."),
)
def command(
    named: str | None, point: str | None, as_graph: bool, everything: bool, limit: int | None, as_json: bool
) -> None:
    """List the commits from POINT (default: the current branch), newest first.

    Each line shows the id, the names that point at it, the message, tokens and age; on models with recurrent layers
    also how many states are kept, and their bytes; where KV was kept over a policy step, which policies computed it.
    A commit is "shallow" where the one before it was not fetched.
    """
    entries = _read(named, point, everything, limit)
    if as_json:
        output.print_json({"commits": [view.plain_entry(entry) for entry in entries]})
    elif not entries:
        output.note(_nothing(named))
    else:
        for line in _lines(entries, as_graph):
            output.line(line)


def _nothing(named: str | None) -> str:
    from thaw.remote import settings

    with place.open_repository(named) as repo:
        waiting = sorted(settings.promised(repo.store))
    if not waiting:
        return "no commits yet. `thaw run` creates the first one."
    return f"nothing was fetched yet of {', '.join(waiting[:8])}. `thaw pull` brings the current branch here."


def _read(named: str | None, point: str | None, everything: bool, limit: int | None) -> list[LogEntry]:
    if everything and point is not None:
        raise light.usage("--all starts from every branch and tag; leave out POINT.")
    with place.open_repository(named) as repo:
        return repo.log(point, all=everything, limit=limit)


def _lines(entries: list[LogEntry], as_graph: bool) -> Iterator[str]:
    by_id = {str(entry.commit): entry for entry in entries}
    if not as_graph:
        yield from (_line(entry, 0) for entry in entries)
        return
    from thaw.cli import graph

    glyphs = graph.UNICODE if output.has_unicode() else graph.ASCII
    for row in graph.draw(((str(e.commit), tuple(map(str, e.parents))) for e in entries), glyphs):
        gutter = output.style(row.gutter, "blue")
        if row.id is None:
            yield gutter
        else:
            yield f"{gutter}{' ' if gutter else ''}{_line(by_id[row.id], len(row.gutter) + 1 if gutter else 0)}"


def _line(entry: LogEntry, used: int) -> str:
    """One commit in what is left of the width; the message gives way first."""
    names = ", ".join(entry.refs)
    kept = f", {view.few_states(entry.points, entry.state_nbytes)}" if entry.state_nbytes else ""
    ends = ", shallow" if entry.shallow else ""
    old = f", KV of {view.kv_by_policy(entry.kv_ranges, ROOM)}" if entry.kv_ranges else ""
    tail = f"{entry.num_tokens:,} tokens{kept}{old}, {words.age(entry.time_ns)}{ends}"
    room = output.width() - used - 10 - 2 - len(tail) - 2 - (len(names) + 3 if names else 0)
    message = output.one_line(entry.message, max(room, 12))
    shown = f"({output.style(names, 'bold', 'green')}) " if names else ""
    return f"{output.style(short(entry.commit), 'yellow')} {shown}{message}  {output.style(tail, 'dim')}"
