"""Engines: the contract (`base`), the registry of kinds (`registry`, `kind`), and thaw's own, a folder each."""

from __future__ import annotations

from thaw.engines.kind import EngineKind, Server
from thaw.engines.registry import GROUP, available, load_engine

__all__ = ["GROUP", "EngineKind", "Server", "available", "load_engine"]
