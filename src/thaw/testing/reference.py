"""What a model says by itself: one forward pass of transformers over all tokens, in float32, without a cache.

No engine, kernel or line of thaw's is in it, so it can tell whether a session's KV is that of its tokens: an engine's
own arithmetic is near, KV of other tokens is not. Imports torch and transformers.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


class Reference:
    """`folder` is a small model's; all logits of a pass are in memory at once."""

    def __init__(self, folder: Path) -> None:
        self._module = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()

    @torch.inference_mode()
    def entropies(self, tokens: Sequence[int], then: Sequence[int]) -> list[float]:
        """What the model says after `tokens`, and after each of `then` but the last: the entropy of its next token, in
        nats over the full vocabulary."""
        ids = torch.tensor([[*tokens, *then[:-1]]])
        logprobs = torch.log_softmax(self._module(input_ids=ids, logits_to_keep=len(then)).logits[0].double(), -1)
        return (-(logprobs.exp() * logprobs).sum(-1)).tolist()

    @torch.inference_mode()
    def distance(self, tokens: Sequence[int], then: Sequence[int], told: Sequence[Mapping[int, float]]) -> float:
        """How far an engine that went on after `tokens` with `then` is from what the model says: the mean difference
        of the log probabilities that it told, a mapping of tokens for each of `then`."""
        ids = torch.tensor([[*tokens, *then[:-1]]])
        logits = self._module(input_ids=ids, logits_to_keep=len(then)).logits[0]
        found = torch.log_softmax(logits, -1).tolist()
        gaps = [abs(row[token] - value) for row, of in zip(found, told, strict=True) for token, value in of.items()]
        return statistics.fmean(gaps)
