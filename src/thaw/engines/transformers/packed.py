"""Several sessions a forward pass, packed in one row without padding, with thaw's attention over their pages.

For models that are one plain full group and ask nothing of attention but keys and values (`support.PACKED`). Children
that share pages read them once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from thaw.engines.embedded.backend import Feed
from thaw.engines.transformers.attention import PlanCache
from thaw.engines.transformers.kv import BatchPlan


class Packed:
    """Runs feeds together through `body`, a stock model without its head whose attention is thaw's."""

    def __init__(self, body: Any, device: torch.device) -> None:
        self._body, self._device = body, device

    def forward(self, feeds: Sequence[Feed]) -> list[torch.Tensor]:
        """The last hidden state of each feed; advances `kv.num_tokens`."""
        plan = BatchPlan(feeds)
        tokens = [t for feed in feeds for t in feed.tokens]
        positions = [p for feed in feeds for p in range(feed.kv.num_tokens, feed.kv.num_tokens + len(feed.tokens))]
        hidden_ND = self._body(
            input_ids=torch.tensor([tokens], device=self._device),
            position_ids=torch.tensor([positions], device=self._device),
            past_key_values=PlanCache(plan),
            use_cache=True,
            thaw_plan=plan,
        ).last_hidden_state[0]
        rows, end = [], 0
        for feed in feeds:
            end += len(feed.tokens)
            feed.kv.num_tokens += len(feed.tokens)
            rows.append(hidden_ND[end - 1].clone())
        return rows
