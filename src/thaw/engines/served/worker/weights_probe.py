"""Which weights run in this worker: a sample of each is looked at, and all can be hashed.

vLLM gives a connector its caches and attention layers, not the model; the model is the module that owns those layers,
found among the objects that live in this process. Nothing of it is changed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import torch
from blake3 import blake3

SAMPLES = 16
"""Elements looked at in every tensor, spread over it: any ordinary update changes some."""


def owner_of(layer: torch.nn.Module) -> torch.nn.Module | None:
    """The outermost module of this process that contains `layer`."""
    modules = [o for o in gc.get_objects() if issubclass(type(o), torch.nn.Module)]
    children = {id(child) for module in modules for child in module.children()}
    roots = [module for module in modules if id(module) not in children]
    owners = [root for root in roots if any(part is layer for part in root.modules())]
    return max(owners, key=lambda root: sum(1 for _ in root.modules()), default=None)


class WeightsSample:
    """Compares a sample of all weights with the last one; `epoch` counts the changes seen."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._tables = [module._parameters for module in model.modules() if module._parameters]
        self._peek: Callable[[list[torch.Tensor]], bytes] | None = None
        if all(tensor.is_cuda for _, tensor in _named(model)):
            from thaw.engines.served.worker.weights_probe_triton import Peek

            self._peek = Peek(SAMPLES)
        self.epoch = 0
        self._last = self._sample()

    def look(self) -> int:
        """The epoch of the weights as they are now."""
        now = self._sample()
        if now != self._last:
            self._last = now
            self.epoch += 1
        return self.epoch

    def digest(self) -> str:
        """BLAKE3 of all weights of this rank, names and shapes included."""
        hasher = blake3()
        with torch.no_grad():
            for name, tensor in sorted(_named(self._model)):
                hasher.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
                hasher.update(_raw(tensor.contiguous()))
        return hasher.hexdigest()

    def _sample(self) -> bytes:
        if self._peek is not None:
            return self._peek([p for table in self._tables for p in table.values() if p is not None and p.numel()])
        with torch.no_grad():
            parts: dict[torch.dtype, list[torch.Tensor]] = {}
            for _, tensor in _named(self._model):
                flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.flatten()
                parts.setdefault(tensor.dtype, []).append(flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES])
            return b"".join(bytes(_raw(torch.cat(group))) for group in parts.values())


def _named(model: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    return [(name, p.detach()) for name, p in model.named_parameters() if p.numel()]


def _raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).cpu().numpy())  # type: ignore[arg-type]
