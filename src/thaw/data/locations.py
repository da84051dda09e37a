"""Where bytes lie: a store as a process sees it, and a blob inside one of its packs."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

_NAME = re.compile(r"[A-Za-z0-9_-]{1,120}\.safetensors\Z")


class StoreMount(msgspec.Struct, frozen=True, kw_only=True):
    """A named store as this process sees it: a repository's UUID and its folder of packs."""

    uuid: str
    packs: Path


class BlobLocation(msgspec.Struct, frozen=True, kw_only=True):
    """Where a blob lies: bytes [offset, offset + nbytes) of the file `pack`, hashing to `blob`."""

    blob: str
    pack: str
    offset: int
    nbytes: int


def is_pack_name(name: object) -> bool:
    """Whether this is a plain file name of a pack."""
    return isinstance(name, str) and _NAME.match(name) is not None
