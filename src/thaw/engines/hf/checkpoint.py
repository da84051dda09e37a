"""Whether a model's files hold the model that its config describes: every tensor of it once, and nothing else.

transformers fills what a checkpoint lacks with random numbers and only logs it; SGLang leaves the memory as it was. KV
of such a model belongs to weights that nobody has again, so no engine of thaw's runs it. What loading would make of the
files is asked of transformers itself, with tensors that have shapes and no bytes: renamed, merged and tied ones count
as it counts them.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import logging as transformers_logging

from thaw.core.errors import IncompleteModel, InvalidRequest, NotFound, Unsupported
from thaw.engines.hf.beside import AGAIN, CUT, is_there, read_text, refuse_pointer, require_beside
from thaw.engines.hf.config import ATTENTION, auto_class, function_config, load_config, sensible
from thaw.engines.hf.stored import MANIFEST, is_stored, manifest_of

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What transformers looks for, in its order."""
ADAPTER = "adapter_config.json"
FLOATS = ("F64", "F32", "F16", "BF16")
TORCH_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NO_WEIGHTS = ("training_args.bin", "optimizer.bin")
"""Files that engines leave out, by what they are called."""
MAPPINGS = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
UNREAD = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
"""Names of buffers in old checkpoints, beside those that a class lists itself."""


def require_whole(model: str | Path, overrides: Mapping[str, Any] | None = None) -> None:
    """Raise `IncompleteModel` unless the files of `model` (a folder, or a hub id that was fetched before) are whole and
    hold the tensors of its config with `overrides`, in its shapes, under names and in files that served engines read
    as transformers does. Reads headers, and tied tensors that are there twice.

    Says nothing of a model that is not here, that transformers does not know, or (of its tensors) whose weights are
    quantised.
    """
    folder = local_folder(model)
    if folder is None:
        return
    paths = require_files(folder)
    _require_same_files(folder, paths)
    like = _require_fit(folder, paths, overrides)
    if like is not None:
        _require_names(folder, like, _shapes(paths))


def require_fit(folder: Path) -> list[Path]:
    """As `require_whole`, but of what transformers alone makes of a folder. The weight files that it loads."""
    paths, index = require_files(folder), _first(folder)
    if index is not None and index.suffix == ".json" and "metadata" not in json.loads(read_text(index)):
        raise IncompleteModel(
            f"{index} has no 'metadata', without which transformers reads no index; add \"metadata\": {{}} to it"
        )
    _require_fit(folder, paths, None)
    return paths


def _require_fit(folder: Path, paths: Collection[Path], overrides: Mapping[str, Any] | None) -> Any:
    """The module on the meta device; None where nothing can be said of it."""
    try:
        config = load_config(folder, overrides)
    except (OSError, ValueError, Unsupported):
        return None
    refuse_other_files(folder, config)
    quantised = getattr(config, "quantization_config", None) is not None
    if not paths or quantised or not any(type(config) in known for known in MAPPINGS):
        return None
    with torch.device("meta"), sensible(folder):
        like = auto_class(config).from_config(config, trust_remote_code=False, attn_implementation=ATTENTION)
    with quiet():
        try:
            module, info = type(like).from_pretrained(
                None, config=config, state_dict=_shapes(paths), device_map="meta", output_loading_info=True,
                ignore_mismatched_sizes=True, attn_implementation=ATTENTION,
            )  # fmt: skip
        except RuntimeError as error:
            raise IncompleteModel(f"the tensors of {folder} do not fit: {str(error)[:300]}; {AGAIN}") from None
    require_loaded(folder, module, info)
    require_floats(folder, like, paths)
    _require_ties(folder, like, paths)
    return like


def refuse_other_files(folder: Path, config: Any) -> None:
    """Raise `IncompleteModel` where transformers would load other files than those that `require_files` looked at."""
    if getattr(config, "transformers_weights", None) is not None:
        raise IncompleteModel(
            f"the config of {folder} names weight files of its own (transformers_weights), which other engines do not "
            "read; take that out, and name the file model.safetensors"
        )


def require_floats(model: str | Path, module: Any, paths: Collection[Path]) -> None:
    """Raise `IncompleteModel` where `paths` hold integers, or floats of 8 bits or less, for a tensor of floats of
    `module`, whose config does not say that weights are quantised: engines would take the numbers as they stand."""
    own, prefix = module.state_dict(), module.base_model_prefix
    unread = re.compile("|".join((*UNREAD, *(module._keys_to_ignore_on_load_unexpected or ()))))
    for header in (header for path in paths for header in _headers(path)):
        place = own.get(header.name, own.get(f"{prefix}.{header.name}"))
        is_for_floats = place.is_floating_point() if place is not None else not unread.search(header.name)
        if not header.is_float and is_for_floats:
            raise IncompleteModel(
                f"the files of {model} have {header.name} in {header.dtype}, and its config does not say that weights "
                f"are quantised; add its quantization_config to config.json, or {AGAIN}"
            )


def require_weights_of(model: str | Path, source: str | Path) -> None:
    """Raise unless `source` is a folder whose weights may run in place of those of `model`: `NotFound` where there is
    none, `IncompleteModel` as `require_whole`, `InvalidRequest` where its config is of another function."""
    if not is_there(Path(source) / "config.json"):
        raise NotFound(f"{source} has no config.json: give a folder with weights of {model}")
    require_whole(source)
    with sensible(source):
        require_same_function(source, load_config(source), load_config(model))


def require_same_function(source: str | Path, theirs: Any, ours: Any) -> None:
    """Raise `InvalidRequest`, naming the fields, where the config of `source` is not that of the model that runs."""
    one, two = (function_config(config.to_dict()) for config in (theirs, ours))
    differ = sorted(field for field in one.keys() | two.keys() if one.get(field) != two.get(field))
    if differ:
        raise InvalidRequest(f"the weights of {source} are of another model ({', '.join(differ)}): load that one")


def require_loaded(model: str | Path, module: Any, info: Mapping[str, Any]) -> None:
    """Raise `IncompleteModel` where `from_pretrained` (which returned `module` and `info`) had to make anything up."""
    said = [*_missing(module, info["missing_keys"]), *_unexpected(info["unexpected_keys"])]
    said += [_misshapen(found) for found in sorted(info["mismatched_keys"])[:3]]
    if said:
        raise IncompleteModel(f"the files of {model} are not those of its config: {'; '.join(said)}")
    untied = _ties(module).keys() - module.all_tied_weights_keys.keys()
    if untied:
        name = min(untied)
        raise _differing(model, name, _ties(module)[name])


def require_files(folder: Path) -> list[Path]:
    """The weight files that transformers loads from `folder`; of a stored model, its manifest.

    Raises `IncompleteModel` for a file that a boot reads and that is a Git LFS pointer, was cut short, is not what its
    name says, or is missing though the index names it, and for a tensor that stands elsewhere than the index says;
    `StorageFailed` for a file that this user may not read, `Unsupported` for an adapter."""
    require_beside(folder)
    if is_there(folder / ADAPTER):
        raise Unsupported(
            f"{folder} holds an adapter ({ADAPTER}), which some engines put on the model and others leave out: merge "
            "it into the model (merge_and_unload) and save that"
        )
    index = _first(folder)
    if index is None:
        return [folder / MANIFEST] if is_stored(folder) else []
    if index.suffix != ".json":
        _headers(index)
        return [index]
    return _shards(folder, index)


def _first(folder: Path) -> Path | None:
    """The file by which transformers finds the weights in `folder`."""
    return next((folder / name for name in WEIGHTS if is_there(folder / name)), None)


def local_folder(model: str | Path) -> Path | None:
    """Where the files of a folder or of a hub id that was fetched before are; nothing is fetched."""
    if os.path.isdir(model):  # False for a name that no file can have
        return Path(model)
    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        return None


def _shards(folder: Path, index: Path) -> list[Path]:
    """The files that the index names, once each tensor was found in the one where it says, and in no other: engines
    load all of them, and which of two would run depends on the order of their names."""
    named = _weight_map(index)
    paths = sorted({folder / name for name in named.values()})
    gone = [path.name for path in paths if not is_there(path)]
    if gone:
        raise IncompleteModel(f"{index} names {len(paths)} files, and {_some(gone)} {_is(gone)} missing; {AGAIN}")
    where: dict[str, str] = {}
    for path in paths:
        for header in _headers(path):
            if header.name in where:
                both = f"{where[header.name]} and in {path.name}"
                raise IncompleteModel(f"{header.name} is in {both} of {folder}; {AGAIN}")
            where[header.name] = path.name
    for name, file in named.items():
        if where.get(name) != file:
            found = f"it is in {where[name]}" if name in where else "it is not there"
            raise IncompleteModel(f"{index} says that {name} is in {file}, and {found}; {AGAIN}")
    return paths


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, as the index has it: one of its own folder, for there alone engines look."""
    try:
        said = json.loads(read_text(index))
        named: dict[str, str] = msgspec.convert(said["weight_map"], dict[str, str])
        elsewhere = [name for name in named.values() if Path(name).name != name]
        if not named or elsewhere:
            raise ValueError(f"{min(elsewhere)!r} is no file beside it" if elsewhere else "it names no files")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IncompleteModel(f"{index} is no index of weights: {error!r}; {AGAIN}") from None
    return named


@dataclass(frozen=True)
class Header:
    """What a file says of one of its tensors. `dtype`: in the file's own word; `is_float`: of 16 bits or more."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    is_float: bool


def _headers(path: Path) -> list[Header]:
    """Every tensor of a weight file. Raises `IncompleteModel` where it cannot be read."""
    refuse_pointer(path)
    if path.name == MANIFEST:
        stored = manifest_of(path.parent).tensors
        return [Header(name, one.shape, one.dtype, one.dtype in FLOATS) for name, one in stored.items()]
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                kinds = {name: str(one.get_dtype()) for name, one in slices.items()}
                return [Header(n, tuple(s.get_shape()), kinds[n], kinds[n] in FLOATS) for n, s in slices.items()]
        loaded = torch.load(path, map_location="meta", weights_only=True)
        return [Header(n, tuple(t.shape), str(t.dtype), t.dtype in TORCH_FLOATS) for n, t in loaded.items()]
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError, OSError, AttributeError) as error:
        raise IncompleteModel(
            f"{path} ({path.stat().st_size} bytes) cannot be read as weights: {str(error)[:200]}. {CUT}"
        ) from None


def _shapes(paths: Collection[Path]) -> dict[str, torch.Tensor]:
    """Every tensor of the files by its name there, without bytes."""
    return {h.name: torch.empty(h.shape, device="meta") for path in paths for h in _headers(path)}


def _ties(module: Any) -> dict[str, str]:
    """Tied tensors as the config has it, each with the one that it is."""
    found: dict[str, str] = module.get_expanded_tied_weights_keys(all_submodels=True)
    return found


def _require_same_files(folder: Path, paths: Collection[Path]) -> None:
    """vLLM and SGLang load every weight file of the folder, or all of those that the index names, where transformers
    loads `paths`: what ran would not be what the identity is of."""
    index = folder / WEIGHTS[1]
    found = sorted(folder.glob("*.safetensors"))
    if found and index.is_file():
        named = set(_weight_map(index).values())
        found = [path for path in found if path.name in named]
    found = found or [path for path in sorted(folder.glob("*.bin")) if path.name not in NO_WEIGHTS]
    if not found and is_stored(folder):
        return
    differing = {path.name for path in paths} ^ {path.name for path in found}
    if paths and differing:
        raise IncompleteModel(
            f"{folder} has weights that transformers loads and others that vLLM and SGLang load ({_some(differing)}): "
            "leave the files of one model there, and move the others out"
        )


def _require_names(folder: Path, like: Any, names: Collection[str]) -> None:
    """transformers finds a body's tensors without their prefix, and a tied tensor under either of its names; vLLM and
    SGLang do not, and SGLang then runs what happened to be in memory. Files of a class of several parts have names of
    their own."""
    known, prefix = like.state_dict().keys(), like.base_model_prefix
    several = like.config is not like.config.get_text_config()
    bare = [name for name in names if name not in known and f"{prefix}.{name}" in known]
    if bare and prefix == "model" and not several:  # of GPT-2 and others these are the usual names, and read as such
        raise IncompleteModel(
            f"the files of {folder} name tensors without the prefix {prefix!r} ({_some(bare)}), as a body alone is "
            "saved; load it with transformers and save the whole model"
        )
    for name, source in _ties(like).items():
        if name in names and source in known and source not in names:
            raise IncompleteModel(
                f"the files of {folder} have {name} and not {source}, to which the config ties it and which engines "
                "other than transformers read; load it with transformers and save it again"
            )


def _require_ties(folder: Path, like: Any, paths: Collection[Path]) -> None:
    """Tied tensors that are in the files under both names must be equal: engines differ in which they would run."""
    where = {}
    for path in paths:
        where.update(dict.fromkeys(_shapes([path]), path))
    for name, source in _ties(like).items():
        if name in where and source in where and not _equal(where[name], name, where[source], source):
            raise _differing(folder, name, source)


def _equal(path: Path, name: str, other_path: Path, other: str) -> bool:
    if path.name == MANIFEST:
        stored = manifest_of(path.parent).tensors
        return stored[name].is_same(stored[other])
    return torch.equal(_tensor(path, name), _tensor(other_path, other))


def _tensor(path: Path, name: str) -> torch.Tensor:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            read: torch.Tensor = file.get_tensor(name)
            return read
    loaded: torch.Tensor = torch.load(path, mmap=True, weights_only=True)[name]
    return loaded


def _differing(model: str | Path, name: str, source: str) -> IncompleteModel:
    return IncompleteModel(
        f"the config of {model} ties {name} to {source}, and its files hold two that differ; set tie_word_embeddings "
        f"to false in config.json to run both, or take {name} out of the files"
    )


def _missing(module: Any, names: Collection[str]) -> Iterator[str]:
    if not names:
        return
    could_tie = [name for name in names if name in (module._tied_weights_keys or ())]
    way = "set tie_word_embeddings to true in config.json if the head is the embedding, else " if could_tie else ""
    yield f"{_count(names, 'tensor')} {_is(names)} missing ({_some(names)}): {way}{AGAIN}"


def _unexpected(names: Collection[str]) -> Iterator[str]:
    if names:
        yield (
            f"there is no place for {_count(names, 'tensor')} ({_some(names)}): correct config.json, or take "
            f"{'it' if len(names) == 1 else 'them'} out of the files"
        )


def _misshapen(found: tuple[str, Collection[int], Collection[int]]) -> str:
    name, shape, wanted = found
    return f"{name} has the shape {list(shape)}, the config says {list(wanted)}"


def _some(names: Collection[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (", …" if len(names) > len(first) else "")


def _count(names: Collection[str], what: str) -> str:
    return f"{len(names)} {what}{'' if len(names) == 1 else 's'}"


def _is(names: Collection[str]) -> str:
    return "is" if len(names) == 1 else "are"


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' own report of the load, and its progress bar, stay out of the log."""
    before, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if bar:
            transformers_logging.enable_progress_bar()


@contextmanager
def without_report() -> Iterator[None]:
    """transformers' report of a load stays out of the log, where `require_loaded` says what is in it."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()
