"""The small JSON objects of a remote, which carry their own check, and the way back that trusts nothing."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import msgspec

from thaw.core.canonical import refuse_newer
from thaw.core.errors import CorruptBlob
from thaw.core.ids import digest

T = TypeVar("T", bound="Checked")
MEND = "Delete this object with the store's own tools while no gc runs, then push again."
MAX_BYTES = 1 << 20
"""Of one small object."""


class Checked(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    """A value that moves by compare-and-swap. `writer` is drawn for each writing: no two have the same bytes."""

    writer: str
    check: str = ""


def nonce() -> str:
    return os.urandom(16).hex()


def encode(value: Checked) -> bytes:
    """The object's bytes; `check` becomes the hash of all the rest."""
    said = digest(_encoded(msgspec.structs.replace(value, check="")))
    return _encoded(msgspec.structs.replace(value, check=said))


def _encoded(value: Any) -> bytes:
    return msgspec.json.encode(value, order="sorted")


def decode(data: bytes, kind: type[T], what: str) -> T:
    """The value in `data`. Raises `CorruptBlob` for anything that `encode` would not have written, `NewerFormat`."""
    if len(data) > MAX_BYTES:
        raise CorruptBlob(f"{what} has {len(data):,} bytes; at most {MAX_BYTES:,} are allowed")
    try:
        value = msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        refuse_newer(data, what)
        raise CorruptBlob(f"{what} cannot be read: {error}. {MEND}") from None
    if encode(value) != bytes(data):
        raise CorruptBlob(f"{what} does not match its own check; it was changed after it was written. {MEND}")
    return value
