"""A pool's folders: the dirs in shared memory (arena, logs), the spill folder on disk, and who removes them.

Both are 0700 and named by their owner's pid and start time. They are removed when the pool closes; by the guard
process when the client was killed; and by the next pool of the same user, should the guard have been killed too.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from thaw.core.errors import StorageFailed
from thaw.data.files import storage_errors
from thaw.pool.shm import guard
from thaw.store.leases import start_time

PREFIX = "thaw-pool-"
SHARED = Path("/dev/shm")


class PoolDirs:
    """The folders of one pool and their guard."""

    def __init__(self, *, shared: Path | None = None, spill: Path | None = None) -> None:
        base = shared or (SHARED if SHARED.is_dir() else Path(tempfile.gettempdir()))
        rest = spill or Path(tempfile.gettempdir())
        sweep(base)
        sweep(rest)
        name = f"{PREFIX}{os.getuid()}-{os.getpid()}-{start_time(os.getpid()) or '?'}-{secrets.token_hex(4)}"
        self.path, self.spill = base / name, rest / f"{name}-spill"
        for folder in (self.path, self.spill):
            with storage_errors(folder, "make the pool's folder"):
                folder.mkdir(mode=0o700, parents=True)
        self._guard: subprocess.Popen[bytes] | None = _start_guard((self.path, self.spill))

    def began(self, pid: int) -> None:
        """A host process runs: the guard ends it if this process cannot."""
        self._tell(f"+ {pid}\n")

    def ended(self, pid: int) -> None:
        self._tell(f"- {pid}\n")

    def close(self) -> None:
        """Remove the folders. Idempotent."""
        found, self._guard = self._guard, None
        if found is not None and found.stdin is not None:
            with contextlib.suppress(OSError):
                found.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                found.wait(guard.GRACE_S + 5.0)
        for folder in (self.path, self.spill):
            shutil.rmtree(folder, ignore_errors=True)

    def _tell(self, line: str) -> None:
        if self._guard is not None and self._guard.stdin is not None:
            with contextlib.suppress(OSError):  # somebody killed the guard; the next pool sweeps
                self._guard.stdin.write(line.encode())
                self._guard.stdin.flush()


def _start_guard(folders: tuple[Path, ...]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", "-S", str(Path(guard.__file__)), *map(str, folders)]
    try:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, cwd="/",
        )  # fmt: skip
    except OSError as error:
        raise StorageFailed(f"the pool's guard process could not be started: {error}") from error


def sweep(base: Path) -> list[Path]:
    """Remove folders of pools whose process has ended; returns them. Others' folders are not looked into."""
    gone = []
    for folder in base.glob(f"{PREFIX}{os.getuid()}-*"):
        fields = folder.name.removeprefix(PREFIX).split("-")
        if len(fields) < 4 or not fields[1].isdigit() or folder.is_symlink():
            continue
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.getuid() and start_time(int(fields[1])) != fields[2]:
                shutil.rmtree(folder, ignore_errors=True)
                gone.append(folder)
    return gone
