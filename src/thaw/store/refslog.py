"""refs.log: what became of refs since refs.json was written, a line a change, so that a commit rewrites no other ref.

A line names the refs.json that it follows by that file's digest, and the change that it follows by `since`: a log of
another refs.json says nothing, and refs.json is never older than such a log. It carries its own digest, and there is
one form of it. HEAD, settings and namespaces are not in it: a change of those writes refs.json, and then the log goes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import msgspec

from thaw.core.errors import CorruptBlob
from thaw.core.ids import digest
from thaw.data.files import read_own, storage_errors
from thaw.store import backup
from thaw.store.backup import Backup, NamespacedBackup
from thaw.store.refs import Ref, ReflogEntry, read_ref, read_whole_reflog
from thaw.store.settings import has_namespaces, number, required

NAME = "refs.log"
LINE_BYTES = 64 << 10
"""A change that would make a longer line is written as refs.json."""
_ZERO = "b3:" + "0" * 64
_AT = len('{"digest":"b3:')


class Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What changed from `since` to `sequence`. `moves`: the last number of the reflog, and `last` the checksum of its
    row; `rest`: see `rest_of`.

    `refs`: those that moved, as they stand; `gone`: names of deleted ones; `reflog`: new entries, newest first.
    """

    digest: str
    base: str
    since: int
    sequence: int
    moves: int
    last: str
    rest: str
    refs: tuple[Ref, ...]
    gone: tuple[str, ...]
    reflog: tuple[ReflogEntry, ...]


class End(msgspec.Struct, frozen=True):
    """How far refs.json and its log are: what the next line follows. Its fields are those of `Line`."""

    base: str
    sequence: int
    moves: int
    last: str
    rest: str


def end_after(line: Line) -> End:
    return End(line.base, line.sequence, line.moves, line.last, line.rest)


def encode(line: Line) -> bytes:
    blank = msgspec.json.encode(msgspec.structs.replace(line, digest=_ZERO)) + b"\n"
    return blank.replace(_ZERO.encode(), digest(blank).encode(), 1)


_DECODER = msgspec.json.Decoder(Line)


def _decode(data: bytes) -> Line | None:
    """The line that `encode` wrote; None for anything else."""
    zeroed = data[:_AT] + b"0" * 64 + data[_AT + 64 :]
    if digest(zeroed)[3:].encode() != data[_AT : _AT + 64]:
        return None
    try:
        line = _DECODER.decode(data)
        return line if encode(line) == data else None
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def parse(data: bytes, base: str) -> tuple[list[Line], bool]:
    """The lines of a log that follow the refs.json with the digest `base`, and whether that is all of it.

    A log of another refs.json has none, and is whole. What follows a line that does not verify is left out: it was
    being written when the power went, or it was changed.
    """
    lines: list[Line] = []
    for piece in data.splitlines(keepends=True) if data else ():
        line = _decode(piece)
        if line is None or (lines and (line.base != base or line.since != lines[-1].sequence)):
            return lines, False
        if line.base != base:
            return [], True
        lines.append(line)
    return lines, True


def read_bytes(folder: Path) -> bytes | None:
    """The log as it is; empty where there is none, None for what is no file. Raises `StorageFailed`."""
    path = folder / NAME
    with storage_errors(path, "read"):
        try:
            return read_own(path, backup.MAX_BYTES)
        except FileNotFoundError:
            return b""
        except CorruptBlob:
            return None
        except OSError as error:
            if error.errno in backup.NO_FILE:
                return None
            raise


def read(folder: Path) -> tuple[Backup | None, bool]:
    """refs.json brought up by its log, and whether all of the log could be read. None where there is no refs.json.

    Raises `CorruptDatabase` for a damaged refs.json, `StorageFailed`.
    """
    saved = backup.read(folder)
    data = read_bytes(folder)
    if saved is None or data is None:
        return saved, data is not None
    lines, whole = parse(data, saved.digest)
    if lines and lines[0].since != saved.sequence:
        return saved, False
    return brought_up(saved, lines), whole


def brought_up(saved: Backup, lines: Sequence[Line]) -> Backup:
    """The backup that `backup.collect` would have made after the last of `lines`; its `digest` is not that file's."""
    if not lines:
        return saved
    refs = {ref.name: ref for ref in saved.refs}
    reflog: list[ReflogEntry] = list(reversed(saved.reflog))
    for line in lines:
        refs.update({ref.name: ref for ref in line.refs})
        for name in line.gone:
            refs.pop(name, None)
        reflog.extend(reversed(line.reflog))
    newest = reflog[: -backup.REFLOG_ENTRIES - 1 : -1]
    lengths = accumulate(len(entry.reason) for entry in newest)
    return msgspec.structs.replace(
        saved,
        sequence=lines[-1].sequence,
        refs=tuple(refs[name] for name in sorted(refs)),
        reflog=tuple(entry for entry, length in zip(newest, lengths, strict=True) if length <= backup.REASONS),
    )


def rest_of(connection: sqlite3.Connection) -> str:
    """A digest of all that refs.json holds and a line does not."""
    rows = connection.execute("SELECT key FROM settings WHERE key LIKE 'user.%' ORDER BY key").fetchall()
    kind = NamespacedBackup if has_namespaces(connection) else Backup
    values = [(key, required(connection, key)) for key in ("uuid", "head", *(key for (key,) in rows))]
    return digest(msgspec.json.encode([kind.__struct_config__.tag, values]))


def end_of(connection: sqlite3.Connection, base: str) -> End:
    """How far a refs.json is that was written from this view of the database."""
    moves = number(connection, "moves")
    return End(base, number(connection, "sequence"), moves, _checksum(connection, moves), rest_of(connection))


def _checksum(connection: sqlite3.Connection, seq: int) -> str:
    """That of a row of the reflog; "" where there is none."""
    row = connection.execute("SELECT checksum FROM reflog WHERE seq = ?", (seq,)).fetchone()
    return "" if row is None else str(row[0])


def change(connection: sqlite3.Connection, end: End) -> Line | None:
    """The line that brings `end` up to the database; None where no line can, so that refs.json must be written.

    Raises `CorruptDatabase`.
    """
    now = end_of(connection, end.base)
    num = now.moves - end.moves
    if now.rest != end.rest or not 0 < num <= backup.REFLOG_ENTRIES or now.sequence <= end.sequence:
        return None
    if _checksum(connection, end.moves) != end.last:
        return None  # the database was made again, and counts otherwise
    reflog = read_whole_reflog(connection, limit=num)
    refs, gone = [], []
    for entry in _last(reflog):
        ref = _stands(connection, entry)
        if ref is None:
            gone.append(entry.name)
        else:
            refs.append(ref)
    return Line(
        digest="", base=end.base, since=end.sequence, sequence=now.sequence, moves=now.moves, last=now.last,
        rest=now.rest, refs=tuple(refs), gone=tuple(gone), reflog=tuple(reflog),
    )  # fmt: skip


def _last(reflog: Sequence[ReflogEntry]) -> Iterator[ReflogEntry]:
    """The newest move of each ref that moved."""
    seen = set[str]()
    for entry in reflog:
        if entry.moved and entry.name not in seen:
            seen.add(entry.name)
            yield entry


def _stands(connection: sqlite3.Connection, entry: ReflogEntry) -> Ref | None:
    """Where a ref stands after its last move. That a deleted one is not there is not looked for in the whole table."""
    found = connection.execute("SELECT 1 FROM refs WHERE name = ?", (entry.name,)).fetchone()
    return None if entry.new is None and found is None else read_ref(connection, entry.name)
