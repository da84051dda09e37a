"""SGLang loads a stored model straight from packs: its default loader, but for where tensors come from.

As in `vllm_loader`: each rank reads the set, every tensor is verified on the host before SGLang sees it, and the
model's own `load_weights` takes the rank's part. What does not fit the config is named before the first byte is read,
for SGLang itself leaves the memory of a missing tensor as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sglang.srt.model_loader.loader import DefaultModelLoader

from thaw.core.errors import Unsupported
from thaw.engines.hf import stored
from thaw.engines.hf.checkpoint import require_whole
from thaw.weights.tensors import of_folder


class ThawSglangLoader(DefaultModelLoader):
    """Raises `IncompleteModel` and `CorruptBlob` naming a tensor, `Unsupported` for what no weights set has."""

    def download_model(self, model_config: Any) -> None:
        """Nothing is downloaded."""

    def load_model(self, *, model_config: Any, device_config: Any) -> torch.nn.Module:
        folder = Path(str(model_config.model_path))
        if getattr(self.load_config, "draft_model_idx", None) is not None:
            raise Unsupported("a draft model in the layers of another is not loaded from a weights set")
        stored.root_of_stored(folder, str(model_config.dtype).removeprefix("torch."))
        require_whole(folder)
        loaded: torch.nn.Module = super().load_model(model_config=model_config, device_config=device_config)
        return loaded

    def _get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        if getattr(model, "secondary_weights", ()):
            raise Unsupported(f"{type(model).__name__} loads weights of a second model, which no weights set has")
        yield from of_folder(Path(str(model_config.model_path)))
