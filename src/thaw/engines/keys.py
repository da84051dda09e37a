"""The API key of a server that is joined: the one that was given, or the one that the environment has."""

from __future__ import annotations

import os

VARIABLE = "THAW_API_KEY"
"""For every engine; it goes before the variable that the engine's own server reads (`EngineKind.key_variable`)."""


def api_key(variable: str | None, given: str | None = None) -> str | None:
    """The key for a server that reads `variable`; None or empty: it takes none."""
    return given or os.environ.get(VARIABLE) or (os.environ.get(variable) if variable else None)
