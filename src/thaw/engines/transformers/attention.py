"""Attention over pages, as a function that transformers calls by name.

Each call gives a partial: the output over some keys and the log-sum-exp of their scores. Partials merge exactly in
the way of flash attention: out = Σ softmax(lse)ᵢ · outᵢ. On CPU a partial is PyTorch's flash attention kernel, which
works each (batch, head, row block) alone, so the number of pages in a call does not change their bits. Elsewhere it is
written out in float32.

Shape letters as in kv.py.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from thaw.core.errors import Unsupported
from thaw.engines.transformers.kv import BatchPlan, Long, PastPages, Tail

NAME = "thaw"
ROW_BLOCK = 8
"""Query rows in one page call, always (padded with zeros). The kernel's scratch memory is rows × keys floats a
thread: with other row counts a thread's part is not aligned to 64 bytes and adds in another order, and with other
numbers of rows the matrix product blocks differently. With this one shape a row's bits depend on its own query and the
page alone: not on the thread, not on how many pages or which other rows (children) share the call."""
_REFUSED = ("sliding_window", "softcap", "s_aux", "head_mask", "position_bias")


class PlanCache:
    """What the model sees as its cache: `update` writes the new keys and values into the pages of the plan."""

    is_compileable = False

    def __init__(self, plan: BatchPlan) -> None:
        self.plan = plan

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def update(
        self, key_1HND: torch.Tensor, value_1HND: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for w in self.plan.writes:
            slots = w.extent.kv_HPL2TD[:, w.page, layer_idx, :, w.slot : w.slot + w.count]
            slots[:, 0] = key_1HND[0, :, w.row : w.row + w.count]
            slots[:, 1] = value_1HND[0, :, w.row : w.row + w.count]
        return key_1HND, value_1HND


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    thaw_plan: BatchPlan | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H·G, N, D], key and value [1, H, N, D] of the new tokens → output [1, N, H·G, D]."""
    refused = [name for name in _REFUSED if kwargs.get(name) is not None]
    if refused or thaw_plan is None or attention_mask is not None:
        raise Unsupported(
            f"{type(module).__name__} asks attention for {refused or 'a mask'}, which thaw does not compute"
        )
    H, N, D = key.shape[1], query.shape[2], query.shape[3]
    q_HGND = query.view(H, query.shape[1] // H, N, D)
    out_NHGD = torch.empty(N, H, q_HGND.shape[1], D, dtype=query.dtype, device=query.device)
    if thaw_plan.tails:
        _short_rows(thaw_plan, module.layer_idx, q_HGND, scaling, out_NHGD)
    for feed in thaw_plan.longs:
        _long_rows(feed, module.layer_idx, q_HGND, scaling, out_NHGD)
    return out_NHGD.view(1, N, -1, D), None


def _short_rows(plan: BatchPlan, layer: int, q_HGND: torch.Tensor, scale: float, out_NHGD: torch.Tensor) -> None:
    H, G, N, D = q_HGND.shape
    parts = torch.zeros(plan.num_places, H, G, N, D, dtype=torch.float32, device=q_HGND.device)
    lses = torch.full((plan.num_places, H, G, N), -torch.inf, dtype=torch.float32, device=q_HGND.device)
    for past in plan.past:
        _past_partial(past, plan.row_index[id(past)], layer, q_HGND, scale, parts, lses)
    for tail in plan.tails:
        _tail_partial(tail, layer, q_HGND, scale, parts, lses)
    merged_HGND = (torch.softmax(lses, 0).unsqueeze(-1) * parts).sum(0)
    if not plan.longs:
        out_NHGD.copy_(merged_HGND.permute(2, 0, 1, 3))
        return
    for tail in plan.tails:
        rows = slice(tail.row, tail.row + tail.count)
        out_NHGD[rows] = merged_HGND[:, :, rows].permute(2, 0, 1, 3).to(out_NHGD.dtype)


def _past_partial(
    past: PastPages, rows: Any, layer: int, q_HGND: torch.Tensor, scale: float, parts: torch.Tensor, lses: torch.Tensor
) -> None:
    H, G, _, D = q_HGND.shape
    pages = past.extent.kv_HPL2TD[:, past.first : past.first + past.count, layer]
    k_PHTD, v_PHTD = pages[:, :, 0].transpose(0, 1), pages[:, :, 1].transpose(0, 1)
    q_HMD = q_HGND[:, :, rows].reshape(H, -1, D)
    num_rows = q_HMD.shape[1]
    blocks = torch.split(torch.nn.functional.pad(q_HMD, (0, 0, 0, -num_rows % ROW_BLOCK)), ROW_BLOCK, 1)
    done = [partial(b.expand(past.count, -1, -1, -1), k_PHTD, v_PHTD, scale, causal=False) for b in blocks]
    out, lse = (torch.cat(parts_, 2)[:, :, :num_rows] for parts_ in zip(*done, strict=True))
    places = slice(past.place, past.place + past.count)
    parts[places, :, :, rows] = out.reshape(past.count, H, G, -1, D).float()
    lses[places, :, :, rows] = lse.reshape(past.count, H, G, -1)


def _tail_partial(
    tail: Tail, layer: int, q_HGND: torch.Tensor, scale: float, parts: torch.Tensor, lses: torch.Tensor
) -> None:
    kv_H2TD = tail.extent.kv_HPL2TD[:, tail.page, layer, :, tail.start : tail.stop]
    G, rows = q_HGND.shape[1], slice(tail.row, tail.row + tail.count)
    k_HGTD, v_HGTD = (kv_H2TD[:, i].unsqueeze(1).expand(-1, G, -1, -1) for i in (0, 1))
    out, lse = partial(q_HGND[:, :, rows], k_HGTD, v_HGTD, scale, causal=tail.causal)
    parts[tail.place, :, :, rows] = out.float()
    lses[tail.place, :, :, rows] = lse


def _long_rows(feed: Long, layer: int, q_HGND: torch.Tensor, scale: float, out_NHGD: torch.Tensor) -> None:
    """Past and new keys gathered once; two partials: all of the past, and the new tokens causally."""
    G, rows, end = q_HGND.shape[1], slice(feed.row, feed.row + feed.count), feed.start + feed.count
    k_HSD, v_HSD = (
        torch.cat([_flat(run, layer, i) for run in feed.runs], 1)[:, :end].unsqueeze(1).expand(-1, G, -1, -1)
        for i in (0, 1)
    )
    q = q_HGND[:, :, rows]
    own, own_lse = partial(q, k_HSD[:, :, feed.start :], v_HSD[:, :, feed.start :], scale, causal=True)
    merged = own
    if feed.start:
        past, past_lse = partial(q, k_HSD[:, :, : feed.start], v_HSD[:, :, : feed.start], scale, causal=False)
        weight = torch.softmax(torch.stack([past_lse, own_lse]), 0).unsqueeze(-1)
        merged = weight[0] * past.float() + weight[1] * own.float()
    out_NHGD[rows] = merged.permute(2, 0, 1, 3).to(out_NHGD.dtype)


def _flat(run: Any, layer: int, which: int) -> torch.Tensor:
    """A run's keys or values of one layer as [H, tokens, D]."""
    pages_HPTD: torch.Tensor = run.extent.kv_HPL2TD[:, run.first : run.first + run.count, layer, which]
    return pages_HPTD.reshape(pages_HPTD.shape[0], -1, pages_HPTD.shape[-1])


def partial(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output like q, log-sum-exp float32 [batch, heads, rows]) of attention over these keys alone."""
    if q.device.type == "cpu":
        out: torch.Tensor
        lse: torch.Tensor
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    return reference_partial(q, k, v, scale, causal=causal)


def reference_partial(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, written out in float32; any device. Causal: row i sees keys 0..i."""
    scores = q.float() @ k.float().transpose(-1, -2) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    out: torch.Tensor = (torch.exp(scores - lse.unsqueeze(-1)) @ v.float()).to(q.dtype)
    return out, lse


AttentionInterface.register(NAME, paged_attention)
