"""The tables, and the checksums that rows carry.

refs, reflog and settings exist nowhere else in this form; everything else can be derived from the packs again
(`fsck --rebuild`), and `fsck` compares it with them. A row is checked where it is read: by its checksum, and objects by
their hash. That none is missing is checked too where its absence would say something: settings count the refs, and the
reflog is a chain.

    settings   format, uuid, head, user.*; sequence (counts changes of refs), refs (how many), moves (last of reflog);
               collecting, from when gc takes rows of `segments` until it ends
    refs       name -> commit
    reflog     every move of a ref, and commits kept for one (`moved` 0); `seq` from 1 without gaps, `before` the one of
               the same name before it, 0 for the first       reflog_ends   name -> its last
    packs      files, `doomed_ns` once nothing points into them    blobs   blob -> bytes of a pack
    objects    canonical bytes (so that `log` opens no pack), where the pack has them; `state`: what a commit recorded
    segments   window hash, tokens in the window -> segment -> a state that holds it: what `match` looks up
    leases     who is writing which packs, who is reading, until when
"""

from __future__ import annotations

import json

from thaw.core.ids import digest

FORMAT = 2
"""Of the database. What older ones lack, `thaw.store.upgrade` adds when they are opened."""
NAMESPACED = 3
"""The format of a database that has namespaces: the same tables. One without stays what older thaws can read."""
SHALLOW = 4
"""The format of a database whose history does not go back to its beginning: the same tables, with or without
namespaces."""
KEEP_REFLOG_S = 90 * 24 * 3600.0
"""How long gc keeps what only the reflog names."""
COUNTS = ("sequence", "refs", "moves")
"""Settings that count: changes of refs, the refs, the entries of the reflog."""
KINDS = frozenset({"commit", "state", "segments", "segment", "turns", "turn", "model"})
"""Of objects."""
COLLECTING = "collecting"
"""The setting that is there from when gc takes rows of `segments` until it ends: longer if it was killed."""
DATABASE = "thaw.db"
PACKS = "packs"

TABLES = (
    """CREATE TABLE settings (
    key TEXT PRIMARY KEY, value TEXT NOT NULL, checksum TEXT NOT NULL)""",
    """CREATE TABLE refs (
    name TEXT PRIMARY KEY, kind TEXT NOT NULL, target TEXT NOT NULL, checksum TEXT NOT NULL)""",
    "CREATE INDEX refs_target ON refs (target)",
    "CREATE INDEX refs_target_name ON refs (target, name)",
    """CREATE TABLE reflog (
    seq INTEGER PRIMARY KEY, before INTEGER NOT NULL, name TEXT NOT NULL, kind TEXT NOT NULL, old TEXT, new TEXT,
    reason TEXT NOT NULL, time_ns INTEGER NOT NULL, moved INTEGER NOT NULL, checksum TEXT NOT NULL)""",
    """CREATE TABLE reflog_ends (
    name TEXT PRIMARY KEY, seq INTEGER NOT NULL, checksum TEXT NOT NULL) WITHOUT ROWID""",
    """CREATE TABLE packs (
    name TEXT PRIMARY KEY, nbytes INTEGER NOT NULL, doomed_ns INTEGER, "check" INTEGER NOT NULL) WITHOUT ROWID""",
    "CREATE INDEX packs_nbytes ON packs (nbytes) WHERE doomed_ns IS NULL",
    """CREATE TABLE blobs (
    id TEXT PRIMARY KEY, pack TEXT NOT NULL, start INTEGER NOT NULL, nbytes INTEGER NOT NULL, "check" INTEGER NOT NULL)
    WITHOUT ROWID""",
    "CREATE INDEX blobs_pack ON blobs (pack)",
    """CREATE TABLE objects (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, data BLOB NOT NULL,
    pack TEXT NOT NULL, start INTEGER NOT NULL, state TEXT, "check" INTEGER)""",
    "CREATE INDEX objects_kind ON objects (kind, seq)",
    "CREATE INDEX objects_pack ON objects (pack)",
    "CREATE INDEX objects_state ON objects (state) WHERE state IS NOT NULL",
    """CREATE TABLE segments (
    "window" TEXT NOT NULL, "key" BLOB NOT NULL, segment TEXT NOT NULL, state TEXT NOT NULL, "check" INTEGER NOT NULL,
    PRIMARY KEY ("window", "key", segment)) WITHOUT ROWID""",
    """CREATE TABLE leases (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, boot TEXT NOT NULL, pid INTEGER NOT NULL, started TEXT NOT NULL,
    taken_ns INTEGER NOT NULL, until_ns INTEGER NOT NULL, packs TEXT NOT NULL, roots TEXT NOT NULL)""",
)
"""As SQLite keeps them: what of an older format was not made anew is spelled as ALTER TABLE leaves it."""


_JSON = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True, default=repr).encode


def checksum(table: str, *values: str | int | None) -> str:
    """The checksum of a row: the first 32 hex digits of BLAKE3 of the JSON array [table, values …]."""
    return digest(_row(table, values))[3:35]


def check(table: str, *values: str | int | None) -> int:
    """The checksum of a row that the packs can give again: the first 48 bits of the same hash, big-endian."""
    return int(digest(_row(table, values))[3:15], 16)


def _row(table: str, values: tuple[str | int | None, ...]) -> bytes:
    return _JSON([table, *values]).encode()
