"""Beside a CPU build of torch: the schemas of torchvision's `nms` and `qnms`, which its own import asks for. Beside one
for CUDA: no NCCL, with which SGLang's ranks ask for a GPU wherever the library is there.

Imports nothing of SGLang's or torch's by itself; it acts when torchvision is first looked for, or at once where
torchvision imports this itself. With a torchvision that was built for the CPU there is nothing to do, and nothing is
done.
"""

from __future__ import annotations

import os
import sys
from typing import Any

OPERATORS = ("nms", "qnms")


class BeforeTorchvision:
    """A finder that finds nothing, and declares the schemas once."""

    library: Any = None

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            self.declare()

    def declare(self) -> None:
        import torch

        if torch.version.cuda is None and self.library is None:
            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in OPERATORS:
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


os.environ.setdefault("SGLANG_NCCL_SO_PATH", "none")  # no library's path: SGLang goes on without it
FINDER = BeforeTorchvision()
sys.meta_path.insert(0, FINDER)
if "torchvision" in sys.modules:
    FINDER.declare()
