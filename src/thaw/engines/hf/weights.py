"""The root of a model's weights: hashed tensor by tensor, whatever files they came in.

The root is one of the loaded module. Where the files hold that module's tensors under its own names, `root_of_folder`
takes them from there and nothing is loaded (`files.py`).

The root is cached beside the weights (or in the user's cache folder), keyed by every weight file's path, size and
times, by the config and by the dtype it was loaded in, so that a second boot does not hash again, whichever engine it
is.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from thaw.core.identity import weights_root
from thaw.core.ids import digest, is_id
from thaw.data.files import cache_dir, stamp
from thaw.engines.hf.leaves import hashed_tensors, leaf, raw
from thaw.engines.hf.stored import is_stored, root_of_stored

CACHE_NAME = ".thaw-weights.json"
SAMPLED = 16
"""Elements of a tensor."""
log = logging.getLogger(__name__)


def root_of_folder(folder: Path, dtype: str, overrides: Mapping[str, Any] | None = None) -> str:
    """The root that `hash_weights` gives for the model of `folder` (or of that hub id) loaded in `dtype`; cached.
    `overrides`: fields that the engine's config has in place of the folder's.

    A process that does not run the model gets it from the files, one tensor in memory at a time. Where they do not map
    one to one to the module, the model is loaded on the CPU to be hashed, and a log line says why. Raises OSError or
    ValueError when there is no such model, `IncompleteModel` when its files are not those of its config.
    """
    from thaw.engines.hf.checkpoint import local_folder
    from thaw.engines.hf.files import NotOneToOne, hash_files

    torch_dtype: torch.dtype = getattr(torch, dtype)
    folder = local_folder(folder) or folder
    if is_stored(folder):
        return root_of_stored(folder, dtype, overrides)
    key = files_key(folder, torch_dtype, overrides)
    known = None if key is None else cached_root(folder, key)
    if known is not None:
        return known
    try:
        root = hash_files(folder, torch_dtype, overrides)
    except NotOneToOne as reason:
        log.warning("thaw: the model is loaded on the CPU once, to hash its weights: %s", reason)
        root = hash_weights(_load(folder, torch_dtype, overrides))
    if key is not None:
        remember(folder, key, root)
    return root


def _load(folder: Path, dtype: torch.dtype, overrides: Mapping[str, Any] | None) -> Any:
    from thaw.engines.hf.checkpoint import (
        refuse_other_files,
        require_files,
        require_floats,
        require_loaded,
        without_report,
    )
    from thaw.engines.hf.config import ATTENTION, auto_class, load_config

    config = load_config(folder, overrides)
    refuse_other_files(folder, config)
    with without_report():
        module, info = auto_class(config).from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
            attn_implementation=ATTENTION,
        )  # fmt: skip
    require_loaded(folder, module, info)
    require_floats(folder, module, require_files(folder))
    return module


def root_of_module(module: Any, folder: Path | None) -> str:
    """The root of a loaded module's weights; cached if `folder`, which they came from, is given."""
    key = None if folder is None else files_key(folder, module.dtype)
    if folder is None or key is None:
        return hash_weights(module)
    known = cached_root(folder, key)
    if known is None:
        known = hash_weights(module)
        remember(folder, key, known)
    return known


def hash_weights(module: Any) -> str:
    """The Merkle root of all parameters and persistent buffers; tied parameters count once."""
    return weights_root({name: leaf(name, tensor) for name, tensor in hashed_tensors(module)})


def sample_weights(module: Any) -> str:
    """A digest of 16 elements of every parameter and buffer, spread over it: cheap; any ordinary update changes it.

    Every fork and every batch asks for it, so it takes one view of each tensor and one copy to the host per dtype."""
    picked: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            picked.setdefault((tensor.dtype, tensor.device), []).append(_spread(tensor.detach()))
        hasher = blake3()
        for found in picked.values():
            hasher.update(raw(torch.cat(found)))
    return hasher.hexdigest()


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    """At most 16 elements of a tensor at equal distances, [n]: a view where the tensor is contiguous."""
    step = max(1, tensor.numel() // SAMPLED)
    if not tensor.is_contiguous():
        return tensor.reshape(-1)[::step][:SAMPLED]
    return tensor.as_strided((min(SAMPLED, -(-tensor.numel() // step)),), (step,), tensor.storage_offset())


def files_key(folder: Path, dtype: torch.dtype, overrides: Mapping[str, Any] | None = None) -> str | None:
    """What the cached root hangs on: every weight file and index with its `stamp`, the config (which tensors there are,
    and which are tied) and the dtype. None: no weight files."""
    files = sorted(file for pattern in ("*.safetensors", "*.bin", "*.index.json") for file in folder.glob(pattern))
    if not files:
        return None
    stats = [(file.name, *stamp(file)) for file in files]
    config = folder / "config.json"
    said = [digest(config.read_bytes()) if config.is_file() else None, overrides or None]
    return digest(json.dumps([str(folder.resolve()), str(dtype), stats, *said], default=str).encode())


def _cache_files(folder: Path) -> list[Path]:
    return [folder / CACHE_NAME, cache_dir() / "weights" / (digest(str(folder.resolve()).encode())[3:35] + ".json")]


def cached_root(folder: Path, key: str) -> str | None:
    """The root that `remember` kept for `key`; None where there is none, or its file is damaged."""
    for path in _cache_files(folder):
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        root = found.get("weights") if isinstance(found, dict) and found.get("key") == key else None
        if isinstance(root, str) and is_id(root):
            return root
    return None


def remember(folder: Path, key: str, root: str) -> None:
    """Keep the root for the next boot: beside the weights, else in the user's cache folder, else nowhere."""
    text = json.dumps({"key": key, "weights": root})
    for path in _cache_files(folder):
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text)
            temporary.replace(path)
            return
        except OSError:
            continue
