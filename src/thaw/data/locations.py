"""Where bytes lie: a store as a process sees it, and a blob inside one of its packs."""

from __future__ import annotations

from pathlib import Path

import msgspec


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
