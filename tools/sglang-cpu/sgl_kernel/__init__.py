"""Stands for SGLang's compiled kernels on a CPU: every name is a function that raises when it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

__version__ = "0.0.0+thaw.cpu"


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name}: there is no build of SGLang's kernels for this CPU")

    return missing
