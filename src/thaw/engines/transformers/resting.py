"""A model's weights while the engine sleeps: in host memory, or nowhere until they are read again.

The module and its parameters stay the same objects, so that whoever holds them (the head, tied layers) has them again.
Buffers are small, and some are in no file: they move with the module and are never dropped.
"""

from __future__ import annotations

import torch

from thaw.core.errors import Unsupported
from thaw.engines.transformers.loading import LoadedModel, Model, weights_like


class RestingWeights:
    """`source`: the folder or hub id whose weights run."""

    def __init__(self, module: Model, device: torch.device, loaded: LoadedModel) -> None:
        self._module, self._device = module, device
        self._is_owners = loaded.owner is not None
        self.source = str(loaded.folder or loaded.name)
        self._dropped = False

    def require(self, level: int) -> None:
        if level > 1 and self._is_owners:
            raise Unsupported("the weights are those of a module that is not thaw's, and stay; sleep with level 1")

    def leave(self, level: int) -> None:
        """Off the accelerator; with level 2 out of memory. On a CPU level 1 leaves them where they are.

        A module that was handed in is its owner's: its weights stay, and the pages alone are freed."""
        if level > 1:
            self._dropped = True
            for parameter in self._module.parameters():
                parameter.data = torch.empty(0, dtype=parameter.dtype)
        elif not self._is_owners:
            self._module.to("cpu")

    def free(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def come_back(self) -> None:
        if self._dropped:
            found = weights_like(self._module, self.source)
            for name, parameter in self._module.named_parameters():
                parameter.data = found[name]
            self._dropped = False
        if not self._is_owners:
            self._module.to(self._device)
