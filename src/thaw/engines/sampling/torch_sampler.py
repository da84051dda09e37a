"""Choosing a token with torch: the rules of `sampling.sampler`, for every engine that has its logits in a tensor.

Log probabilities are float32 of the raw logits, entropies float64 of these log probabilities. The draw runs in float64
on the host, through the cumulative distribution in token order, so the token is a pure function of (logits, sampling,
seed, position, past) and the same in each engine that comes here. Nothing raises because of a number: where a NaN or an
infinity leaves no distribution, the token is the argmax (torch's: a NaN before everything, else the lowest id among
equals).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from thaw.core.sampling import Sampling, uniform
from thaw.engines.sampling.spec import Sampled, SampleSpec

HEAD = 1024
"""How many of the largest probabilities top_p looks at before it sorts all of them. The choice does not hang on it."""


@dataclass(frozen=True)
class Past:
    """What the tokens so far say about the next: ids that may not come, ids in prompt or output (for
    `repetition_penalty`), and how often each stands in this turn's output (for the other two penalties)."""

    banned: Collection[int] = ()
    seen: Collection[int] = ()
    counts: Mapping[int, int] = field(default_factory=dict)


def choose(logits_V: torch.Tensor, spec: SampleSpec) -> Sampled:
    """One row. `logits_V` float32 on the host; it is not changed."""
    raw_V = torch.log_softmax(logits_V, 0)
    token = pick(logits_V, spec.sampling, spec.seed, spec.position, _past(spec))
    return Sampled(
        token, float(raw_V[token]), largest(raw_V, spec.num_top), entropy(raw_V) if spec.sampling.entropy else None
    )


def entropy(logprobs_V: torch.Tensor) -> float:
    """Shannon entropy in nats; what cannot come adds nothing. NaN where the log probabilities are no distribution."""
    return float(torch.special.entr(logprobs_V.double().exp()).sum())


def largest(values_V: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    values, tokens = torch.topk(values_V, min(count, values_V.shape[0]))
    return tuple(zip(tokens.tolist(), values.tolist(), strict=True))


def pick(logits_V: torch.Tensor, s: Sampling, seed: int, position: int, past: Past) -> int:
    """The token for `position`. `logits_V` float32 on the host; it is not changed."""
    logits_V = _penalised(logits_V, s, past)
    if s.temperature < 1e-5:
        return int(torch.argmax(logits_V))
    scaled_V = logits_V.double() if s.temperature == 1.0 else logits_V.double() / s.temperature
    probs_V = torch.softmax(scaled_V, 0)
    if bool(probs_V[0].isnan()):  # one NaN or +inf, or nothing but -inf, makes every probability NaN
        return int(torch.argmax(logits_V))
    if s.min_p > 0.0:
        probs_V = torch.where(probs_V >= s.min_p * probs_V.max(), probs_V, 0.0)
    if s.top_k > 0 or s.top_p < 1.0:
        probs_V = _top(probs_V, s)
    sums_V = torch.cumsum(probs_V, 0)
    token = int(torch.searchsorted(sums_V, uniform(seed, position) * sums_V[-1], right=True))
    return token if token < sums_V.shape[0] else int(torch.nonzero(probs_V)[-1])  # the product rounded up to the sum


def _past(spec: SampleSpec) -> Past:
    s = spec.sampling
    seen = set(spec.history) if s.repetition_penalty != 1.0 else ()
    counted = spec.history[spec.output_start :] if s.frequency_penalty or s.presence_penalty else ()
    return Past(spec.banned, seen, Counter(counted))


def _penalised(logits_V: torch.Tensor, s: Sampling, past: Past) -> torch.Tensor:
    if not (s.logit_bias or past.banned or past.seen or past.counts):
        return logits_V
    out_V = logits_V.clone()
    if s.logit_bias:
        biases = {token: bias for token, bias in s.logit_bias if token < out_V.shape[0]}
        out_V[_ids(biases, out_V)] += torch.tensor(list(biases.values()), dtype=torch.float32)
    out_V[_ids(past.banned, out_V)] = -torch.inf
    if s.repetition_penalty != 1.0:
        seen = _ids(past.seen, out_V)
        values = out_V[seen]
        out_V[seen] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
    if s.frequency_penalty or s.presence_penalty:
        tokens = _ids(past.counts, out_V)
        times = torch.tensor([past.counts[token] for token in tokens.tolist()], dtype=torch.float32)
        out_V[tokens] -= s.frequency_penalty * times + s.presence_penalty
    return out_V


def _ids(tokens: Collection[int], logits_V: torch.Tensor) -> torch.Tensor:
    """`tokens` as an index, without ids that have no logit: they cannot come anyway."""
    size = logits_V.shape[0]
    return torch.tensor([token for token in tokens if 0 <= token < size], dtype=torch.long)


def _top(probs_V: torch.Tensor, s: Sampling) -> torch.Tensor:
    """`probs_V` with what top_k and top_p leave out set to 0."""
    size = probs_V.shape[0]
    if 0 < s.top_k < size:
        values, tokens = _leaders(probs_V, s.top_k)
        sums = torch.cumsum(values, 0)
        limit = s.top_p * sums[-1]
    else:
        limit = s.top_p * probs_V.sum()
        values, tokens = _leaders(probs_V, min(HEAD, size))
        sums = torch.cumsum(values, 0)
        if sums[-1] < limit:  # the head does not reach top_p
            values, tokens = _leaders(probs_V, size)
            sums = torch.cumsum(values, 0)
    kept = 1 + int((sums[:-1] < limit).sum())  # a token stays while the sum before it is below the limit
    out_V = torch.zeros_like(probs_V)
    out_V[tokens[:kept]] = values[:kept]
    return out_V


def _leaders(probs_V: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest probabilities that are not 0, largest first, the lower id first among equals, and their
    ids. The same as the head of a stable sort of them all, at a tenth of its cost."""
    floor = torch.topk(probs_V, count).values[-1] if count < probs_V.shape[0] else 0.0
    tokens = torch.nonzero((probs_V >= floor) & (probs_V > 0.0)).squeeze(1)
    values, order = torch.sort(probs_V[tokens], descending=True, stable=True)
    return values[:count], tokens[order[:count]]
