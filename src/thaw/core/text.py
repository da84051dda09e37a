"""Text that can be written: Python's strings may hold half a character (a lone surrogate), which is no UTF-8."""

from __future__ import annotations

from thaw.core.errors import InvalidRequest


def is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_text(text: str, what: str) -> str:
    """`text`. Raises `InvalidRequest` where it is none."""
    if not is_text(text):
        raise InvalidRequest(f"{what} holds half a character (a lone surrogate), which is no text: {ascii(text)[:80]}")
    return text
