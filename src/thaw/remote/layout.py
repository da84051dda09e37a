"""What lies where in a remote. Every key is relative to the remote's own prefix.

    thaw.json                            what this is: format, id, the branch that a clone starts on
    default/…  or  ns/NAME/…             a namespace's own part; nothing is shared between two of them:
      refs/branch/NAME, refs/tag/NAME    one small object each, moved by compare-and-swap (`refs.py`)
      reflog/branch/NAME/GENERATION      what a ref said before it moved on
      manifests/EPOCH/HASH.json          a pushed commit: its new objects and blobs, and where they lie (`manifest.py`)
      packs/EPOCH/HASH.safetensors       objects and blobs
      gc.json, condemned/…               the state of gc (`epochs.py`)

HASH is that of the content, EPOCH the number of gcs before it was written: a name that gc may delete is never written
again. The `/` in the name of a ref is written `=`, so that `a` and `a/b` can be two files of one folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

from thaw.core.errors import BadPoint, CorruptBlob
from thaw.core.points import check_name
from thaw.remote.bucket import Bucket, FoundObject, ListedObject, Version

Kind: TypeAlias = Literal["branch", "tag"]
KINDS: tuple[Kind, ...] = ("branch", "tag")
ABOUT = "thaw.json"
GC = "gc.json"
MANIFESTS, PACKS, REFS, REFLOG, CONDEMNED = "manifests/", "packs/", "refs/", "reflog/", "condemned/"
_DATA = re.compile(r"(?:manifests/[0-9]{1,9}/[0-9a-f]{64}\.json|packs/[0-9]{1,9}/[0-9a-f]{64}\.safetensors)\Z")


def prefix(namespace: str) -> str:
    return f"ns/{namespace}/" if namespace else "default/"


def ref_key(kind: Kind, name: str) -> str:
    return f"{REFS}{kind}/{check_name(name).replace('/', '=')}"


def reflog_key(kind: Kind, name: str, generation: int) -> str:
    return f"{REFLOG}{kind}/{name.replace('/', '=')}/{generation:010d}"


def ref_name(key: str) -> str | None:
    """The ref's name in the last part of its key; None where it can be none."""
    try:
        return check_name(key.rpartition("/")[2].replace("=", "/"))
    except BadPoint:
        return None


def manifest_key(epoch: int, digest: str) -> str:
    return f"{MANIFESTS}{epoch}/{digest.removeprefix('b3:')}.json"


def pack_key(epoch: int, digest: str) -> str:
    return f"{PACKS}{epoch}/{digest.removeprefix('b3:')}.safetensors"


def digest_of(key: str) -> str:
    """The hash in the name of a manifest or pack."""
    return "b3:" + key.rpartition("/")[2].partition(".")[0]


def epoch_of(key: str) -> int:
    return int(key.split("/")[1])


def is_data_key(key: str) -> bool:
    """Whether this is the name of a manifest or pack."""
    return _DATA.match(key) is not None


def check_data_key(key: str, folder: str, what: str) -> str:
    """`key`, if it names a manifest or pack of that folder. Raises `CorruptBlob`: it was read from somewhere."""
    if not is_data_key(key) or not key.startswith(folder):
        raise CorruptBlob(f"{what} names {key[:120]!r}, which is no object of {folder}")
    return key


class NamespaceBucket:
    """A bucket as one namespace sees it: the keys of its own part alone."""

    def __init__(self, bucket: Bucket, namespace: str) -> None:
        self.bucket, self.namespace = bucket, namespace
        self._prefix = prefix(namespace)

    @property
    def url(self) -> str:
        return self.bucket.url

    def read(self, key: str) -> FoundObject | None:
        return self.bucket.read(self._prefix + key)

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        return self.bucket.read_ranges(self._prefix + key, ranges)

    def size(self, key: str) -> int | None:
        return self.bucket.size(self._prefix + key)

    def put(self, key: str, data: bytes | memoryview) -> None:
        self.bucket.put(self._prefix + key, data)

    def create(self, key: str, data: bytes) -> Version | None:
        return self.bucket.create(self._prefix + key, data)

    def swap(self, key: str, data: bytes, expected: Version) -> Version | None:
        return self.bucket.swap(self._prefix + key, data, expected)

    def delete(self, keys: Sequence[str]) -> None:
        self.bucket.delete([self._prefix + key for key in keys])

    def entries(self, prefix: str) -> Iterator[ListedObject]:
        for entry in self.bucket.entries((self._prefix + prefix).rstrip("/")):
            yield entry._replace(key=entry.key.removeprefix(self._prefix))

    def now(self) -> float:
        return self.bucket.now()
