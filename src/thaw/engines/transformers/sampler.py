"""Choosing tokens from the rows of a batch of logits: `embedded.torch_sampler`, which vLLM's side shares."""

from __future__ import annotations

from thaw.engines.sampling.torch_sampler import choose, largest

__all__ = ["choose", "largest"]
