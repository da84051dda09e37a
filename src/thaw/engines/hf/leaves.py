"""What a root of weights is made of: the tensors of a module that are hashed, and the leaf of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from thaw.core.identity import tensor_leaf


def hashed_tensors(module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What the root is made of: parameters, tied ones once under their first name, and persistent buffers."""
    persistent = set(module.state_dict().keys())
    yield from module.named_parameters()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in persistent)


def leaf(name: str, tensor: torch.Tensor) -> bytes:
    """The leaf of one tensor, for `weights_root`."""
    data = raw(tensor.detach().contiguous())
    return tensor_leaf(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)


def raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).cpu().numpy())  # type: ignore[arg-type]
