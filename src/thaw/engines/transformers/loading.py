"""From a folder, a hub id or a module to a model that is ready to run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from thaw.core.errors import IncompleteModel, InvalidRequest, NotFound, Unsupported
from thaw.engines.hf import checkpoint, stored
from thaw.engines.hf.beside import AGAIN, is_there, read_object, require_beside
from thaw.engines.hf.config import (
    ATTENTION,
    GENERATION,
    auto_class,
    load_config,
    nonsense,
    refuse_foreign_code,
    resolved,
    sensible,
)
from thaw.engines.hf.tokenizer import transformers_tokenizer
from thaw.engines.transformers import guest, support
from thaw.engines.transformers.attention import NAME

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in support.DTYPES}
Model = Any
"""A transformers causal LM; its classes carry no usable types."""


@dataclass
class LoadedModel:
    """`folder` is where the weights came from, None for a module that was handed in; that module is then `owner`, and
    `module` is thaw's own over the same tensors."""

    module: Model
    tokenizer: Any
    name: str
    folder: Path | None
    owner: Model | None = None


def load_model(
    model: Any, *, tokenizer: Any, dtype: str | None, device: str | None, threads: int | None
) -> LoadedModel:
    if threads is not None:
        torch.set_num_threads(threads)
    if dtype is not None and dtype not in DTYPES:
        raise InvalidRequest(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    if isinstance(model, torch.nn.Module):
        return _join(model, tokenizer, dtype, device)
    return _boot(str(model), dtype, device or "cpu")


def weights_like(module: Model, name: str) -> dict[str, torch.Tensor]:
    """The tensors of the model `name`, on the CPU and in the dtype of `module`. Raises `InvalidRequest` where its
    config is of another function, `NotFound` or `IncompleteModel` as a boot does."""
    loaded = _boot(name, str(module.dtype).removeprefix("torch."), "cpu").module
    checkpoint.require_same_function(name, loaded.config, module.config)
    tensors: dict[str, torch.Tensor] = loaded.state_dict()
    return tensors


def _boot(name: str, dtype: str | None, device: str) -> LoadedModel:
    folder = Path(name) if os.path.isdir(name) else None
    if folder is not None and not is_there(folder / "config.json"):
        checkpoint.require_files(folder)
        raise NotFound(f"{name} has no config.json: give a folder with a transformers model")
    if folder is None and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise NotFound(f"there is no folder {name}; give a model's folder or a hub id such as org/name")
    transformers_logging.disable_progress_bar()
    paths = _look_at(folder, dtype) if folder is not None else []
    try:
        with checkpoint.without_report():
            config = load_config(name)
            found = support.require(config.to_dict(), dtype)
            settings = {"attn_implementation": ATTENTION} if found.packed else {}
            kind = DTYPES[dtype] if dtype else "auto"
            if folder is not None and stored.is_stored(folder):
                module, info = _from_store(folder, config, kind, settings)
            else:
                module, info = auto_class(config).from_pretrained(
                    name, dtype=kind, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False,
                    **settings,
                )  # fmt: skip
    except (OSError, ValueError) as error:
        refuse_foreign_code(name, error)
        _look_at_fetched(name)
        raise NotFound(f"the model {name} could not be loaded: {error}") from None
    except nonsense() as error:
        _look_at_fetched(name)
        raise IncompleteModel(f"transformers cannot read the files of {name}: {error!r}; {AGAIN}") from None
    except SafetensorError as error:  # of a hub id: a folder was looked at before
        raise IncompleteModel(f"the weights of {name} cannot be read: {error}; {AGAIN}") from None
    if folder is None:
        paths = _look_at_fetched(name)
    checkpoint.require_loaded(name, module, info)
    checkpoint.require_floats(name, module, paths)
    tokenizer = transformers_tokenizer(name)
    module.to(device)
    return _ready(LoadedModel(module, tokenizer, name, folder))


def _from_store(folder: Path, config: Any, dtype: Any, settings: dict[str, str]) -> tuple[Model, dict[str, Any]]:
    """The module over tensors from a store's packs, each verified after it entered memory: what `from_pretrained` makes
    of files with these tensors. It stands on the meta device until it gets them; no file is written."""
    with torch.device("meta"), sensible(folder):
        like = auto_class(config).from_config(config, trust_remote_code=False, attn_implementation=ATTENTION)
    module, info = type(like).from_pretrained(
        None, config=config, state_dict=dict(stored.tensors_of(folder)), dtype=dtype, output_loading_info=True,
        ignore_mismatched_sizes=True, **settings,
    )  # fmt: skip
    if is_there(folder / GENERATION):
        module.generation_config = GenerationConfig.from_pretrained(folder)
    return module, info


def _look_at_fetched(name: str) -> list[Path]:
    """The weight files of a hub id, which are here once they were asked for, after a look at all of its files."""
    fetched = checkpoint.local_folder(name)
    return [] if fetched is None else checkpoint.require_files(fetched)


def _look_at(folder: Path, dtype: str | None) -> list[Path]:
    """The weight files of a folder whose config thaw supports, as the doctor reads it, and whose files are whole."""
    require_beside(folder)
    with sensible(folder):
        support.require(resolved(read_object(folder / "config.json")), dtype)
    return checkpoint.require_fit(folder)


def _join(module: Any, tokenizer: Any, dtype: str | None, device: str | None) -> LoadedModel:
    if dtype is not None or device is not None:
        raise InvalidRequest("dtype and device are the loaded module's own; thaw shares its weights and moves nothing")
    if tokenizer is None:
        raise InvalidRequest(
            "a loaded module needs its tokenizer: thaw.attach(module, tokenizer=…) (a trainer's processing_class)"
        )
    own = guest.over(module)
    name = str(getattr(module.config, "_name_or_path", "") or "module")
    return _ready(LoadedModel(own, tokenizer, name, None, owner=module))


def _ready(loaded: LoadedModel) -> LoadedModel:
    module = loaded.module
    found = support.require({"architectures": [type(module).__name__], **_plain(module.config)})
    if module.dtype not in DTYPES.values():
        raise Unsupported(f"the model runs in {module.dtype}; load it with dtype one of {', '.join(DTYPES)}")
    module.eval()
    if found.packed:
        module.set_attn_implementation(NAME)
    return loaded


def _plain(config: Any) -> dict[str, Any]:
    out = dict(config.to_dict())
    out.pop("architectures", None)
    return out
