"""`--load-format thaw`: vLLM loads a stored model straight from packs.

vLLM finds `register` by its entry point `vllm.general_plugins` in each of its processes. The loader is vLLM's default
one, but for where tensors come from: each rank reads the set, every tensor is verified on the host before vLLM sees it
(`thaw.weights.tensors`), and the model's own `load_weights` takes the rank's part of it. With expert parallelism only
the rank's experts are read. A tensor that is missing, extra, or of another shape or dtype than the config's is named
before the first byte is read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from thaw.core.errors import InvalidRequest, Unsupported
from thaw.engines.hf import stored
from thaw.engines.hf.checkpoint import require_whole
from thaw.engines.vllm.settings import STORED_FORMAT
from thaw.weights.tensors import of_folder

_registered: list[str] = []


def register() -> None:
    """vLLM's entry point; it may call this several times in a process."""
    if not _registered:
        register_model_loader(STORED_FORMAT)(ThawModelLoader)
        _registered.append(STORED_FORMAT)


def _is_elsewhere(name: str, local_experts: set[int] | None) -> bool:
    """Whether the tensor belongs to an expert of another rank."""
    if local_experts is None:
        return False
    from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

    return bool(should_skip_weight(name, local_experts))


class ThawModelLoader(DefaultModelLoader):
    """See the module. Raises `InvalidRequest` for a model that is no stored one, `IncompleteModel` and `CorruptBlob`
    naming a tensor."""

    def download_model(self, model_config: Any) -> None:
        """Nothing is downloaded."""
        _folder(model_config)

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        folder = _folder(model_config)
        stored.root_of_stored(folder, str(model_config.dtype).removeprefix("torch."))
        require_whole(folder)
        super().load_weights(model, model_config)

    def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        if getattr(model, "secondary_weights", ()):
            raise Unsupported(f"{type(model).__name__} loads weights of a second model, which no weights set has")
        local_experts = getattr(self, "local_expert_ids", None)
        is_unused = getattr(model, "is_unused_checkpoint_weight", None)
        self.counter_before_loading_weights = time.perf_counter()
        yield from of_folder(
            _folder(model_config),
            lambda name: not _is_elsewhere(name, local_experts) and not (is_unused and is_unused(name)),
        )


def _folder(model_config: Any) -> Path:
    folder = Path(str(model_config.model))
    if not stored.is_stored(folder):
        raise InvalidRequest(
            f"--load-format {STORED_FORMAT} loads models that lie in a thaw repository, and {folder} is none: name the "
            "folder that `repo.weights.model(NAME)` gives, or leave out --load-format"
        )
    return folder
