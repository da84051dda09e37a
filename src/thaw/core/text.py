"""Text that can be written: Python's strings may hold half a character (a lone surrogate), which is no UTF-8."""

from __future__ import annotations

import re

from thaw.core.errors import InvalidRequest

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069]")


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


def clean(text: str) -> str:
    """Text from a model or a file, safe to show: no escape sequences, no direction overrides."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def one_line(text: str, room: int) -> str:
    """`text` on one line of at most `room` columns, with an ellipsis where it was cut."""
    flat = " ".join(clean(text).split())
    return flat if len(flat) <= room else flat[: max(room - 1, 0)].rstrip() + "…"
