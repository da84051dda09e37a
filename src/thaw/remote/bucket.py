"""Where a remote's bytes lie: an object store, or a folder that behaves like one.

Two kinds of object, and nothing else. *Data* (packs, manifests) is written once under a name made of its content,
without a condition: writing it twice is harmless. *Refs* are small, and move by compare-and-swap alone. Truth is never
read from a listing: it may be late, or lack names.

Versions are often made of the content (S3's ETag is), so equal bytes may be an equal version: every value that is
created or swapped holds a nonce of its writer's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from thaw.core.errors import InvalidRequest

CLOCK = "clock"
"""The object that `now` writes; `entries` leaves it out."""
MAX_KEY = 900
"""Bytes of a key: object stores take 1,024 with the remote's own prefix."""
_KEY = re.compile(r"(?!\.)[A-Za-z0-9_.=-]+(?:/(?!\.)[A-Za-z0-9_.=-]+)*", re.ASCII)


class Version(NamedTuple):
    """What a store says of one state of an object. Both go back to it, for stores differ in which they compare."""

    e_tag: str | None
    version: str | None = None


class FoundObject(NamedTuple):
    data: bytes
    version: Version


class ListedObject(NamedTuple):
    key: str
    size: int
    modified: float
    """Seconds since 1970 by the store's clock."""


class Bucket(Protocol):
    """Keys are relative to the remote's prefix (`check_key`). Every call may be made from several threads at once, but
    not from a process forked off after the first one.

    Raises `thaw.core.errors.RemoteError` kinds for everything that the network or the store does, after retries of a
    bounded number and time; a folder raises `StorageFailed`, and `Busy` where its lock cannot be had. A name that is
    not there is `None`, never an error. After an error of a write it may have been made: read before trying again.
    """

    @property
    def url(self) -> str:
        """For messages; holds no credentials."""
        ...

    def read(self, key: str) -> FoundObject | None: ...

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Bytes of each (start, length), read-only, in the order asked for. Raises `RemoteMissing` where the object is
        missing or shorter."""
        ...

    def size(self, key: str) -> int | None: ...

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Written whole or not at all, and durable when it returns."""
        ...

    def create(self, key: str, data: bytes) -> Version | None:
        """The version written, or None where the key is taken by other bytes, and these were surely not written. A lost
        answer is resolved by reading back: the same bytes count as ours only if they hold a writer's nonce, so callers
        put one into each value. Raises `RemoteUncertain` where the answer was lost and other bytes are there: they may
        have followed ours."""
        ...

    def swap(self, key: str, data: bytes, expected: Version) -> Version | None:
        """Compare-and-swap. None where it has changed meanwhile or is gone, and these bytes were surely not written. A
        lost answer is resolved by reading back, as in `create`, and raises `RemoteUncertain` likewise."""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Those that are missing count as deleted."""
        ...

    def entries(self, prefix: str) -> Iterator[ListedObject]:
        """Whole path segments; "" is everything. For gc and for names of refs alone."""
        ...

    def now(self) -> float:
        """The store's clock, in seconds since 1970, to the second. Writes the object `CLOCK`."""
        ...


def is_key(key: str) -> bool:
    return len(key) <= MAX_KEY and _KEY.fullmatch(key) is not None


def check_key(key: str) -> str:
    """Parts between slashes of ASCII letters, digits and `_.=-`, none starting with a dot. Raises `InvalidRequest`."""
    if not is_key(key):
        raise InvalidRequest(
            f"{key!r} is no name of a remote's object: give parts of letters, digits and _ . = - with / between them, "
            f"none starting with a dot, {MAX_KEY} characters at most"
        )
    return key
