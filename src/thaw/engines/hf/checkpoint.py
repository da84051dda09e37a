"""Whether a model's files hold the model that its config describes: every tensor of it once, and nothing else.

transformers fills what a checkpoint lacks with random numbers and only logs it; SGLang leaves the memory as it was. KV
of such a model belongs to weights that nobody has again, so no engine of thaw's runs it. What loading would make of the
files is asked of transformers itself, with tensors that have shapes and no bytes: renamed, merged and tied ones count
as it counts them.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from thaw.core.errors import IncompleteModel, InvalidRequest, NotFound
from thaw.engines.hf.config import function_config, load_config

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What transformers looks for, in its order."""
READ_BESIDE = ("*.json", "*.jinja", "*.model", "*.txt")
LFS_HEAD = b"version https://git-lfs.github.com/spec/"
LFS_NBYTES = 1024
"""A pointer is shorter than this."""
AGAIN = "get the files again"


def require_whole(model: str | Path, overrides: Mapping[str, Any] | None = None) -> None:
    """Raise `IncompleteModel` unless the files of `model` (a folder, or a hub id that was fetched before) are whole and
    hold the tensors of its config with `overrides`, in its shapes, under names that served engines look for. Reads
    headers, and tied tensors that are there twice.

    Says nothing of a model that is not here, that transformers does not know, or whose weights are quantised.
    """
    folder = local_folder(model)
    if folder is None:
        return
    paths = require_files(folder)
    try:
        config = load_config(folder, overrides)
        with torch.device("meta"):
            like = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError):
        return
    if not paths or getattr(config, "quantization_config", None) is not None:
        return
    shapes = _shapes(paths)
    with _quiet():
        try:
            module, info = type(like).from_pretrained(
                None, config=config, state_dict=shapes, device_map="meta", output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
        except RuntimeError as error:
            raise IncompleteModel(f"the tensors of {folder} do not fit: {str(error)[:300]}; {AGAIN}") from None
    require_loaded(folder, module, info)
    _require_names(folder, like, shapes)
    _require_ties(folder, like, paths)


def require_weights_of(model: str | Path, source: str | Path) -> None:
    """Raise unless `source` is a folder whose weights may run in place of those of `model`: `NotFound` where there is
    none, `IncompleteModel` as `require_whole`, `InvalidRequest` where its config is of another function."""
    if not (Path(source) / "config.json").is_file():
        raise NotFound(f"{source} has no config.json: give a folder with weights of {model}")
    require_whole(source)
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
    """The weight files that loading `folder` reads. Raises `IncompleteModel` for a file that it reads and that is a Git
    LFS pointer, was cut short, or is missing though the index names it."""
    index = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if index is None or (folder / "adapter_config.json").is_file():
        return []
    for path in sorted({index, *(path for pattern in READ_BESIDE for path in folder.glob(pattern))}):
        _refuse_pointer(path)
    paths = _shards(folder, index) if index.suffix == ".json" else [index]
    for path in paths:
        _require_file(path)
    return paths


def local_folder(model: str | Path) -> Path | None:
    """Where the files of a folder or of a hub id that was fetched before are; nothing is fetched."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        return None


def _shards(folder: Path, index: Path) -> list[Path]:
    try:
        named = set(json.loads(index.read_bytes())["weight_map"].values())
        if not named or not all(isinstance(name, str) for name in named):
            raise ValueError("it names no files")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IncompleteModel(f"{index} is no index of weights: {error!r}; {AGAIN}") from None
    paths = sorted(folder / name for name in named)
    gone = [path.name for path in paths if not path.is_file()]
    if gone:
        raise IncompleteModel(f"{index} names {len(paths)} files, and {_some(gone)} {_is(gone)} missing; {AGAIN}")
    return paths


def _refuse_pointer(path: Path) -> None:
    if path.is_file() and path.stat().st_size < LFS_NBYTES and path.read_bytes().startswith(LFS_HEAD):
        raise IncompleteModel(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")


def _require_file(path: Path) -> None:
    _refuse_pointer(path)
    try:
        _shapes([path])
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        raise IncompleteModel(
            f"{path} ({path.stat().st_size} bytes) cannot be read as weights: {str(error)[:200]}. Its download was cut "
            f"short, or it was damaged; {AGAIN}"
        ) from None


def _shapes(paths: Collection[Path]) -> dict[str, torch.Tensor]:
    """Every tensor of the files by its name there, without bytes."""
    out: dict[str, torch.Tensor] = {}
    for path in paths:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping: it cannot be iterated)
                    out[name] = torch.empty(file.get_slice(name).get_shape(), device="meta")
        else:
            out.update(torch.load(path, map_location="meta", weights_only=True))
    return out


def _ties(module: Any) -> dict[str, str]:
    """Tied tensors as the config has it, each with the one that it is."""
    found: dict[str, str] = module.get_expanded_tied_weights_keys(all_submodels=True)
    return found


def _require_names(folder: Path, like: Any, names: Collection[str]) -> None:
    """transformers finds a body's tensors without their prefix, and a tied tensor under either of its names; vLLM and
    SGLang do not, and SGLang then runs what happened to be in memory."""
    known, prefix = like.state_dict().keys(), like.base_model_prefix
    bare = [name for name in names if name not in known and f"{prefix}.{name}" in known]
    if bare and prefix == "model":  # of GPT-2 and others these are the usual names, and read as such
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
def _quiet() -> Iterator[None]:
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
