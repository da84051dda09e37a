"""The tables, and the checksum that rows carry.

refs, reflog and settings exist nowhere else in this form, so each of their rows has a checksum. Everything else can be
derived from the packs again (`fsck --rebuild`), and `fsck` compares it with them.

    settings   format, uuid, head, sequence (counts changes of refs), user.*
    refs       name -> commit            reflog   every move of a ref, and commits kept for one (`moved` 0)
    packs      files, `doomed_ns` once nothing points into them    blobs   blob -> bytes of a pack
    objects    canonical bytes (so that `log` opens no pack), and where the pack has them
    segments   window hash -> segment -> a state that holds it: what `match` looks up
    leases     who is writing which packs, who is reading, until when
"""

from __future__ import annotations

import json

from thaw.core.ids import digest

FORMAT = 1
KEEP_REFLOG_S = 90 * 24 * 3600.0
"""How long gc keeps what only the reflog names."""
DATABASE = "thaw.db"
PACKS = "packs"

TABLES = (
    """CREATE TABLE settings (
    key TEXT PRIMARY KEY, value TEXT NOT NULL, checksum TEXT NOT NULL)""",
    """CREATE TABLE refs (
    name TEXT PRIMARY KEY, kind TEXT NOT NULL, target TEXT NOT NULL, checksum TEXT NOT NULL)""",
    """CREATE TABLE reflog (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, kind TEXT NOT NULL, old TEXT, new TEXT,
    reason TEXT NOT NULL, time_ns INTEGER NOT NULL, moved INTEGER NOT NULL, checksum TEXT NOT NULL)""",
    "CREATE INDEX reflog_name ON reflog (name, seq)",
    """CREATE TABLE packs (
    name TEXT PRIMARY KEY, nbytes INTEGER NOT NULL, doomed_ns INTEGER)""",
    """CREATE TABLE blobs (
    id TEXT PRIMARY KEY, pack TEXT NOT NULL, start INTEGER NOT NULL, nbytes INTEGER NOT NULL) WITHOUT ROWID""",
    """CREATE TABLE objects (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, data BLOB NOT NULL,
    pack TEXT NOT NULL, start INTEGER NOT NULL)""",
    "CREATE INDEX objects_kind ON objects (kind, seq)",
    """CREATE TABLE segments (
    segment TEXT PRIMARY KEY, "window" TEXT NOT NULL, state TEXT NOT NULL) WITHOUT ROWID""",
    'CREATE INDEX segments_window ON segments ("window")',
    """CREATE TABLE leases (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, boot TEXT NOT NULL, pid INTEGER NOT NULL, started TEXT NOT NULL,
    taken_ns INTEGER NOT NULL, until_ns INTEGER NOT NULL, packs TEXT NOT NULL, roots TEXT NOT NULL)""",
)


def checksum(table: str, *values: str | int | None) -> str:
    """The checksum of a row: the first 32 hex digits of BLAKE3 of the JSON array [table, values …]."""
    text = json.dumps([table, *values], separators=(",", ":"), ensure_ascii=True, default=repr)
    return digest(text.encode())[3:35]
