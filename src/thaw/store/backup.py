"""refs.json: branches, tags, HEAD, recent reflog and settings beside the database, for the day it is lost.

Written atomically and synced, from one view of the database; it carries its own digest. Between two writes of it,
refs.log says what changed (see `thaw.store.refslog`, and `thaw.store.saving` for when it is written).
"""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from itertools import accumulate
from pathlib import Path

import msgspec

from thaw.core.errors import CorruptBlob, CorruptDatabase, NewerFormat, StorageFailed
from thaw.core.ids import digest
from thaw.data.files import make_way, read_own, storage_errors, write_atomic
from thaw.store.refs import Ref, ReflogEntry, read_refs, read_whole_reflog
from thaw.store.settings import has_namespaces, number, required

NAME = "refs.json"
REFLOG_ENTRIES = 200
REASONS = 1 << 20
"""Characters of the reasons of all entries."""
MAX_BYTES = 64 << 20
NO_FILE = (errno.EISDIR, errno.ELOOP, errno.ENXIO)
"""What opening says of something in its place that is no file."""


class Backup(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="thaw.refs/1", forbid_unknown_fields=True
):
    """What refs.json holds; `reflog` newest first. `digest` is of the file with the digest's own digits as zeros."""

    digest: str
    sequence: int
    uuid: str
    head: str
    refs: tuple[Ref, ...]
    reflog: tuple[ReflogEntry, ...]
    settings: dict[str, str]


class NamespacedBackup(Backup, frozen=True, kw_only=True, tag="thaw.refs/2"):
    """Of a repository that has namespaces: refs, reflog and settings of all of them, called as in the tables."""


_DIGEST = b'\n "digest": "b3:'
_ZERO = "b3:" + "0" * 64
_KNOWN = tuple(f'{{\n "type": "thaw.refs/{version}"'.encode() for version in (1, 2))


def encode(backup: Backup) -> bytes:
    blank = msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(backup, digest=_ZERO)), indent=1) + b"\n"
    return blank.replace(_ZERO.encode(), digest(blank).encode(), 1)


_DECODER: msgspec.json.Decoder[Backup | NamespacedBackup] = msgspec.json.Decoder(Backup | NamespacedBackup)


def decode(data: bytes) -> Backup:
    """The backup in `data`. Raises `CorruptDatabase` for anything that `encode` would not have written."""
    _check_digest(data)
    try:
        backup = _DECODER.decode(data)
        again = encode(backup)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        if data.startswith(b'{\n "type": "thaw.refs/') and not data.startswith(_KNOWN):
            raise NewerFormat(f"{NAME} was written by a newer thaw. Upgrade thaw to read it.") from None
        raise CorruptDatabase(f"{NAME} is not readable: {error}") from None
    if again != data:
        raise CorruptDatabase(f"{NAME} is not in the form in which thaw writes it")
    return backup


def _check_digest(data: bytes) -> None:
    """Before anything else is believed, the version too: every format has its digest in this place and form."""
    start = data.find(_DIGEST) + len(_DIGEST)
    zeroed = data[:start] + b"0" * 64 + data[start + 64 :]
    if start < len(_DIGEST) or digest(zeroed)[3:].encode() != data[start : start + 64]:
        raise CorruptDatabase(f"{NAME} does not match its own digest; it was changed after it was written")


def read(folder: Path) -> Backup | None:
    """The backup of a repository; None when there is none. Raises `CorruptDatabase`, `StorageFailed`."""
    path = folder / NAME
    with storage_errors(path, "read"):
        try:
            data = read_own(path, MAX_BYTES)
        except FileNotFoundError:
            return None
        except CorruptBlob as error:
            raise CorruptDatabase(f"{NAME} is not readable: {error}") from None
        except OSError as error:
            if error.errno in NO_FILE:
                raise CorruptDatabase(f"{NAME} is not readable: {error.strerror}") from None
            raise
    return decode(data)


def collect(connection: sqlite3.Connection) -> Backup:
    """The backup that matches the database as `connection` sees it."""
    rows = connection.execute("SELECT key FROM settings WHERE key LIKE 'user.%' ORDER BY key").fetchall()
    kind = NamespacedBackup if has_namespaces(connection) else Backup
    return kind(
        digest=_ZERO,
        sequence=number(connection, "sequence"),
        uuid=required(connection, "uuid"),
        head=required(connection, "head"),
        refs=tuple(read_refs(connection)),
        reflog=_recent(connection),
        settings={key: required(connection, key) for (key,) in rows},
    )


def _recent(connection: sqlite3.Connection) -> tuple[ReflogEntry, ...]:
    """The last moves of refs, newest first: as many as are to be kept here, reasons of any length taken together."""
    entries = read_whole_reflog(connection, limit=REFLOG_ENTRIES)
    lengths = accumulate(len(entry.reason) for entry in entries)
    return tuple(entry for entry, length in zip(entries, lengths, strict=True) if length <= REASONS)


def write_bytes(folder: Path, data: bytes) -> None:
    """Replaces refs.json by what `encode` made, atomically and synced. Raises `StorageFailed`; then the old one is
    still there."""
    if len(data) > MAX_BYTES:
        raise StorageFailed(
            f"{NAME} would have {len(data):,} bytes, and no more than {MAX_BYTES:,} are read again. Delete "
            "branches that nobody needs, or make settings smaller; until then it stays as it was."
        )
    path = folder / NAME
    with storage_errors(path, "write"):
        if path.is_dir():
            make_way(path)
    write_atomic(path, data)


def digest_of(data: bytes) -> str:
    """The digest that a backup says it has, in the first bytes of it; "" where there is none."""
    start = data.find(_DIGEST) + len(_DIGEST)
    return "" if start < len(_DIGEST) else "b3:" + data[start : start + 64].decode("ascii", "replace")


def read_digest(folder: Path) -> str:
    """`digest_of` refs.json; "" where it is missing or no file. Raises `StorageFailed`."""
    path = folder / NAME
    with storage_errors(path, "read"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in (errno.ENOENT, *NO_FILE):
                return ""
            raise
        with open(fd, "rb", buffering=0) as file:
            return digest_of(file.read(256) or b"") if stat.S_ISREG(os.fstat(fd).st_mode) else ""
