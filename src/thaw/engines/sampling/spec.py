"""How one token is to be chosen, and which one was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from thaw.core.sampling import Sampling


@dataclass
class SampleSpec:
    """How to choose the token at `position`. `history` is every token so far; the output starts at `output_start`."""

    sampling: Sampling
    seed: int
    position: int
    history: Sequence[int]
    output_start: int
    banned: frozenset[int]
    num_top: int


@dataclass
class Sampled:
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    entropy: float | None
    """None where `Sampling.entropy` did not ask for it."""
