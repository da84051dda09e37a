"""How trainers change the weights of a vLLM that runs, besides its own reload and weight transfer: code of theirs in
every worker."""

from __future__ import annotations

from typing import Any

import from_files  # noqa: F401 - a backend of vLLM's weight transfer, for the worker that imports this


class InPlace:
    """A worker extension (`worker_extension_cls`): its methods become the worker's, called by `collective_rpc`."""

    model_runner: Any

    def load_in_place(self, folder: str) -> None:
        """The model's own `load_weights`, into the tensors that are there: on a CPU vLLM has packed linear layers into
        a form of its own and left their parameters empty."""
        from pathlib import Path

        from safetensors.torch import load_file

        model = self.model_runner.model
        there = {name for name, tensor in model.named_parameters() if tensor.numel()}
        for file in sorted(Path(folder).glob("*.safetensors")):
            model.load_weights((name, tensor) for name, tensor in load_file(file).items() if name in there)

    def scale_in_place(self, name: str, factor: float) -> None:
        """One tensor, as an optimiser's step changes it."""
        tensor = dict(self.model_runner.model.named_parameters())[name].data
        assert tensor.numel(), f"{name} is empty"
        tensor.mul_(factor)
