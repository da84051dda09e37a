"""Which releases of SGLang thaw runs on, and what differs between them, all in this file."""

from __future__ import annotations

from thaw.core.errors import Unsupported

TESTED = ((0, 5, 22), (0, 5, 23))
"""The suite is run with each of them."""


def notes(version: str) -> list[str]:
    """A warning for a version that was never tested. Raises `Unsupported` for one that cannot work."""
    parts = version.split("+")[0].split(".")
    try:
        number = (int(parts[0]), int(parts[1]), int(parts[2]))
    except (ValueError, IndexError):
        return [f"SGLang {version}: not a release version; tested with 0.5.22 and 0.5.23"]
    if number < TESTED[0]:
        raise Unsupported(f"SGLang {version} is too old for thaw: 0.5.22 and 0.5.23 are tested; upgrade SGLang")
    if number not in TESTED:
        return [f"SGLang {version}: thaw was tested with 0.5.22 and 0.5.23"]
    return []
