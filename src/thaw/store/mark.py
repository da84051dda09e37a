"""Marking: what the roots reach. Fails closed: an object that is missing or damaged stops it.

Roots are refs, reflog entries within the limit (old and new), and what live leases name.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from thaw.core.errors import CorruptDatabase
from thaw.core.ids import digest
from thaw.store import leases
from thaw.store.links import Links, links
from thaw.store.refs import read_refs, read_whole_reflog

_UPKEEP = "gc removes nothing from a damaged repository. Run `thaw fsck`."


class Marks:
    """Reached objects and blobs; `homes`: for each reached segment, the reached state that uses most of it.

    `objects` may be added to later, against a newer view of the database.
    """

    def __init__(self) -> None:
        self.objects: set[str] = set()
        self.blobs: set[str] = set()
        self.homes: dict[str, tuple[int, str]] = {}
        """segment -> (tokens used, state)"""
        self.last_seq = 0
        self._windows: dict[str, str] = {}

    def mark(self, connection: sqlite3.Connection, roots: Iterable[str]) -> None:
        """Adds everything that `roots` reach."""
        pending = [(root, "") for root in roots]
        while pending:
            identifier, state = pending.pop()
            if identifier in self.objects:
                continue
            of = read_links(connection, identifier)
            self.objects.add(identifier)
            self.blobs.update(of.blobs)
            if of.kind == "state":
                state = identifier
            if of.kind == "segment":
                self._windows[identifier] = of.window
            if of.kind == "segments":
                self._home(of, state)
            pending.extend((linked, state) for linked in of.objects)

    def _home(self, node: Links, state: str) -> None:
        for segment, length in zip(node.objects, node.lengths, strict=True):
            if state and length > self.homes.get(segment, (0, ""))[0]:
                self.homes[segment] = (length, state)

    def homed(self) -> list[tuple[str, str, str]]:
        """(segment, window, state) of every reached segment that a reached state uses."""
        return [
            (segment, self._windows[segment], state)
            for segment, (_, state) in self.homes.items()
            if segment in self._windows
        ]


def read_links(connection: sqlite3.Connection, identifier: str) -> Links:
    """The links of a stored object, its bytes verified first. Raises `CorruptDatabase`."""
    row = connection.execute("SELECT data FROM objects WHERE id = ?", (identifier,)).fetchone()
    if row is None:
        raise CorruptDatabase(f"object {identifier} is needed but not stored. {_UPKEEP}")
    data = row[0]
    if not isinstance(data, bytes) or digest(data) != identifier:
        raise CorruptDatabase(f"object {identifier} does not match its hash. {_UPKEEP}")
    return links(data)


def roots(connection: sqlite3.Connection, reflog_since_ns: int) -> set[str]:
    """What must stay, by refs, reflog and live leases; names of objects that are not stored (any more) are left out
    for reflog and leases, but not for refs."""
    found: set[str] = set()
    for entry in read_whole_reflog(connection, since_ns=reflog_since_ns):
        found.update(commit for commit in (entry.old, entry.new) if commit is not None)
    for lease in leases.split(connection)[0]:
        found.update(lease.roots)
    stored = {row[0] for root in found for row in connection.execute("SELECT id FROM objects WHERE id = ?", (root,))}
    return stored | {ref.target for ref in read_refs(connection)}


def mark_all(connection: sqlite3.Connection, reflog_since_ns: int) -> Marks:
    """Marks from the roots in one view of the database, and remembers the last object it saw."""
    marks = Marks()
    marks.mark(connection, roots(connection, reflog_since_ns))
    marks.last_seq = last_seq(connection)
    return marks


def catch_up(connection: sqlite3.Connection, marks: Marks, reflog_since_ns: int) -> None:
    """Brings `marks` up to a newer view: roots as they are now, and every object stored since."""
    newer = connection.execute("SELECT id FROM objects WHERE seq > ?", (marks.last_seq,)).fetchall()
    marks.mark(connection, roots(connection, reflog_since_ns) | {row[0] for row in newer})


def last_seq(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT coalesce(max(seq), 0) FROM objects").fetchone()[0])
