"""The API key of a server that is joined: the one that was given, or the one that the environment has."""

from __future__ import annotations

import os

VARIABLE = "THAW_API_KEY"
"""For every engine; it goes before the variables that the engines' own servers read."""
OF_ENGINE = {"vllm": "VLLM_API_KEY", "sglang": "SGLANG_API_KEY"}


def api_key(engine: str, given: str | None = None) -> str | None:
    """The key for a server of this engine; None or empty: it takes none."""
    return given or os.environ.get(VARIABLE) or os.environ.get(OF_ENGINE[engine])
