"""Branches and tags, moved by compare-and-swap, and the log of every move.

Branches and tags share one set of names. A row that fails its checksum, is another's or is missing raises
`CorruptDatabase`. A commit whose ref update lost the race is kept from gc by a reflog row with `moved` 0, which
`reflog` leaves out.

Here a ref of a namespace is called as in the tables, `@acme/main` (`thaw.core.namespaces`); messages say `main`.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import starmap
from typing import Literal, TypeAlias

import msgspec

from thaw.core.errors import CorruptDatabase, InvalidRequest, NotFound, RefConflict
from thaw.core.ids import CommitId, short
from thaw.core.namespaces import DEFAULT, bounds, check_qualified, qualify, split
from thaw.store.objects import read_namespace
from thaw.store.schema import checksum
from thaw.store.settings import REBUILD, admit_namespaces, number, set_setting

RefKind: TypeAlias = Literal["branch", "tag"]


class RefUpdate(msgspec.Struct, frozen=True):
    """Move `name` to `target` (None deletes it), if it stands at `expect` now (None: it must not exist; "any")."""

    name: str
    kind: RefKind
    target: CommitId | None
    expect: CommitId | Literal["any"] | None
    reason: str


class Ref(msgspec.Struct, frozen=True):
    name: str
    kind: RefKind
    target: CommitId


class ReflogEntry(msgspec.Struct, frozen=True):
    """`old` None: the ref was made; `new` None: it was deleted. `moved` False: a commit kept after a lost race."""

    name: str
    old: CommitId | None
    new: CommitId | None
    reason: str
    time_ns: int
    kind: RefKind = "branch"
    moved: bool = True


CACHED = 1 << 14
"""Rows of refs that are remembered as checked, about half a KiB each."""
_REF = "SELECT name, kind, target, checksum FROM refs"


def read_ref(connection: sqlite3.Connection, name: str) -> Ref | None:
    row = connection.execute(f"{_REF} WHERE name = ?", (name,)).fetchone()
    if row is None:
        _require_absent(connection, name)
        return None
    ref = _ref(*row)
    if ref.name != name:
        raise CorruptDatabase(f"the index of refs gives another row for {name[:80]!r}. {REBUILD}")
    return ref


def _require_absent(connection: sqlite3.Connection, name: str) -> None:
    """What the index does not find is looked for in the table itself, and the table counted."""
    query = "SELECT count(*), coalesce(sum(name = ?), 0) FROM refs NOT INDEXED"
    rows, found = connection.execute(query, (name,)).fetchone()
    if found or rows != number(connection, "refs"):
        raise CorruptDatabase(f"refs has {rows} rows, {name[:80]!r} {found} times; its index finds none. {REBUILD}")


def read_refs(connection: sqlite3.Connection, kind: str | None = None) -> list[Ref]:
    """All refs of a kind (None: both), by name."""
    found = [_ref(*row) for row in connection.execute(f"{_REF} NOT INDEXED").fetchall()]
    if len({ref.name for ref in found}) != number(connection, "refs"):
        raise CorruptDatabase(f"refs has {len(found)} rows; there were {number(connection, 'refs')}. {REBUILD}")
    return sorted((ref for ref in found if kind in (None, ref.kind)), key=lambda ref: ref.name)


def read_refs_of(connection: sqlite3.Connection, namespace: str, kind: str | None = None) -> list[Ref]:
    """The refs of one namespace by name, as they are called in it. Whole, as `read_refs`, and of the others it reads
    nothing but how many rows there are."""
    if namespace == DEFAULT:
        return [ref for ref in read_refs(connection, kind) if split(ref.name)[0] == DEFAULT]
    query = f"{_REF} NOT INDEXED WHERE name >= ? AND name < ?"
    found = [_ref(*row) for row in connection.execute(query, bounds(namespace)).fetchall()]
    (rows,) = connection.execute("SELECT count(*) FROM refs NOT INDEXED").fetchone()
    if rows != number(connection, "refs"):
        raise CorruptDatabase(f"refs has {rows} rows; there were {number(connection, 'refs')}. {REBUILD}")
    return sorted((bare(ref) for ref in found if kind in (None, ref.kind)), key=lambda ref: ref.name)


def bare(ref: Ref) -> Ref:
    """A ref as it is called in its namespace."""
    return Ref(split(ref.name)[1], ref.kind, ref.target)


def read_namespaces(connection: sqlite3.Connection) -> list[str]:
    """Those that have a ref or had one, the default one left out."""
    names = connection.execute("SELECT name FROM reflog_ends WHERE name >= '@' AND name < 'A'").fetchall()
    return sorted({split(name)[0] for (name,) in names})


def read_refs_at(connection: sqlite3.Connection, targets: Iterable[str]) -> list[Ref]:
    """Refs that name one of these commits, by name; reads no others, so two indexes must say the same of them."""
    targets = list(targets)
    first, second = (
        {row for one in targets for row in connection.execute(f"{_REF} INDEXED BY {index} WHERE target = ?", (one,))}
        for index in ("refs_target", "refs_target_name")
    )
    if first != second:
        raise CorruptDatabase(f"the indexes of refs by target do not agree. {REBUILD}")
    return sorted(starmap(_ref, first), key=lambda ref: ref.name)


@lru_cache(maxsize=CACHED, typed=True)
def _ref(name: str, kind: RefKind, target: str, said: str) -> Ref:
    """What a row says. Those that were checked are remembered: refs.json and lists of refs read all of them."""
    if said != checksum("refs", name, kind, target):
        raise CorruptDatabase(f"the row of {str(name)[:80]!r} in refs does not match its checksum. {REBUILD}")
    return Ref(name, kind, CommitId(target))


_LOG = "SELECT seq, before, name, kind, old, new, reason, time_ns, moved, checksum FROM reflog"


def read_reflog(connection: sqlite3.Connection, name: str, *, kept: bool = False) -> Iterator[ReflogEntry]:
    """Moves of `name`, newest first, read as they are asked for; with `kept` also the commits kept after lost races."""
    seq = _end(connection, name)
    if not seq and connection.execute("SELECT 1 FROM reflog WHERE name = ?", (name,)).fetchone() is not None:
        raise CorruptDatabase(f"the reflog of {name[:80]!r} has lost its end. {REBUILD}")
    while seq:
        row = connection.execute(f"{_LOG} WHERE seq = ?", (seq,)).fetchone()
        entry = _entry(row, seq)
        if entry.name != name or row[1] >= seq:
            raise CorruptDatabase(f"row {seq} of reflog is in the chain of {name[:80]!r} but is not of it. {REBUILD}")
        if entry.moved or kept:
            yield entry
        seq = row[1]


def read_whole_reflog(
    connection: sqlite3.Connection, *, since_ns: int = 0, limit: int | None = None
) -> list[ReflogEntry]:
    """Entries of all refs since a time, newest first; with `limit` no more are read."""
    last = number(connection, "moves")
    rows = connection.execute(f"{_LOG} ORDER BY seq DESC LIMIT ?", (last if limit is None else limit,)).fetchall()
    if len(rows) != (last if limit is None else min(last, limit)):
        raise CorruptDatabase(f"reflog has {len(rows)} rows of {last}. {REBUILD}")
    entries = [_entry(row, last - i) for i, row in enumerate(rows)]
    return [entry for entry in entries if entry.time_ns >= since_ns]


def _entry(row: tuple[int, int, str, RefKind, str | None, str | None, str, int, int, str], seq: int) -> ReflogEntry:
    """The entry in a row, which must be number `seq`."""
    if row is None or row[0] != seq or row[9] != checksum("reflog", *row[:9]):
        raise CorruptDatabase(f"row {seq} of reflog is missing or does not match its checksum. {REBUILD}")
    old, new = (None if value is None else CommitId(value) for value in row[4:6])
    return ReflogEntry(row[2], old, new, row[6], row[7], row[3], bool(row[8]))


def _end(connection: sqlite3.Connection, name: str) -> int:
    """The number of the last entry of `name`; 0 when there is none."""
    row = connection.execute("SELECT name, seq, checksum FROM reflog_ends WHERE name = ?", (name,)).fetchone()
    if row is None:
        return 0
    if row[0] != name or row[2] != checksum("reflog_ends", *row[:2]):
        raise CorruptDatabase(f"the row of {name[:80]!r} in reflog_ends does not match its checksum. {REBUILD}")
    return int(row[1])


def log_moves(connection: sqlite3.Connection, entries: Iterable[ReflogEntry]) -> None:
    """Adds entries to the reflog, oldest first."""
    ends: dict[str, int] = {}
    last = number(connection, "moves")
    for seq, entry in enumerate(entries, last + 1):
        before = ends[entry.name] if entry.name in ends else _end(connection, entry.name)
        row = (
            seq, before, entry.name, entry.kind, entry.old, entry.new, entry.reason, entry.time_ns, int(entry.moved)
        )  # fmt: skip
        connection.execute("INSERT INTO reflog VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, checksum("reflog", *row)))
        ends[entry.name] = last = seq
    connection.executemany(
        "INSERT OR REPLACE INTO reflog_ends VALUES (?, ?, ?)",
        [(name, end, checksum("reflog_ends", name, end)) for name, end in ends.items()],
    )
    set_setting(connection, "moves", str(last))


def write_ref(connection: sqlite3.Connection, ref: Ref) -> None:
    """Makes the ref or moves it."""
    before = read_ref(connection, ref.name)
    row = (ref.name, ref.kind, ref.target)
    connection.execute(
        "INSERT OR REPLACE INTO refs (name, kind, target, checksum) VALUES (?, ?, ?, ?)", (*row, checksum("refs", *row))
    )
    if before is None:
        _count(connection, +1)


def remove_ref(connection: sqlite3.Connection, name: str) -> None:
    connection.execute("DELETE FROM refs WHERE name = ?", (name,))
    _count(connection, -1)


def _count(connection: sqlite3.Connection, more: int) -> None:
    set_setting(connection, "refs", str(number(connection, "refs") + more))


def bump_sequence(connection: sqlite3.Connection) -> int:
    """Counts a change of refs, reflog or settings: what tells whether database or backup is newer."""
    sequence = number(connection, "sequence") + 1
    set_setting(connection, "sequence", str(sequence))
    return sequence


def qualified(updates: Iterable[RefUpdate], namespace: str) -> list[RefUpdate]:
    """`updates` of a namespace as the tables call its refs. Raises `BadPoint`."""
    return [msgspec.structs.replace(update, name=qualify(namespace, update.name)) for update in updates]


def apply(connection: sqlite3.Connection, updates: Sequence[RefUpdate]) -> None:
    """All of `updates` in the running transaction. On `RefConflict`, `NotFound`, `BadPoint` the caller rolls back."""
    for update in updates:
        _apply(connection, update)
    if updates:
        bump_sequence(connection)


def _apply(connection: sqlite3.Connection, update: RefUpdate) -> None:
    namespace, name = split(check_qualified(update.name))
    if namespace != DEFAULT:
        admit_namespaces(connection)
    current = read_ref(connection, update.name)
    if current is not None and current.kind != update.kind:
        raise InvalidRequest(f"{name!r} is a {current.kind} already; choose another name for the {update.kind}.")
    old = None if current is None else current.target
    if update.expect not in ("any", old):
        raise RefConflict(_conflict(update, old))
    if update.target is None:
        if current is None:
            raise NotFound(f"there is no {update.kind} {name!r} to delete.")
        remove_ref(connection, update.name)
    else:
        require_commit(connection, update.target, namespace)
        write_ref(connection, Ref(update.name, update.kind, update.target))
    log_moves(connection, [ReflogEntry(update.name, old, update.target, update.reason, time.time_ns(), update.kind)])


def keep(connection: sqlite3.Connection, updates: Sequence[RefUpdate]) -> None:
    """Keeps the targets of updates that lost their race: gc sees them in the reflog."""
    now = time.time_ns()
    log_moves(
        connection,
        [
            ReflogEntry(update.name, None, update.target, f"kept: {update.reason}", now, update.kind, moved=False)
            for update in updates
            if update.target is not None
        ],
    )
    bump_sequence(connection)


def require_commit(connection: sqlite3.Connection, target: str, namespace: str) -> None:
    """That `target` is a commit of this namespace; of others it says what it says of one that is not stored."""
    row = connection.execute("SELECT 1 FROM objects WHERE id = ? AND kind = 'commit'", (target,)).fetchone()
    if row is None or read_namespace(connection, target) != namespace:
        raise NotFound(f"there is no commit {target[:80]} in this repository; a ref can only name a stored commit.")


def _conflict(update: RefUpdate, old: str | None) -> str:
    name, expect = split(update.name)[1], update.expect
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
