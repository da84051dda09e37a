"""Marking: what the roots reach. Fails closed: an object that is missing or damaged stops it.

Roots are refs, reflog entries within the limit (old and new), and what live leases name.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from thaw.core.errors import CorruptBlob, CorruptDatabase
from thaw.store import leases, shallow
from thaw.store.links import Links, links
from thaw.store.objects import verified
from thaw.store.refs import read_refs, read_whole_reflog
from thaw.store.settings import number

UPKEEP = "gc removes nothing from a damaged repository. Run `thaw fsck`."


class Reachable:
    """Reached objects and blobs; `homes`: for each reached segment, the reached state that uses most of it.

    `objects` may be added to later, against a newer view of the database.
    """

    def __init__(self) -> None:
        self.objects: set[str] = set()
        self.blobs: set[str] = set()
        self.homes: dict[str, tuple[int, str]] = {}
        """segment -> (tokens used, state)"""
        self.last_seq = 0
        self.sequence = -1
        """What the view that was marked last had seen: objects, changes of refs."""

    def mark(self, connection: sqlite3.Connection, roots: Iterable[str]) -> None:
        """Adds everything that `roots` reach; where history was fetched no further, it ends."""
        absent = shallow.read(connection)
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
            if of.kind == "segments":
                self._home(of, state)
            pending.extend((linked, state) for linked in of.without(absent))

    def _home(self, node: Links, state: str) -> None:
        for segment, length in zip(node.objects, node.lengths, strict=True):
            if state and length > self.homes.get(segment, (0, ""))[0]:
                self.homes[segment] = (length, state)

    def homed(self) -> list[tuple[str, str]]:
        """(segment, state) of every reached segment that a reached state uses."""
        return [(segment, state) for segment, (_, state) in self.homes.items()]


def read_links(connection: sqlite3.Connection, identifier: str) -> Links:
    """The links of a stored object, its bytes verified first. Raises `CorruptDatabase`, `NewerFormat`."""
    row = connection.execute("SELECT data FROM objects WHERE id = ?", (identifier,)).fetchone()
    if row is None:
        raise CorruptDatabase(f"object {identifier} is needed but not stored. {UPKEEP}")
    try:
        return links(verified(row[0], identifier), f"object {identifier}")
    except CorruptBlob as error:
        raise CorruptDatabase(f"{error} {UPKEEP}") from None


def _named(connection: sqlite3.Connection, reflog_since_ns: int) -> set[str]:
    """What must stay by refs and reflog; what the reflog names and is not stored any more is left out."""
    found: set[str] = set()
    for entry in read_whole_reflog(connection, since_ns=reflog_since_ns):
        found.update(commit for commit in (entry.old, entry.new) if commit is not None)
    return _stored(connection, found) | {ref.target for ref in read_refs(connection)}


def _leased(connection: sqlite3.Connection) -> set[str]:
    return _stored(connection, {root for lease in leases.split(connection)[0] for root in lease.roots})


def _stored(connection: sqlite3.Connection, found: set[str]) -> set[str]:
    return {row[0] for one in found for row in connection.execute("SELECT id FROM objects WHERE id = ?", (one,))}


def mark_all(connection: sqlite3.Connection, reflog_since_ns: int) -> Reachable:
    """Marks from the roots in one view of the database."""
    marks = Reachable()
    catch_up(connection, marks, reflog_since_ns)
    return marks


def catch_up(connection: sqlite3.Connection, marks: Reachable, reflog_since_ns: int) -> None:
    """Brings `marks` up to a newer view: roots as they are now, and every object stored since."""
    first = marks.sequence < 0
    sequence, seq = number(connection, "sequence"), last_seq(connection)
    if sequence != marks.sequence:
        marks.mark(connection, _named(connection, reflog_since_ns))
    marks.mark(connection, _leased(connection))
    if not first:
        newer = connection.execute("SELECT id FROM objects WHERE seq > ?", (marks.last_seq,)).fetchall()
        marks.mark(connection, [row[0] for row in newer])
    marks.sequence, marks.last_seq = sequence, seq


def last_seq(connection: sqlite3.Connection) -> int:
    (last,) = connection.execute("SELECT coalesce(max(seq), 0) FROM objects").fetchone()
    if not isinstance(last, int):
        raise CorruptDatabase(f"objects has a row numbered {str(last)[:40]!r}. {UPKEEP}")
    return last
