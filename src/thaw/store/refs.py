"""Branches and tags, moved by compare-and-swap, and the log of every move.

Branches and tags share one set of names. A row that fails its checksum raises `CorruptDatabase`. A commit whose ref
update lost the race is kept from gc by a reflog row with `moved` 0, which `reflog` leaves out.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from thaw.core.errors import CorruptDatabase, InvalidRequest, NotFound, RefConflict
from thaw.core.ids import CommitId, short
from thaw.core.points import check_name
from thaw.store.db import REBUILD, set_setting, setting
from thaw.store.schema import checksum

RefKind: TypeAlias = Literal["branch", "tag"]


@dataclass(frozen=True)
class RefUpdate:
    """Move `name` to `target` (None deletes it), if it stands at `expect` now (None: it must not exist; "any")."""

    name: str
    kind: RefKind
    target: CommitId | None
    expect: CommitId | Literal["any"] | None
    reason: str


@dataclass(frozen=True)
class Ref:
    name: str
    kind: RefKind
    target: CommitId


@dataclass(frozen=True)
class ReflogEntry:
    """`old` None: the ref was made; `new` None: it was deleted. `moved` False: a commit kept after a lost race."""

    name: str
    old: CommitId | None
    new: CommitId | None
    reason: str
    time_ns: int
    kind: RefKind = "branch"
    moved: bool = True


def read_ref(connection: sqlite3.Connection, name: str) -> Ref | None:
    row = connection.execute("SELECT name, kind, target, checksum FROM refs WHERE name = ?", (name,)).fetchone()
    return None if row is None else _ref(row)


def read_refs(connection: sqlite3.Connection, kind: str | None = None) -> list[Ref]:
    """All refs of a kind (None: both), by name."""
    rows = connection.execute("SELECT name, kind, target, checksum FROM refs ORDER BY name").fetchall()
    return [ref for ref in map(_ref, rows) if kind in (None, ref.kind)]


def _ref(row: tuple[str, RefKind, str, str]) -> Ref:
    if row[3] != checksum("refs", *row[:3]):
        raise CorruptDatabase(f"the row of {str(row[0])[:80]!r} in refs does not match its checksum. {REBUILD}")
    return Ref(row[0], row[1], CommitId(row[2]))


_LOG = "SELECT name, kind, old, new, reason, time_ns, moved, checksum FROM reflog"


def read_reflog(connection: sqlite3.Connection, name: str, *, kept: bool = False) -> list[ReflogEntry]:
    """Moves of `name`, newest first; with `kept` also the commits kept after lost races."""
    rows = connection.execute(f"{_LOG} WHERE name = ? ORDER BY seq DESC", (name,)).fetchall()
    return [entry for entry in map(_entry, rows) if entry.moved or kept]


def read_whole_reflog(connection: sqlite3.Connection, *, since_ns: int = 0, limit: int = -1) -> list[ReflogEntry]:
    """Entries of all refs since a time, newest first."""
    query = f"{_LOG} WHERE time_ns >= ? ORDER BY seq DESC LIMIT ?"
    return [_entry(row) for row in connection.execute(query, (since_ns, limit)).fetchall()]


def _entry(row: tuple[str, RefKind, str | None, str | None, str, int, int, str]) -> ReflogEntry:
    if row[7] != checksum("reflog", *row[:7]):
        raise CorruptDatabase(f"a row of {str(row[0])[:80]!r} in reflog does not match its checksum. {REBUILD}")
    old, new = (None if value is None else CommitId(value) for value in row[2:4])
    return ReflogEntry(row[0], old, new, row[4], row[5], row[1], bool(row[6]))


def log_move(connection: sqlite3.Connection, entry: ReflogEntry) -> None:
    row = (entry.name, entry.kind, entry.old, entry.new, entry.reason, entry.time_ns, int(entry.moved))
    connection.execute(
        "INSERT INTO reflog (name, kind, old, new, reason, time_ns, moved, checksum) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (*row, checksum("reflog", *row)),
    )


def write_ref(connection: sqlite3.Connection, ref: Ref) -> None:
    row = (ref.name, ref.kind, ref.target)
    connection.execute(
        "INSERT OR REPLACE INTO refs (name, kind, target, checksum) VALUES (?, ?, ?, ?)", (*row, checksum("refs", *row))
    )


def bump_sequence(connection: sqlite3.Connection) -> int:
    """Counts a change of refs, reflog or settings: what tells whether database or backup is newer."""
    sequence = int(setting(connection, "sequence") or "0") + 1
    set_setting(connection, "sequence", str(sequence))
    return sequence


def apply(connection: sqlite3.Connection, updates: Sequence[RefUpdate]) -> None:
    """All of `updates` in the running transaction. On `RefConflict`, `NotFound`, `BadPoint` the caller rolls back."""
    for update in updates:
        _apply(connection, update)
    if updates:
        bump_sequence(connection)


def _apply(connection: sqlite3.Connection, update: RefUpdate) -> None:
    check_name(update.name)
    current = read_ref(connection, update.name)
    if current is not None and current.kind != update.kind:
        raise InvalidRequest(f"{update.name!r} is a {current.kind} already; choose another name for the {update.kind}.")
    old = None if current is None else current.target
    if update.expect not in ("any", old):
        raise RefConflict(_conflict(update, old))
    if update.target is None:
        if current is None:
            raise NotFound(f"there is no {update.kind} {update.name!r} to delete.")
        connection.execute("DELETE FROM refs WHERE name = ?", (update.name,))
    else:
        require_commit(connection, update.target)
        write_ref(connection, Ref(update.name, update.kind, update.target))
    log_move(connection, ReflogEntry(update.name, old, update.target, update.reason, time.time_ns(), update.kind))


def keep(connection: sqlite3.Connection, updates: Sequence[RefUpdate]) -> None:
    """Keeps the targets of updates that lost their race: gc sees them in the reflog."""
    for update in updates:
        if update.target is not None:
            reason = f"kept: {update.reason}"
            now = time.time_ns()
            log_move(connection, ReflogEntry(update.name, None, update.target, reason, now, update.kind, moved=False))
    bump_sequence(connection)


def require_commit(connection: sqlite3.Connection, target: str) -> None:
    if connection.execute("SELECT 1 FROM objects WHERE id = ? AND kind = 'commit'", (target,)).fetchone() is None:
        raise NotFound(f"there is no commit {target[:80]} in this repository; a ref can only name a stored commit.")


def _conflict(update: RefUpdate, old: str | None) -> str:
    name, expect = update.name, update.expect
    if expect is None:
        there = f"{update.kind} {name!r} exists already, at {short(old or '')}."
        return f"{there} Choose another name, or move it on purpose."
    stands = f"stands at {short(old)}" if old else "does not exist any more"
    text = f"{update.kind} {name!r} {stands}; {short(expect)} was expected: somebody else moved it."
    if update.target is None:
        return f"{text} Look at it, then delete it again."
    return (
        f"{text} Your commit {short(update.target)} is kept: give it a branch of its own "
        f"(thaw branch NAME {short(update.target)}), or go on from {name!r} as it is now."
    )
