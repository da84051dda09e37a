"""Choosing tokens from a batch of logits with torch: the same rules as `embedded.sampler`, row by row.

Log probabilities are float32 of the raw logits. The draw runs in float64 through the cumulative distribution in token
order, so it is a pure function of (logits, sampling, seed, position).
"""

from __future__ import annotations

from collections import Counter

import torch

from thaw.core.sampling import Sampling, uniform
from thaw.engines.embedded.backend import Sampled, SampleSpec


def choose(logits_V: torch.Tensor, spec: SampleSpec) -> Sampled:
    """One row. `logits_V` float32 on the host."""
    raw_V = torch.log_softmax(logits_V, 0)
    token = _pick(_penalised(logits_V, spec), spec.sampling, spec.seed, spec.position)
    return Sampled(token, float(raw_V[token]), largest(raw_V, spec.num_top))


def largest(values_V: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    values, tokens = torch.topk(values_V, min(count, values_V.shape[0]))
    return tuple(zip(tokens.tolist(), values.tolist(), strict=True))


def _penalised(logits_V: torch.Tensor, spec: SampleSpec) -> torch.Tensor:
    s = spec.sampling
    plain = not spec.banned and s.repetition_penalty == 1.0 and not s.frequency_penalty and not s.presence_penalty
    if plain:
        return logits_V
    out_V = logits_V.clone()
    if spec.banned:
        out_V[list(spec.banned)] = -torch.inf
    if s.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(spec.history)))
        values = out_V[seen]
        out_V[seen] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
    counts = Counter(spec.history[spec.output_start :])
    if counts and (s.frequency_penalty or s.presence_penalty):
        tokens = torch.tensor(list(counts))
        times = torch.tensor(list(counts.values()), dtype=torch.float32)
        out_V[tokens] -= s.frequency_penalty * times + s.presence_penalty
    return out_V


def _pick(logits_V: torch.Tensor, s: Sampling, seed: int, position: int) -> int:
    if s.temperature < 1e-5:
        return int(torch.argmax(logits_V))
    probs_V = torch.softmax(logits_V.double() / s.temperature, 0)
    if s.min_p > 0.0:
        probs_V = torch.where(probs_V >= s.min_p * probs_V.max(), probs_V, 0.0)
    if s.top_k > 0 or s.top_p < 1.0:
        probs_V = _top(probs_V, s)
    sums_V = torch.cumsum(probs_V, 0)
    token = int(torch.searchsorted(sums_V, uniform(seed, position) * sums_V[-1], right=True))
    return min(token, int(torch.nonzero(probs_V)[-1]))


def _top(probs_V: torch.Tensor, s: Sampling) -> torch.Tensor:
    values, order = torch.sort(probs_V, descending=True, stable=True)
    keep = s.top_k if 0 < s.top_k < values.shape[0] else values.shape[0]
    values, order = values[:keep], order[:keep]
    before = torch.cumsum(values, 0) - values
    kept = order[before < s.top_p * values.sum()]
    out_V = torch.zeros_like(probs_V)
    out_V[kept] = probs_V[kept]
    return out_V
