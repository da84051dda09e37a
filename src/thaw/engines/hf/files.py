"""A model's weights straight from its safetensors files, as transformers would load them, without loading the model.

A skeleton of the module on the meta device (names, shapes, dtypes, ties; no bytes) says what loading would make of the
files. Names must agree one to one, a tied tensor being there under one of its names; then every tensor is read, cast
to the skeleton's dtype and hashed, one at a time. Whatever else loading might do to a tensor is refused with
`NotOneToOne`: renamed or merged tensors, tensors that the module has no use for, modules kept in float32, quantised
weights, other formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from thaw.core.identity import weights_root
from thaw.engines.hf.checkpoint import require_files, require_floats
from thaw.engines.hf.config import ATTENTION, auto_class, load_config, sensible
from thaw.engines.hf.leaves import hashed_tensors, leaf
from thaw.engines.hf.stored import TORCH, StoredTensor


class NotOneToOne(Exception):
    """The files alone do not say what the loaded module holds; the message says why, without a path."""


def skeleton(folder: Path, dtype: torch.dtype, overrides: Mapping[str, Any] | None = None) -> Any:
    """The module that transformers would load from `folder` in `dtype`, on the meta device: everything but its bytes.
    `overrides`: see `load_config`.

    Raises what `load_config` raises.
    """
    config = load_config(folder, overrides)
    with torch.device("meta"), sensible(folder):
        return auto_class(config).from_config(
            config, dtype=dtype, trust_remote_code=False, attn_implementation=ATTENTION
        )


def hash_files(folder: Path, dtype: torch.dtype, overrides: Mapping[str, Any] | None = None) -> str:
    """The root of the weights in `folder` loaded in `dtype`, from its files. Raises `NotOneToOne`, or `IncompleteModel`
    for files that are cut short or missing."""
    paths = _weight_files(folder)
    module = skeleton(folder, dtype, overrides)
    _refuse_conversions(module, dtype)
    require_floats(folder, module, paths)
    with ExitStack() as stack:
        files = _open(paths, stack)
        names = _names(module)
        unknown = files.keys() - {name for all_names in names.values() for name in all_names}
        if unknown:
            raise NotOneToOne(f"the files have {len(unknown)} tensors that it does not have ({min(unknown)})")
        leaves = {}
        for name, like in hashed_tensors(module):
            leaves[name] = leaf(name, _read(files, names[name], like))
        return weights_root(leaves)


def one_to_one(
    folder: Path, dtype: torch.dtype, tensors: Mapping[str, StoredTensor], overrides: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """For each tensor that the root of a module is made of, by its name there, the one of `tensors` that loading in
    `dtype` takes as it is: what `hash_files` would hash. Reads no tensor. Raises `NotOneToOne`."""
    module = skeleton(folder, dtype, overrides)
    _refuse_conversions(module, dtype)
    names = _names(module)
    unknown = tensors.keys() - {name for all_names in names.values() for name in all_names}
    if unknown:
        raise NotOneToOne(f"the files have {len(unknown)} tensors that it does not have ({min(unknown)})")
    return {name: _same(tensors, names[name], like) for name, like in hashed_tensors(module)}


def _same(tensors: Mapping[str, StoredTensor], names: list[str], like: torch.Tensor) -> str:
    """Under which of `names` the tensor stands, in the shape and dtype of `like`."""
    found = [name for name in names if name in tensors]
    if not found:
        raise NotOneToOne(f"the files have no tensor {names[0]}")
    first = tensors[found[0]]
    if first.shape != tuple(like.shape):
        raise NotOneToOne(f"{found[0]} has the shape {list(first.shape)}, not {list(like.shape)}")
    if getattr(torch, TORCH[first.dtype]) != like.dtype:
        raise NotOneToOne(f"{found[0]} is cast from {TORCH[first.dtype]} to {like.dtype}")
    if not all(first.is_same(tensors[other]) for other in found[1:]):
        raise NotOneToOne(f"{' and '.join(found)} should be one tensor and differ")
    return found[0]


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read: one, or those that the index names."""
    paths = require_files(folder)
    if not paths or any(path.suffix != ".safetensors" for path in paths):
        raise NotOneToOne("there is no model.safetensors and no model.safetensors.index.json")
    return paths


def _refuse_conversions(module: Any, dtype: torch.dtype) -> None:
    """What changes tensors between file and module, or their dtype, and need not show in their names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    config = module.config
    if getattr(config, "quantization_config", None) is not None:
        raise NotOneToOne("the weights are quantised")
    if getattr(config, "transformers_weights", None) is not None:
        raise NotOneToOne("the config names weight files of its own")
    kept = [*(module._keep_in_fp32_modules or ()), *(module._keep_in_fp32_modules_strict or ())]
    if kept and dtype != torch.float32:
        raise NotOneToOne(f"some modules stay in float32 ({min(kept)})")
    if not all(isinstance(step, WeightRenaming) for step in get_model_conversion_mapping(module)):
        raise NotOneToOne("tensors are merged or reordered when it is loaded")


def _open(paths: list[Path], stack: ExitStack) -> dict[str, Any]:
    """The open file of every tensor's name."""
    files: dict[str, Any] = {}
    for path in paths:
        file = stack.enter_context(safe_open(path, framework="pt"))
        for name in file.keys():  # noqa: SIM118 (no mapping: it cannot be iterated)
            if name in files:
                raise NotOneToOne(f"two files have a tensor {name}")
            files[name] = file
    return files


def _names(module: Any) -> dict[str, list[str]]:
    """Every name of each tensor by its first one: tied tensors have several."""
    by_tensor: dict[int, list[str]] = {}
    every = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in every:
        by_tensor.setdefault(id(tensor), []).append(name)
    return {names[0]: names for names in by_tensor.values()}


def _read(files: dict[str, Any], names: list[str], like: torch.Tensor) -> torch.Tensor:
    """The tensor that stands under any of `names`, in the dtype of `like`; under several it must be the same."""
    found = [files[name].get_tensor(name).to(like.dtype) for name in names if name in files]
    if not found:
        raise NotOneToOne(f"the files have no tensor {names[0]}")
    first: torch.Tensor = found[0]
    if first.shape != like.shape:
        raise NotOneToOne(f"{names[0]} has the shape {list(first.shape)}, not {list(like.shape)}")
    if not all(torch.equal(first, other) for other in found[1:]):
        raise NotOneToOne(f"{' and '.join(names)} should be one tensor and differ")
    return first
