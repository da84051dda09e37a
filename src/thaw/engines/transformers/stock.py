"""The model's own prefill, by stock transformers: the other arm of a measurement, so that the baseline is a fair one.

A second copy of the weights with transformers' default attention (sdpa) and its own cache; no code of thaw runs in it.
As `generate` does, it keeps the cache and computes the logits of the last token alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from thaw.engines.transformers.loading import DTYPES


def load(
    *, model: Any, dtype: str | None = None, device: str | None = None, **_: Any
) -> Callable[[Sequence[int]], int]:
    """A function from token ids to the greedy next token. Takes the options of the engine; those that are thaw's own
    have no meaning here. torch's threads stay as the engine set them."""
    kind: Any = DTYPES[dtype] if dtype else "auto"
    module = AutoModelForCausalLM.from_pretrained(str(model), dtype=kind, attn_implementation="sdpa")
    module.to(device or "cpu").eval()

    @torch.inference_mode()
    def first_token(tokens: Sequence[int]) -> int:
        ids = torch.tensor([list(tokens)], device=module.device)
        logits = module(input_ids=ids, use_cache=True, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())

    return first_token


@torch.inference_mode()
def flops_per_s(dtype: str, size: int = 1024, seconds: float = 0.3) -> float:
    """Multiply-adds count as two; a square matrix product in `dtype` on the CPU, best of those in `seconds`."""
    a = torch.ones(size, size, dtype=DTYPES.get(dtype, torch.float32))
    best, ends = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < ends:
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best
