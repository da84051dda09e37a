"""`thaw reflog`: where a branch pointed, move by move."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from thaw.cli import light, output, place, view, words

if TYPE_CHECKING:
    from thaw.store import ReflogEntry

EXAMPLE = """
thaw reflog
thaw reflog idea -n 5
"""


@light.verb(
    "reflog", EXAMPLE, light.Argument("name"), light.LightNumber("limit", ("-n",), int, 1, "Show at most N moves.")
)
def command(named: str | None, name: str | None, limit: int | None, as_json: bool) -> None:
    """List the moves of a branch or tag (default: the current branch), newest first. Deleted names keep their moves.

    Each line shows the point, the commit, what moved it, and its age.
    """
    with place.open_repository(named) as repo:
        name = name or repo.store.head
        entries = list(_pointed(name, repo.reflog(name, limit=limit)))
    if as_json:
        output.print_json({"name": name, "moves": [_plain(point, entry) for point, entry in entries]})
    elif not entries:
        output.note(f"{name} has no moves.")
    else:
        output.rows([_row(point, entry) for point, entry in entries])


def _pointed(name: str, entries: list[ReflogEntry]) -> Iterator[tuple[str | None, ReflogEntry]]:
    """Each move with the point that names where it went to."""
    back = 0
    for entry in entries:
        yield (f"{name}@{{{back}}}" if entry.new is not None else None), entry
        back += entry.old is not None


def _row(point: str | None, entry: ReflogEntry) -> tuple[str, ...]:
    where = view.commit_id(entry.new) if entry.new is not None else "deleted"
    return point or "", where, output.style(words.age(entry.time_ns), "dim"), output.one_line(entry.reason, 70)


def _plain(point: str | None, entry: ReflogEntry) -> dict[str, object]:
    return {
        "point": point, "kind": entry.kind, "old": entry.old, "new": entry.new, "reason": entry.reason,
        "time_ns": str(entry.time_ns),
    }  # fmt: skip
