"""Whether SGLang would find thaw here: it goes on without a plug-in that it did not find, so this looks."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from importlib import metadata

from thaw.core.errors import Unsupported
from thaw.core.findings import Finding
from thaw.engines.sglang import versions

GROUP = "sglang.srt.plugins"
NAME = "thaw"
WHITELIST = "SGLANG_PLUGINS"


def findings() -> Iterator[Finding]:
    """Nothing where SGLang is not installed."""
    found = importlib.util.find_spec("sglang")
    if found is None or found.origin is None:
        return
    yield _version(metadata.version("sglang"))
    yield _plugin()


def _version(version: str) -> Finding:
    try:
        notes = versions.notes(version)
    except Unsupported as error:
        return Finding(name="sglang", status="problem", text=str(error), advice="pip install sglang==0.5.23")
    return Finding(name="sglang", status="warning" if notes else "ok", text=notes[0] if notes else f"SGLang {version}")


def _plugin() -> Finding:
    """Found by its entry point, not left out by the whitelist, and importable."""
    points = [point for point in metadata.entry_points(group=GROUP) if point.name == NAME]
    if not points:
        return _problem("SGLang does not find thaw: no entry point", "pip install -e the clone again here")
    allowed = [name.strip() for name in os.environ.get(WHITELIST, "").split(",") if name.strip()]
    if allowed and NAME not in allowed:
        return _problem(f"{WHITELIST}={','.join(allowed)} leaves thaw out", f"add {NAME} to it, or unset it")
    try:
        points[0].load()
    except (ImportError, AttributeError) as error:
        return _problem(f"thaw's plug-in cannot be imported: {error}", "pip install -e the clone again")
    text = "SGLang finds thaw; --radix-cache-backend thaw switches it on (an engine without the plug-in does not start)"
    return Finding(name="sglang-plugin", status="ok", text=text)


def _problem(text: str, advice: str) -> Finding:
    return Finding(name="sglang-plugin", status="problem", text=text, advice=advice)
