"""What a tier is: a place where packs lie. Two Protocols, one a capability; a tier that is only read has the first.

    ReadExtents    open a pack and fill memory from it
    WritePack      make a pack that is there whole when it is done, or not at all

A tier moves bytes and no more. What they must hash to is checked above it (`data/reader.py`, `data/stream.py`,
`data/writer.py`), once for all tiers: none can hand an engine bytes that were not verified.

One object of a tier is used in a process, from any thread. Every call ends: what can hang has a time limit of its own.
A tier raises `MissingPack` for a pack that it has not, `CorruptBlob` for one that is cut off, `StorageFailed` for the
rest; what else it raises becomes `StorageFailed` (`data/tiers/mounted.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, runtime_checkable

from thaw.core.errors import CorruptBlob


class MissingPack(CorruptBlob):
    """The pack is gone: lost, or moved by gc. Look the blob up again; if it still lies there, it is lost."""

    kind = "missing-pack"


class Requests(NamedTuple):
    """How a tier is read best: `nbytes` at a time, extents up to `gap_nbytes` apart together with what lies between,
    `num_parallel` requests under way."""

    nbytes: int
    gap_nbytes: int
    num_parallel: int = 1


class OpenPack(Protocol):
    """A pack that is read. `nbytes`: its size; nothing behind it is asked for."""

    nbytes: int
    requests: Requests

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill all of `views`, one after the other, with the pack's bytes from `offset` on. From any thread, several at
        a time. Nothing is written to them after it returned or raised."""

    def close(self) -> None:
        """Once, when nothing is read any more."""


@runtime_checkable
class ReadExtents(Protocol):
    def open_pack(self, name: str) -> OpenPack:
        """The pack `name`, a plain file name. Raises `MissingPack` where this tier has it not."""


class NewPack(Protocol):
    """A pack that is written."""

    def write(self, data: memoryview, offset: int) -> None:
        """All of `data` at `offset`. Offsets grow, but the header comes last; bytes may be written over."""

    def end(self, nbytes: int) -> None:
        """The last call: the pack has so many bytes, and what was written behind them is not part of it."""


@runtime_checkable
class WritePack(Protocol):
    def new_pack(self, name: str) -> AbstractContextManager[NewPack]:
        """A pack to write. When its block ends the pack is there, whole and durable; when it raises nothing is left. A
        pack of that name is never replaced: that is `StorageFailed`."""
