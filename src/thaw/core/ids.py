"""Ids: BLAKE3-256 of bytes, written `b3:` and 64 hex digits. The tag names the algorithm.

A `BlobId` names raw bytes (KV, a hidden state), an `ObjectId` the canonical JSON of an object. Two ids are
equal exactly when the bytes are.
"""

from __future__ import annotations

import re
from typing import NewType

from blake3 import blake3

from thaw.core.errors import CorruptBlob

ObjectId = NewType("ObjectId", str)
BlobId = NewType("BlobId", str)
StateId = NewType("StateId", str)
CommitId = NewType("CommitId", str)

TAG = "b3:"
ID_LENGTH = len(TAG) + 64
_ID = re.compile(r"b3:[0-9a-f]{64}\Z")


def digest(data: bytes | bytearray | memoryview) -> str:
    """The id of `data` (any contiguous buffer)."""
    return TAG + blake3(data).hexdigest()


def is_id(text: str) -> bool:
    return _ID.match(text) is not None


def check_id(text: str, what: str) -> str:
    """`text` if it is a well-formed id, else `CorruptBlob` naming `what`."""
    if not is_id(text):
        raise CorruptBlob(f"{what}: {text[:80]!r} is not an id (expected 'b3:' and 64 hex digits)")
    return text


def short(identifier: str, length: int = 10) -> str:
    """The first hex digits, for people."""
    return identifier.removeprefix(TAG)[:length]
