"""Leases: who is writing which packs, and who is reading, so that gc takes nothing away under them.

A lease names its process by boot, pid namespace, pid and start time, and has a limit. It is live while that process
runs and the limit has not passed; a killed process's lease ends with the process. A process of another pid namespace
cannot be looked up, so only the limit counts for it.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from thaw.core.errors import CorruptDatabase

LIMIT_S = 24 * 3600.0
NEW_PACK = "{}.safetensors"


class Lease(msgspec.Struct, frozen=True):
    """A row of `leases`. `packs`: file names its holder may be writing; `roots`: objects that gc must keep for it."""

    id: str
    kind: Literal["write", "read"]
    boot: str
    pid: int
    started: str
    taken_ns: int
    until_ns: int
    packs: tuple[str, ...]
    roots: tuple[str, ...]


def new_pack_name() -> str:
    """A pack name nobody else has: 128 random bits."""
    return NEW_PACK.format(os.urandom(16).hex())


def boot_id() -> str:
    """This boot of this kernel and this pid namespace; pids compare only within one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return "unknown"


def start_time(pid: int) -> str | None:
    """When process `pid` started, in clock ticks since boot as text; None when there is no such process.

    "?" where /proc does not say; then the pid alone must do.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else fields[19].decode()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "?"


def take(
    connection: sqlite3.Connection,
    kind: Literal["write", "read"],
    packs: Sequence[str] = (),
    roots: Iterable[str] = (),
) -> str:
    """A new lease of this process; returns its id."""
    now = time.time_ns()
    lease = Lease(
        os.urandom(8).hex(), kind, boot_id(), os.getpid(), start_time(os.getpid()) or "?", now,
        now + int(LIMIT_S * 1e9), tuple(packs), tuple(roots),
    )  # fmt: skip
    put(connection, lease)
    return lease.id


def put(connection: sqlite3.Connection, lease: Lease) -> None:
    *row, packs, roots = msgspec.structs.astuple(lease)
    values = (*row, json.dumps(packs), json.dumps(roots))
    connection.execute("INSERT OR IGNORE INTO leases VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)


def set_packs(connection: sqlite3.Connection, identifier: str, packs: Sequence[str]) -> None:
    connection.execute("UPDATE leases SET packs = ? WHERE id = ?", (json.dumps(list(packs)), identifier))


def release(connection: sqlite3.Connection, identifier: str) -> None:
    """Idempotent."""
    connection.execute("DELETE FROM leases WHERE id = ?", (identifier,))


def exists(connection: sqlite3.Connection, identifier: str) -> bool:
    return connection.execute("SELECT 1 FROM leases WHERE id = ?", (identifier,)).fetchone() is not None


def is_live(lease: Lease, now_ns: int) -> bool:
    if now_ns >= lease.until_ns:
        return False
    return lease.boot != boot_id() or start_time(lease.pid) == lease.started


def split(connection: sqlite3.Connection) -> tuple[list[Lease], list[Lease]]:
    """(live, dead) leases, by the real clock."""
    now = time.time_ns()
    leases = [from_row(row) for row in connection.execute("SELECT * FROM leases ORDER BY id")]
    return [lease for lease in leases if is_live(lease, now)], [lease for lease in leases if not is_live(lease, now)]


def from_row(row: tuple[str, str, str, int, str, int, int, str, str]) -> Lease:
    """Raises `CorruptDatabase`."""
    kind: Literal["write", "read"] = "write" if row[1] == "write" else "read"
    try:
        packs, roots = (tuple(map(str, json.loads(text))) for text in row[7:])
        return Lease(row[0], kind, row[2], int(row[3]), row[4], int(row[5]), int(row[6]), packs, roots)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CorruptDatabase(f"a row of leases is damaged ({error}). Run `thaw fsck --rebuild`.") from None
