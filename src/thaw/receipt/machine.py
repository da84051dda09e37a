"""What a receipt says about the machine and the software: enough to compare figures, nothing to identify anybody."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

from thaw._version import __version__
from thaw.receipt.format import Machine


def this_machine(accelerator: str | None = None) -> Machine:
    """This machine. `accelerator` is what the engine says it runs on, None for the CPU."""
    return Machine(
        cpu=cpu_model()[:400],
        cores=num_cores(),
        memory_nbytes=memory_nbytes(),
        system=f"{platform.system()} {platform.machine()}",
        accelerator=accelerator,
    )


def software(*packages: str) -> dict[str, str]:
    """Versions of thaw, Python and those of `packages` that are installed."""
    found = {"thaw": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Hardware")))
    return next((name for name in named if name), platform.processor() or platform.machine() or "unknown")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_nbytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0
