"""Engines: the contract (`base`), the registry of kinds (`registry`, `kind`), and thaw's own, a folder each.

Names load on first use: code that reads a session's text needs no registry.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thaw.engines.kind import EngineKind, Server
    from thaw.engines.registry import GROUP, available, load_engine

_HOME = {
    "GROUP": "thaw.engines.registry",
    "available": "thaw.engines.registry",
    "load_engine": "thaw.engines.registry",
    "EngineKind": "thaw.engines.kind",
    "Server": "thaw.engines.kind",
}
__all__ = ["GROUP", "EngineKind", "Server", "available", "load_engine"]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
