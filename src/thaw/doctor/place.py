"""The machine and the place where the repository lies or will lie: cores, memory, shared memory, disk, file system."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from thaw.core.findings import Finding
from thaw.receipt.machine import cpu_model, memory_nbytes, num_cores
from thaw.store.filesystem import is_network, mount_type

SHM = Path("/dev/shm")
LOW_DISK = 1 << 30
GIB = 1 << 30


def findings(folder: Path) -> Iterator[Finding]:
    """`folder` need not exist; the nearest one above it that does is looked at."""
    yield _machine()
    yield _memory_limit()
    yield _shm()
    existing = nearest(folder)
    yield _disk(existing)
    yield _filesystem(existing)
    yield _permission(existing)


def nearest(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    path = Path(os.path.abspath(folder))
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def writable(folder: Path) -> bool:
    """Whether a repository may be made here, and has room for what is measured."""
    return os.access(folder, os.W_OK | os.X_OK) and shutil.disk_usage(folder).free > LOW_DISK


def _machine() -> Finding:
    return Finding(
        name="machine",
        status="ok",
        text=f"{cpu_model()}, {num_cores()} cores, {memory_nbytes() / GIB:.1f} GiB of memory",
    )


def _memory_limit() -> Finding:
    """What a container allows."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < memory_nbytes():
            return Finding(name="memory-limit", status="info", text=f"a control group allows {int(text) / GIB:.1f} GiB")
    return Finding(name="memory-limit", status="ok", text="no control group limits memory")


def _shm() -> Finding:
    if not SHM.is_dir():
        return Finding(
            name="shm", status="warning", text="there is no /dev/shm", advice="Snapshots are kept only on disk."
        )
    usage, mode = shutil.disk_usage(SHM), stat.S_IMODE(SHM.stat().st_mode)
    size = f"/dev/shm: {usage.total / GIB:.2f} GiB, {usage.free / GIB:.2f} GiB free, mode {mode:04o}"
    if not os.access(SHM, os.W_OK | os.X_OK):
        return Finding(name="shm", status="warning", text=f"{size}, not writable", advice="chmod 1777 /dev/shm.")
    if mode & 0o002 and not mode & stat.S_ISVTX:
        return Finding(
            name="shm", status="warning", text=f"{size}: others may delete files", advice="chmod 1777 /dev/shm."
        )
    if usage.total < GIB:
        advice = "In a container: start it with --shm-size, for example --shm-size=8g."
        return Finding(name="shm", status="info", text=size, advice=advice)
    return Finding(name="shm", status="ok", text=size)


def _disk(folder: Path) -> Finding:
    usage = shutil.disk_usage(folder)
    text = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free on the repository's disk"
    low = usage.free < LOW_DISK
    return Finding(
        name="disk",
        status="warning" if low else "ok",
        text=text,
        advice="Less than 1 GiB: a commit may run out of space. `thaw gc` deletes what nothing refers to."
        if low
        else "",
    )


def _filesystem(folder: Path) -> Finding:
    try:
        kind = mount_type(Path(os.path.realpath(folder)), Path("/proc/self/mountinfo").read_text("utf-8", "replace"))
    except OSError:
        kind = ""
    if is_network(kind):
        return Finding(
            name="filesystem",
            status="problem",
            text=f"a network file system ({kind}): a repository is refused there",
            advice="Create the repository on a local disk.",
        )
    if kind in ("tmpfs", "ramfs"):
        return Finding(
            name="filesystem",
            status="warning",
            text=f"{kind}: it is in memory and lost after a restart",
            advice="Create the repository on a disk if it should last.",
        )
    return Finding(name="filesystem", status="ok", text=f"file system {kind}" if kind else "unknown file system")


def _permission(folder: Path) -> Finding:
    good = os.access(folder, os.W_OK | os.X_OK)
    return Finding(
        name="permission",
        status="ok" if good else "problem",
        text="the folder is writable" if good else "the folder is not writable",
        advice="" if good else "Give this user write permission, or use a repository elsewhere (-C PATH).",
    )
