"""What a model's folder runs as, and its weights id, where transformers has to be asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from thaw.core.errors import InvalidRequest, Unsupported
from thaw.engines.hf.config import auto_class, load_config, sensible
from thaw.engines.hf.stored import TORCH, StoredTensor
from thaw.engines.hf.weights import root_of_folder

DTYPES = ("bfloat16", "float16", "float32")


def torch_dtype(name: str) -> torch.dtype:
    """Raises `InvalidRequest`."""
    if name not in DTYPES:
        raise InvalidRequest(f"dtype={name!r}: must be one of {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return found


def dtype_of(folder: Path, tensors: Mapping[str, StoredTensor]) -> str:
    """What transformers runs the model in where nobody says: its config's, else that of its first floats."""
    said = getattr(load_config(folder), "dtype", None)
    if said is not None:
        return str(said).removeprefix("torch.")
    return next((TORCH[one.dtype] for one in tensors.values() if TORCH[one.dtype] in DTYPES), "float32")


def architecture_of(folder: Path) -> str:
    """The class that transformers makes of the folder."""
    config = load_config(folder)
    with sensible(folder):
        return str(auto_class(config)._model_mapping[type(config)].__name__)


def root_of(folder: Path, dtype: str) -> str:
    """Where loading changes tensors: the id of the loaded model, which is computed here once."""
    torch_dtype(dtype)
    try:
        return root_of_folder(folder, dtype)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise Unsupported(
            f"the tensors of {folder} change when they are loaded (they are quantised, merged or renamed), and "
            f"transformers does not load them here, so their weights id is not known: {str(error)[:300]}"
        ) from None
