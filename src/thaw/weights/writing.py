"""A weights set into the store: tensors that no pack holds, the small files, the manifest, and what keeps them.

Each tensor is hashed once more on its way into a pack: a file that changed since it was looked at is an error. Objects
and tag come in one transaction, before which nothing is visible. A gc that took a tensor away in between is a conflict,
and all is done again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from thaw.core.errors import Busy, Conflict, CorruptBlob, IncompleteModel
from thaw.core.ids import digest, short
from thaw.data.header import DTYPE_BYTES
from thaw.data.locations import BlobLocation
from thaw.data.pack import PackItem, write_pack
from thaw.engines.hf import stored
from thaw.engines.hf.stored import WeightsManifest
from thaw.store import Ref, RefUpdate, Store, Transaction
from thaw.weights import record
from thaw.weights.record import WeightsEntry
from thaw.weights.source import TensorExtent

PACK_BYTES = 2 << 30
"""Tensors in one pack, about: what gc copies at a time when part of it is dead."""
ATTEMPTS = 3
Stored = tuple[WeightsEntry, Sequence[BlobLocation], bool]
"""The set, the tensors that were written, and whether it is new."""


@dataclass(frozen=True)
class FoundWeights:
    """A set that is to be stored. `data`: the mapped bytes of each tensor; `files`: the small files; `link`: the folder
    in which the tensors stay."""

    name: str
    manifest: WeightsManifest
    extents: Mapping[str, TensorExtent]
    data: Mapping[str, memoryview]
    files: Mapping[str, bytes]
    link: str | None


def store_set(store: Store, found: FoundWeights) -> Stored:
    """Writes what is missing and records the set, on disk on return. One that was linked and is added without a link is
    copied then. Raises `Conflict` where another set has the name."""
    seen = record.view(store)
    for attempt in range(ATTEMPTS):
        there = seen.ref(found.name)
        old = None if there is None else record.entry(seen, found.name, there.target)
        if old is not None and _is_same(old, found):
            return old, [], False
        try:
            return _store(seen, found, there)
        except Busy:
            raise
        except Conflict:
            if attempt == ATTEMPTS - 1 or seen.ref(found.name) != there:
                raise
    raise AssertionError("unreachable")


def _is_same(old: WeightsEntry, found: FoundWeights) -> bool:
    """Whether nothing is left to do. Raises `Conflict` where it is another set."""
    manifest = found.manifest
    if old.manifest != digest(stored.encode(manifest)):
        raise Conflict(
            f"a weights set {old.name!r} is here already, from other files ({short(old.weights)}; these are "
            f"{short(manifest.weights)}): choose another --name, or remove it first (thaw weights rm {old.name})"
        )
    return old.link is None or found.link is not None


def _store(seen: Store, found: FoundWeights, there: Ref | None) -> Stored:
    name, manifest, encoded = found.name, found.manifest, stored.encode(found.manifest)
    tensors = {} if found.link is not None else manifest.tensors
    wanted = {one.blob: at for at, one in tensors.items() if one.blob is not None}
    small = {digest(text): text for text in (*found.files.values(), encoded) if text}
    with seen.begin() as tx:
        written = _write_tensors(seen, tx, found, [at for blob, at in wanted.items() if not _has(seen, blob)])
        new_small = [text for blob, text in small.items() if not _has(seen, blob)]
        if new_small:
            _write(seen, tx, [PackItem("", "U8", (len(text),), len(text), partial(_same, text)) for text in new_small])
        commit = record.put(tx, manifest, digest(encoded), [*wanted, *small], name, found.link)
        expect, reason = None if there is None else there.target, f"weights add: {name}"
        tx.commit(RefUpdate(name=name, kind="tag", target=commit, expect=expect, reason=reason))
    return record.entry(seen, name, commit), written, True


def _write_tensors(seen: Store, tx: Transaction, found: FoundWeights, missing: Sequence[str]) -> list[BlobLocation]:
    """These tensors, in packs. Raises `IncompleteModel` for one that is not what it was."""
    seen.require_room(sum(found.extents[at].nbytes for at in missing))
    items = [_item(found.extents[at], found.data[at]) for at in missing]
    written = [place for some in _packs(items) for place in _write(seen, tx, some)]
    for at, place in zip(missing, written, strict=True):
        if place.blob != found.manifest.tensors[at].blob:
            raise IncompleteModel(f"tensor {at} changed while it was read; add the model when no program writes to it")
    return written


def _has(store: Store, blob: str) -> bool:
    """Whether a pack holds it now; a gc that takes it away before the commit makes that a `Conflict`."""
    with contextlib.suppress(CorruptBlob):
        store.locate([blob])
        return True
    return False


def _item(one: TensorExtent, data: memoryview) -> PackItem:
    if one.dtype in DTYPE_BYTES:
        return PackItem("", one.dtype, one.shape, one.nbytes, partial(_same, data))
    return PackItem("", "U8", (one.nbytes,), one.nbytes, partial(_same, data))


def _same(data: memoryview | bytes) -> memoryview | bytes:
    return data


def _packs(items: Sequence[PackItem]) -> Iterator[list[PackItem]]:
    some: list[PackItem] = []
    for item in items:
        if some and sum(one.nbytes for one in some) + item.nbytes > PACK_BYTES:
            yield some
            some = []
        some.append(item)
    if some:
        yield some


def _write(store: Store, tx: Transaction, items: Sequence[PackItem]) -> Sequence[BlobLocation]:
    result = write_pack(store.packs, tx.lease_pack(), items, metadata={"thaw.store": store.uuid})
    tx.add_pack(result.name, result.nbytes, result.blobs)
    return result.blobs
