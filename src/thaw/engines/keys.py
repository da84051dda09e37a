"""The API key of a server: the one that was given, or the one that the environment has."""

from __future__ import annotations

import os

from thaw.core.errors import InvalidRequest

VARIABLE = "THAW_API_KEY"
"""For every engine; it goes before the variable that the engine's own server reads (`EngineKind.key_variable`)."""


def api_key(variable: str | None, given: str | None = None) -> str | None:
    """The key for a server that reads `variable`; None or empty: it takes none. Raises `InvalidRequest` (see
    `check_key`)."""
    sources = {"api_key": given, **{name: os.environ.get(name) for name in (VARIABLE, variable) if name}}
    return next((check_key(key, source) for source, key in sources.items() if key), None)


def check_key(key: str, source: str) -> str:
    """`key`, which was given as `source`. Raises `InvalidRequest`, which does not show it, unless it is printable ASCII
    without a space at an end: nothing else goes through an HTTP header as it is."""
    ends = (0, len(key) - 1)
    wrong = [at for at, one in enumerate(key) if not " " <= one <= "~" or (one == " " and at in ends)]
    if wrong:
        raise InvalidRequest(
            f"{source} is no API key: its character {wrong[0] + 1} of {len(key)} is U+{ord(key[wrong[0]]):04X}, and a "
            "key is of printable ASCII without a space at an end; give it exactly as the server has it"
        )
    return key
