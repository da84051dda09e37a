"""What runs here: pools write their counts into their folder, and this reads them. No engine is asked, no text kept."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from thaw.core.canonical import decode_stored
from thaw.pool.shm.dirs import PREFIX, SHARED
from thaw.pool.values import PoolStats
from thaw.store.leases import start_time

FILE = "status.json"


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A pool as it last said, at most a few seconds ago."""

    pid: int
    began_ns: int
    engine: str
    model: str
    device: str
    stats: PoolStats


def pools(base: Path = SHARED) -> list[PoolStatus]:
    """The pools of this user whose process runs, oldest first."""
    found = []
    for folder in base.glob(f"{PREFIX}{os.getuid()}-*"):
        fields = folder.name.removeprefix(PREFIX).split("-")
        if len(fields) < 4 or not fields[1].isdigit() or start_time(int(fields[1])) != fields[2]:
            continue
        try:
            found.append(decode_stored((folder / FILE).read_bytes(), PoolStatus))
        except (OSError, msgspec.DecodeError):
            continue  # it is being made, or was just removed
    return sorted(found, key=lambda one: one.began_ns)
