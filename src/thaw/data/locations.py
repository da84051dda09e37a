"""Where bytes lie: a store as a process reaches it, and a blob inside one of its packs. Nothing is opened here."""

from __future__ import annotations

import re

import msgspec

_NAME = re.compile(r"[A-Za-z0-9_-]{1,120}\.safetensors\Z")


class TierAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a tier is: a URL, whose scheme names its kind (`data/tiers`), and what that kind must know besides.

    Never a credential: those come from the environment of the process that opens it."""

    url: str
    options: dict[str, str | int | bool] = {}


class StoreMount(msgspec.Struct, frozen=True, kw_only=True):
    """A named store as a process reaches it: a repository's UUID and its tiers in order. A pack is read from the first
    tier that has it, and written into the first of all."""

    uuid: str
    tiers: tuple[TierAddress, ...]


class BlobLocation(msgspec.Struct, frozen=True, kw_only=True):
    """Where a blob lies: bytes [offset, offset + nbytes) of the file `pack`, hashing to `blob`."""

    blob: str
    pack: str
    offset: int
    nbytes: int


def is_pack_name(name: object) -> bool:
    """Whether this is a plain file name of a pack."""
    return isinstance(name, str) and _NAME.match(name) is not None
