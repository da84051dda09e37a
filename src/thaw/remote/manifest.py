"""The manifest of a pushed commit: what of it is not in its parents, and where each piece lies. Immutable.

A manifest is named by the hash of its bytes and names those of its parents: the one in a ref pins all of history. What
a commit needs is what the manifests from it back to the first ones list. KV and objects are verified by their own ids
besides: a manifest says where something lies, never what it is.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from thaw.core.canonical import MAX_OBJECT_BYTES, refuse_newer
from thaw.core.errors import CorruptBlob
from thaw.core.ids import digest, is_id, short
from thaw.data.header import DTYPE_BYTES, tensor_nbytes
from thaw.remote import layout
from thaw.remote.bucket import Bucket
from thaw.remote.errors import REPAIR

MAX_BYTES = 256 << 20


class PushedPack(msgspec.Struct, frozen=True, array_like=True):
    key: str
    nbytes: int


class PushedObject(msgspec.Struct, frozen=True, array_like=True):
    """An object's canonical JSON: bytes [offset, offset + nbytes) of pack number `pack`."""

    id: str
    pack: int
    offset: int
    nbytes: int


class PushedBlob(msgspec.Struct, frozen=True, array_like=True):
    """A blob, likewise; as which tensor it stands in its pack."""

    id: str
    pack: int
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


class PushedParent(msgspec.Struct, frozen=True, array_like=True):
    commit: str
    manifest: str


class Manifest(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="thaw.manifest/1", forbid_unknown_fields=True
):
    """`height`: the number of commits before it along first parents. `trail`: some of these, at growing distances, so
    that a history can be read in few steps (`trail_after`). It says nothing that parents do not."""

    commit: str
    namespace: str
    parents: tuple[PushedParent, ...]
    height: int
    trail: tuple[PushedParent, ...]
    packs: tuple[PushedPack, ...]
    objects: tuple[PushedObject, ...]
    blobs: tuple[PushedBlob, ...]


def trail_after(parent: Manifest) -> tuple[PushedParent, ...]:
    """The trail of a commit whose first parent this is: the commits before it at the heights that are left of the
    parent's when its binary digits are cleared one after the other, from the lowest on."""
    if not parent.height:
        return ()
    zeros = (parent.height & -parent.height).bit_length() - 1
    return parent.trail[zeros - 1 :] if zeros else (parent.parents[0], *parent.trail)


def encode(manifest: Manifest) -> bytes:
    return msgspec.json.encode(manifest, order="sorted")


_DECODER = msgspec.json.Decoder(Manifest)


def read(bucket: Bucket, key: str, commit: str, namespace: str) -> Manifest:
    """The manifest `key` of a commit. Raises `CorruptBlob` where it is missing, changed, or another's."""
    what = (
        f"the manifest of commit {short(commit)} in the remote ({layout.check_data_key(key, layout.MANIFESTS, 'it')})"
    )
    found = bucket.read(key)
    if found is None:
        raise CorruptBlob(f"{what} is not there any more: a gc removed it while it was read, or it is lost. {REPAIR}")
    if digest(found.data) != layout.digest_of(key) or len(found.data) > MAX_BYTES:
        raise CorruptBlob(f"{what} does not hash to its name; it was changed after it was written. {REPAIR}")
    manifest = decode(found.data, what)
    if manifest.commit != commit or manifest.namespace != namespace:
        raise CorruptBlob(
            f"{what} is of commit {manifest.commit[:80]!r} in namespace {manifest.namespace[:80]!r}; this one is "
            f"{namespace!r}"
        )
    return manifest


def decode(data: bytes, what: str) -> Manifest:
    """Raises `CorruptBlob` where it cannot be followed, `NewerFormat`."""
    try:
        manifest = _DECODER.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        refuse_newer(data, what)
        raise CorruptBlob(f"{what} cannot be read: {error}") from None
    for parent in (*manifest.parents, *manifest.trail):
        layout.check_data_key(parent.manifest, layout.MANIFESTS, what)
    for pack in manifest.packs:
        layout.check_data_key(pack.key, layout.PACKS, what)
    _check_places(manifest.objects, manifest.packs, what)
    _check_places(manifest.blobs, manifest.packs, what)
    for place in manifest.objects:
        if place.nbytes > MAX_OBJECT_BYTES:
            raise CorruptBlob(
                f"{what}: {place.id} has {place.nbytes:,} bytes; an object has {MAX_OBJECT_BYTES:,} at most"
            )
    for blob in manifest.blobs:
        if blob.dtype not in DTYPE_BYTES or tensor_nbytes(blob.dtype, blob.shape) != blob.nbytes:
            raise CorruptBlob(f"{what}: {blob.id} has {blob.nbytes} bytes; its dtype and shape say otherwise")
    return manifest


def _check_places(
    places: Iterable[PushedObject] | Iterable[PushedBlob], packs: tuple[PushedPack, ...], what: str
) -> None:
    for place in places:
        inside = 0 <= place.pack < len(packs) and place.offset >= 0 and place.nbytes > 0
        if not is_id(place.id) or not inside or place.offset + place.nbytes > packs[place.pack].nbytes:
            raise CorruptBlob(f"{what}: {place.id[:80]!r} has no place in its packs")
