"""`thaw weights add`: a model's folder into packs. What the store has already is not written again.

    look    the folder is what its config says (`thaw.engines.hf.checkpoint`), and which tensor is which
    hash    every tensor, several at a time
    write   those that no pack holds, each hashed once more on its way: a file that changes meanwhile is an error
    record  manifest, objects and tag in one transaction

Before the last step nothing is visible. A gc that took a tensor away in between is a conflict, and all is done again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from thaw.core.errors import Busy, Conflict, CorruptBlob, IncompleteModel, InvalidRequest, NotFound
from thaw.core.identity import weights_root
from thaw.core.ids import digest, short
from thaw.data.header import DTYPE_BYTES
from thaw.data.locations import BlobLocation
from thaw.data.pack import PackItem, write_pack
from thaw.engines.hf import stored
from thaw.engines.hf.stored import StoredFile, StoredTensor, WeightsManifest
from thaw.store import RefUpdate, Store, Transaction
from thaw.weights import record, source
from thaw.weights.record import WeightsEntry
from thaw.weights.source import TensorExtent

PACK_BYTES = 2 << 30
"""Tensors in one pack, about: what gc copies at a time when part of it is dead."""
ATTEMPTS = 3
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}\Z")


class AddedWeights(msgspec.Struct, frozen=True, kw_only=True):
    """A set that is stored. `nbytes_written`: of tensors that no pack held; `is_new`: False where the very set was here
    under this name."""

    entry: WeightsEntry
    nbytes_written: int
    num_written: int
    is_new: bool
    seconds: float


def add(
    store: Store,
    model: str | Path,
    name: str | None = None,
    *,
    dtype: str | None = None,
    base: str | None = None,
    link: bool = False,
) -> AddedWeights:
    """See `WeightsBook.add`."""
    began = time.perf_counter()
    folder = _folder(model)
    chosen = check_name(folder.name if name is None else name, name is None)
    is_adapter = (folder / source.ADAPTER_CONFIG).is_file()
    if is_adapter:
        found = source.extents([_adapter_file(folder)])
    else:
        from thaw.engines.hf.checkpoint import require_files, require_whole

        require_whole(folder)
        found = source.extents(require_files(folder))
        if not found:
            raise NotFound(f"{folder} has no model.safetensors and no model.safetensors.index.json")
    if link:
        source.require_linkable(found)
    at = str(folder) if link else None
    with source.mapped(found) as data:
        tensors = _hashed(found, data)
        if is_adapter:
            made = _adapter(folder, tensors, base)
        else:
            if base is not None:
                raise InvalidRequest("--base says what an adapter was trained on; this folder holds a whole model")
            made = _model(folder, tensors, dtype)
        files = source.small_files(folder, made.kind)
        made = msgspec.structs.replace(
            made,
            files={one: StoredFile(digest(text) if text else None, len(text)) for one, text in files.items()},
            code=source.code_files(folder),
        )
        for attempt in range(ATTEMPTS):
            try:
                entry, written, is_new = _store(store, chosen, made, found, data, files, at)
                break
            except Busy:
                raise
            except Conflict:
                if attempt == ATTEMPTS - 1 or _is_named(store, chosen):
                    raise
    return AddedWeights(
        entry=entry, nbytes_written=sum(one.nbytes for one in written), num_written=len(written), is_new=is_new,
        seconds=time.perf_counter() - began,
    )  # fmt: skip


def check_name(name: str, from_folder: bool = False) -> str:
    """`name` if it may name a set. Raises `InvalidRequest`."""
    if _NAME.match(name) and ".." not in name:
        return name
    raise InvalidRequest(
        f"{name[:80]!r} cannot name a weights set: use letters, digits, '_', '-', '.' (at most 100)."
        + (" The folder is called so: name the set with --name." if from_folder else "")
    )


def _folder(model: str | Path) -> Path:
    if (Path(model).expanduser() / source.ADAPTER_CONFIG).is_file():
        return Path(model).expanduser().resolve()
    from thaw.engines.hf.checkpoint import local_folder

    found = local_folder(os.path.expanduser(str(model)))
    if found is None or not (found / "config.json").is_file():
        raise NotFound(f"there is no model {model} here: give a folder with config.json and safetensors files")
    if stored.is_stored(found):
        raise InvalidRequest(f"{found} is a stored model's own folder: its tensors lie in a repository already")
    return found.resolve()


def _adapter_file(folder: Path) -> Path:
    path = folder / source.ADAPTER_FILE
    if not path.is_file():
        raise IncompleteModel(f"{folder} has {source.ADAPTER_CONFIG} and no {source.ADAPTER_FILE}; get the files again")
    return path


def _hashed(found: Mapping[str, TensorExtent], data: Mapping[str, memoryview]) -> dict[str, StoredTensor]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="thaw-hash") as pool:
        ids = dict(zip(found, pool.map(lambda name: digest(data[name]) if data[name] else None, found), strict=True))
    return {name: StoredTensor(ids[name], one.dtype, one.shape, one.offset % 64) for name, one in found.items()}


def _model(folder: Path, tensors: dict[str, StoredTensor], dtype: str | None) -> WeightsManifest:
    from thaw.engines.hf.files import NotOneToOne, one_to_one
    from thaw.weights.roots import architecture_of, dtype_of, root_of, torch_dtype

    runs = dtype or dtype_of(folder, tensors)
    try:
        leaves = one_to_one(folder, torch_dtype(runs), tensors)
        weights = weights_root({name: stored.leaf(name, tensors[at]) for name, at in leaves.items()})
    except NotOneToOne:
        leaves, weights = {}, root_of(folder, runs)
    return WeightsManifest(
        kind="model", weights=weights, dtype=runs, architecture=architecture_of(folder), tensors=tensors, leaves=leaves
    )


def _adapter(folder: Path, tensors: dict[str, StoredTensor], base: str | None) -> WeightsManifest:
    """Its id is the root of its tensors, and of its config as one more leaf."""
    config = (folder / source.ADAPTER_CONFIG).read_bytes()
    try:
        said: Any = json.loads(config)
        kind = str(said.get("peft_type") or "adapter")
    except (ValueError, AttributeError) as error:
        raise IncompleteModel(f"{folder / source.ADAPTER_CONFIG} is no config of an adapter: {error}") from None
    return WeightsManifest(
        kind="adapter", weights=adapter_id(tensors, config), dtype=_first_dtype(tensors), architecture=kind,
        tensors=tensors, base=base,
    )  # fmt: skip


def adapter_id(tensors: Mapping[str, StoredTensor], config: bytes) -> str:
    """The id of an adapter: the root of its tensors' leaves and its config's, named as its file."""
    leaves = {name: stored.leaf(name, one) for name, one in tensors.items()}
    text = StoredTensor(digest(config), "U8", (len(config),))
    return weights_root({**leaves, source.ADAPTER_CONFIG: stored.leaf(source.ADAPTER_CONFIG, text)})


def _first_dtype(tensors: Mapping[str, StoredTensor]) -> str:
    return next((stored.TORCH[one.dtype] for one in tensors.values()), "float32")


# --- writing


def _store(
    store: Store,
    name: str,
    manifest: WeightsManifest,
    found: Mapping[str, TensorExtent],
    data: Mapping[str, memoryview],
    files: Mapping[str, bytes],
    link: str | None,
) -> tuple[WeightsEntry, list[BlobLocation], bool]:
    """Writes what is missing and records the set. Returns (entry, the tensors written, whether it is new).

    With `link` no tensor is written. A set that was linked and is added without is copied then."""
    seen = record.view(store)
    encoded = stored.encode(manifest)
    named = digest(encoded)
    there = seen.ref(name)
    if there is not None:
        old = record.entry(seen, name, there.target)
        if old.manifest == named and (old.link is None or link is not None):
            return old, [], False
    if there is not None and old.manifest != named:
        raise Conflict(
            f"a weights set {name!r} is here already, of other files ({short(old.weights)}; these are "
            f"{short(manifest.weights)}): choose another --name, or remove it first (thaw weights rm {name})"
        )
    with seen.begin() as tx:
        small = {digest(text): text for text in (*files.values(), encoded) if text}
        tensors = {} if link is not None else manifest.tensors
        wanted = {one.blob: at for at, one in tensors.items() if one.blob is not None}
        missing = [at for blob, at in wanted.items() if not _has(seen, blob)]
        seen.require_room(sum(found[at].nbytes for at in missing))
        items = [_item(found[at], data[at]) for at in missing]
        written = [place for some in _packs(items) for place in _write(seen, tx, some)]
        _require_same(missing, manifest, written)
        new_small = [text for blob, text in small.items() if not _has(seen, blob)]
        if new_small:
            _write(seen, tx, [_bytes_item(text) for text in new_small])
        in_packs = {*wanted, *small} if link is not None else {*manifest.blobs, named}
        commit = record.put(tx, manifest, named, list(in_packs), name, link)
        expect = None if there is None else there.target
        tx.commit(RefUpdate(name=name, kind="tag", target=commit, expect=expect, reason=f"weights add: {name}"))
    return record.entry(seen, name, commit), written, True


def _is_named(store: Store, name: str) -> bool:
    return record.view(store).ref(name) is not None


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


def _bytes_item(text: bytes) -> PackItem:
    return PackItem("", "U8", (len(text),), len(text), lambda: text)


def _same(data: memoryview) -> memoryview:
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


def _require_same(missing: Sequence[str], manifest: WeightsManifest, written: Sequence[BlobLocation]) -> None:
    for name, place in zip(missing, written, strict=True):
        if place.blob != manifest.tensors[name].blob:
            raise IncompleteModel(f"tensor {name} changed while it was read; add the model when nobody writes to it")
