"""Choosing a token from logits, in plain Python: the reference, and what `fake` runs.

Order as in vLLM: raw log probabilities, and the entropy of their distribution, are taken first; then biases, bans
(min_tokens, bad words), repetition, frequency and presence penalties, temperature, min_p, top_k, top_p; then one draw
`uniform(seed, position)` through the cumulative distribution in token order. Greedy (temperature 0) is the argmax after
penalties, the lowest id among equals.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from thaw.core.sampling import Sampling, uniform
from thaw.engines.sampling.spec import Sampled, SampleSpec


def log_softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    total = math.log(math.fsum(math.exp(x - top) for x in logits)) + top
    return [x - total for x in logits]


def largest(values: Sequence[float], count: int) -> tuple[tuple[int, float], ...]:
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    return tuple((i, values[i]) for i in order)


def entropy(logprobs: Sequence[float]) -> float:
    """Shannon entropy in nats; what cannot come adds nothing."""
    return -math.fsum(math.exp(x) * x for x in logprobs if x > -math.inf)


def choose(logits: Sequence[float], spec: SampleSpec) -> Sampled:
    raw = log_softmax(logits)
    token = pick(penalised(logits, spec), spec.sampling, spec.seed, spec.position)
    return Sampled(token, raw[token], largest(raw, spec.num_top), entropy(raw) if spec.sampling.entropy else None)


def penalised(logits: Sequence[float], spec: SampleSpec) -> list[float]:
    """The logits after biases, bans and penalties."""
    out, s = list(logits), spec.sampling
    for token, bias in s.logit_bias:
        out[token] += bias
    for token in spec.banned:
        if token < len(out):
            out[token] = -math.inf
    if s.repetition_penalty != 1.0:
        for token in set(spec.history):
            out[token] = out[token] / s.repetition_penalty if out[token] > 0 else out[token] * s.repetition_penalty
    if s.frequency_penalty or s.presence_penalty:
        for token, count in Counter(spec.history[spec.output_start :]).items():
            out[token] -= s.frequency_penalty * count + s.presence_penalty
    return out


def pick(logits: Sequence[float], sampling: Sampling, seed: int, position: int) -> int:
    if sampling.temperature < 1e-5:
        return max(range(len(logits)), key=lambda i: (logits[i], -i))
    probs = _filtered([math.exp(x) for x in log_softmax([x / sampling.temperature for x in logits])], sampling)
    goal = uniform(seed, position) * math.fsum(probs)
    total, last = 0.0, 0
    for token, p in enumerate(probs):
        if p > 0.0:
            total, last = total + p, token
            if total > goal:
                break
    return last


def _filtered(probs: list[float], sampling: Sampling) -> list[float]:
    """`probs` with what min_p, top_k and top_p leave out set to 0."""
    if sampling.min_p > 0.0:
        floor = sampling.min_p * max(probs)
        probs = [p if p >= floor else 0.0 for p in probs]
    if sampling.top_k > 0 or sampling.top_p < 1.0:
        order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
        keep = order[: sampling.top_k] if sampling.top_k > 0 else order
        total, kept, reached = math.fsum(probs[i] for i in keep), set(), 0.0
        for token in keep:
            if reached >= sampling.top_p * total:
                break
            kept.add(token)
            reached += probs[token]
        probs = [p if i in kept else 0.0 for i, p in enumerate(probs)]
    return probs
