"""`thaw weights add`: a model's folder becomes a weights set.

look    the folder is what its config says (`thaw.engines.hf.checkpoint`), and which tensor is which
hash    every tensor, several at a time: what the weights id is made of
write   what the store lacks, and the set's objects (`writing`)
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from thaw.core.errors import InvalidRequest, NotFound
from thaw.core.identity import weights_root
from thaw.core.ids import digest
from thaw.engines.hf import adapter, stored
from thaw.engines.hf.stored import StoredFile, StoredTensor, WeightsManifest
from thaw.store import Store
from thaw.weights import source
from thaw.weights.record import WeightsEntry
from thaw.weights.writing import FoundWeights, store_set

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
    called = check_name(_default_name(model, folder) if name is None else name, name is None)
    is_adapter = (folder / source.ADAPTER_CONFIG).is_file()
    if base is not None and not is_adapter:
        raise InvalidRequest("--base says what an adapter was trained on; this folder holds a whole model")
    extents = source.extents([adapter.weights_file(folder)] if is_adapter else _model_files(folder))
    if link:
        source.require_linkable(extents)
    with source.mapped(extents) as data:
        tensors = adapter.hashed(extents, data.__getitem__)
        made = _adapter(folder, tensors, base) if is_adapter else _model(folder, tensors, dtype)
        files = source.small_files(folder, made.kind)
        stored_files = {one: StoredFile(digest(text) if text else None, len(text)) for one, text in files.items()}
        made = msgspec.structs.replace(made, files=stored_files, code=source.code_files(folder))
        found = FoundWeights(called, made, extents, data, files, str(folder) if link else None)
        entry, written, is_new = store_set(store, found)
    return AddedWeights(
        entry=entry, nbytes_written=sum(one.nbytes for one in written), num_written=len(written), is_new=is_new,
        seconds=time.perf_counter() - began,
    )  # fmt: skip


def _default_name(model: str | Path, folder: Path) -> str:
    """A folder's name; of a hub id its last part."""
    return folder.name if Path(model).expanduser().is_dir() else str(model).rpartition("/")[2]


def _model_files(folder: Path) -> list[Path]:
    """The weight files of a model that is what its config says. Raises `IncompleteModel`, `NotFound`."""
    from thaw.engines.hf.checkpoint import require_files, require_whole

    require_whole(folder)
    paths = require_files(folder)
    if not paths:
        raise NotFound(f"{folder} has no model.safetensors and no model.safetensors.index.json")
    return paths


def check_name(name: str, from_folder: bool = False) -> str:
    """`name` if it may name a set. Raises `InvalidRequest`."""
    if _NAME.match(name) and ".." not in name:
        return name
    raise InvalidRequest(
        f"{name[:80]!r} cannot name a weights set: use letters, digits, '_', '-', '.' (at most 100)."
        + (" The folder is called so: name the set with --name." if from_folder else "")
    )


def _folder(model: str | Path) -> Path:
    if os.path.isfile(os.path.expanduser(str(Path(model) / source.ADAPTER_CONFIG))):  # False for an impossible name too
        return Path(model).expanduser().resolve()
    from thaw.engines.hf.checkpoint import local_folder

    found = local_folder(os.path.expanduser(str(model)))
    if found is None or not (found / "config.json").is_file():
        raise NotFound(f"there is no model {model} here: give a folder with config.json and safetensors files")
    if stored.is_stored(found):
        raise InvalidRequest(f"{found} is a stored model's own folder: its tensors lie in a repository already")
    return found.resolve()


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
    config, kind = adapter.config_of(folder)
    return WeightsManifest(
        kind="adapter", weights=adapter.adapter_id(tensors, config), dtype=_first_dtype(tensors), architecture=kind,
        tensors=tensors, base=base,
    )  # fmt: skip


def _first_dtype(tensors: Mapping[str, StoredTensor]) -> str:
    return next((stored.TORCH[one.dtype] for one in tensors.values()), "float32")
