"""Errors on their way between processes: a kind and a text."""

from __future__ import annotations

from thaw.core import errors
from thaw.core.errors import ThawError
from thaw.data.pack import MissingPack

_KINDS = {
    cls.kind: cls
    for cls in (*vars(errors).values(), MissingPack)
    if isinstance(cls, type) and issubclass(cls, ThawError)
}


def made(kind: str, text: str) -> ThawError:
    """The error of that kind; one that this thaw does not know is a plain `ThawError`."""
    return _KINDS.get(kind, ThawError)(text)
