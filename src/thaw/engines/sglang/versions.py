"""Which releases of SGLang thaw runs on, and what differs between them, all in this file."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from thaw.core.errors import Unsupported

TESTED = ((0, 5, 22), (0, 5, 23))
"""The suite is run with each of them."""


def notes(release: str) -> list[str]:
    """A warning for a version that was never tested. Raises `Unsupported` for one that cannot work."""
    number = _number(release)
    if number is None:
        return [f"SGLang {release}: not a release version; tested with 0.5.22 and 0.5.23"]
    if number < TESTED[0]:
        raise Unsupported(f"SGLang {release} is too old for thaw: 0.5.22 and 0.5.23 are tested; upgrade SGLang")
    if number not in TESTED:
        return [f"SGLang {release}: thaw was tested with 0.5.22 and 0.5.23"]
    return []


def reply_status(status: int, release: str | None = None) -> int:
    """The HTTP status with which a request can end that is to end with this one. 0.5.22 answers 400, 500 and 503 alone;
    with any other it says 200, as if the request had run. `release`: None for the one that is installed."""
    if _number(release or version("sglang")) != (0, 5, 22) or status == 500:
        return status
    return 503 if status == 429 else 400


def _number(release: str) -> tuple[int, ...] | None:
    try:
        major, minor, patch = release.split("+")[0].split(".")[:3]
        return int(major), int(minor), int(patch)
    except ValueError:
        return None


def sleep_levels(arguments: Any, device: str) -> tuple[int, ...]:
    """Those of `Engine.sleep` with which a server of these arguments sleeps and wakes with its weights. On a CPU SGLang
    keeps all memory, and empties its cache."""
    if device == "cpu":
        return (1, 2)
    if not getattr(arguments, "enable_memory_saver", False):
        return ()
    return (1, 2) if getattr(arguments, "enable_weights_cpu_backup", False) else (2,)
