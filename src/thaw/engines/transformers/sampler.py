"""Choosing tokens from the rows of a batch of logits: `sampling.torch_sampler`, which the served engines share."""

from __future__ import annotations

from thaw.engines.sampling.torch_sampler import choose, largest

__all__ = ["choose", "largest"]
