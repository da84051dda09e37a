"""What goes wrong with a server, in words for one line."""

from __future__ import annotations

import json

from thaw.core.errors import Busy, Conflict, InvalidRequest, NotFound, Refused, ThawError

STATUS: tuple[tuple[type[ThawError], int], ...] = (
    (NotFound, 404), (InvalidRequest, 400), (Busy, 429), (Conflict, 409), (Refused, 409), (ThawError, 500),
)  # fmt: skip
"""The HTTP status of an error, by the first of its kinds."""


def http_status(error: ThawError) -> int:
    return next(status for kind, status in STATUS if isinstance(error, kind))


def said(error: ThawError) -> str:
    """The error as JSON, in a reply that has text only."""
    return json.dumps({"kind": error.kind, "error": str(error)})


def server_message(content: bytes) -> str:
    """What the server says, in one line."""
    try:
        found = json.loads(content)
        error = found.get("error", found)
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = content.decode(errors="replace")
    return " ".join(str(text).split())[:500]


def error_text(error: Exception) -> str:
    """What an error says, or its kind where it says nothing."""
    return str(error) or type(error).__name__
