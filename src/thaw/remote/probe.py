"""Whether a store keeps its word about conditional writes. thaw's branches depend on it, and not every store does.

An object of the probe's own is created, created again, moved, and moved once more from a version that it no longer has.
What must fail must fail, must have changed nothing, and what is read must be what was written last (a cache before the
store would tell of branches as they were). Needs a key that may write; to read, nothing is probed.
"""

from __future__ import annotations

import contextlib
import secrets

from thaw.core.errors import RemoteError, RemoteUnsafe
from thaw.remote.bucket import Bucket, Version

FOLDER = "probe"


def probe(bucket: Bucket) -> None:
    """Returns if the store keeps its word; leaves nothing there. Raises `RemoteUnsafe` saying what it did instead, and
    other `RemoteError`s where it could not be asked."""
    key = f"{FOLDER}/{secrets.token_hex(12)}"
    one, two, three, four = (secrets.token_bytes(24) for _ in range(4))
    try:
        first = _made(bucket, key, bucket.create(key, one), "creating an object")
        _refused(bucket, key, bucket.create(key, two), one, "creating an object that exists")
        _made(bucket, key, bucket.swap(key, three, first), "replacing an object of the version it has")
        _refused(bucket, key, bucket.swap(key, four, first), three, "replacing an object of a version it no longer has")
    except RemoteUnsafe:
        raise
    except RemoteError as error:
        raise type(error)(
            f"before its first push here thaw tries the store's conditional writes, and could not: {error}"
        ) from None
    finally:
        with contextlib.suppress(RemoteError):
            bucket.delete([key])


def _made(bucket: Bucket, key: str, version: Version | None, what: str) -> Version:
    if version is None:
        raise _unsafe(bucket, f"{what} was refused")
    if version.e_tag is None and version.version is None:
        raise _unsafe(bucket, f"{what} gave no ETag and no version")
    return version


def _refused(bucket: Bucket, key: str, version: Version | None, expected: bytes, what: str) -> None:
    if version is not None:
        raise _unsafe(bucket, f"{what} was allowed")
    found = bucket.read(key)
    if found is None or found.data != expected:
        raise _unsafe(bucket, f"after {what}, which was refused, it gave other bytes than those written last")


def _unsafe(bucket: Bucket, what: str) -> RemoteUnsafe:
    return RemoteUnsafe(
        f"the store of {bucket.url} cannot hold branches: {what}. Two that push at once would lose one there. Use a "
        "store that takes If-Match and If-None-Match with writes, as S3 does."
    )
