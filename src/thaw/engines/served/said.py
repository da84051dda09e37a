"""What goes wrong with a server, in words for one line."""

from __future__ import annotations

import json


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
