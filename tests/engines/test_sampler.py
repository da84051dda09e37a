"""Choosing tokens: the reference in plain Python against the rules, the torch sampler against the reference."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from thaw.core.sampling import Sampling, uniform
from thaw.engines.sampling import sampler
from thaw.engines.sampling.spec import SampleSpec

VOCAB = 320


def logits_of(seed: int) -> list[float]:
    """Exact in float32, so that both samplers see the same numbers."""
    dice = random.Random(seed)
    return [round(dice.gauss(0, 3) * 4096) / 4096 for _ in range(VOCAB)]


def spec(
    sampling: Sampling, seed: int = 1, position: int = 40, banned: frozenset[int] = frozenset(), top: int = 0
) -> SampleSpec:
    dice = random.Random(seed)
    history = [dice.randrange(VOCAB) for _ in range(30)] + [3, 3, 3, 5, 5, 7, 1, 2, 3, 4]
    return SampleSpec(
        sampling=sampling, seed=seed, position=position, history=history, output_start=30, banned=banned, num_top=top
    )


KNOBS = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 3.0},
    "top_k 1": {"top_k": 1},
    "top_k": {"top_k": 12},
    "top_k over the vocabulary": {"top_k": 10_000},
    "top_p": {"top_p": 0.7},
    "tiny top_p": {"top_p": 1e-9},
    "min_p": {"min_p": 0.08},
    "min_p 1": {"min_p": 1.0},
    "repetition": {"repetition_penalty": 1.7},
    "repetition below 1": {"repetition_penalty": 0.5},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -1.5},
    "bias": {"logit_bias": {3: 4.0, 9: -3.5, 200: 6.0, 201: 5.5}, "temperature": 2.0},
    "a bias that changes a sign": {"logit_bias": {1: 5.0, 3: -5.0, 5: 0.25}, "repetition_penalty": 1.5},
    "greedy with penalties": {"temperature": 0.0, "repetition_penalty": 3.0, "frequency_penalty": 2.0},
    "all": {
        "temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.3,
        "presence_penalty": 0.4, "frequency_penalty": 0.3, "logit_bias": {3: 2.0, 40: -1.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("banned", [frozenset(), frozenset(range(0, VOCAB, 2))], ids=["free", "half banned"])
@pytest.mark.parametrize("name", KNOBS)
def test_torch_chooses_what_the_reference_chooses(name: str, banned: frozenset[int]) -> None:
    torch = pytest.importorskip("torch")
    from thaw.engines.transformers.sampler import choose

    sampling = Sampling(**KNOBS[name])  # type: ignore[arg-type]
    chosen = set()
    for seed in range(40):
        logits, how = logits_of(seed), spec(sampling, seed, seed * 7, banned, top=5)
        expected, found = sampler.choose(logits, how), choose(torch.tensor(logits), how)
        assert found.token == expected.token and found.token not in banned
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-5)
        assert [t for t, _ in found.top] == [t for t, _ in expected.top]
        assert [x for _, x in found.top] == pytest.approx([x for _, x in expected.top], abs=1e-5)
        chosen.add(found.token)
    assert len(chosen) > 10, "forty draws that fell on a few tokens compare nothing"


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = logits_of(0)
    hot = Sampling(temperature=5.0)
    first = sampler.choose(logits, spec(hot, 5, 9)).token
    assert first == sampler.choose(logits, spec(hot, 5, 9)).token
    others = {sampler.choose(logits, spec(hot, s, p)).token for s in range(5, 8) for p in range(9, 14)}
    assert len(others) > 5


def test_draws_follow_the_distribution() -> None:
    logits = [math.log(x) for x in (0.5, 0.3, 0.15, 0.05)]
    counts = Counter(sampler.pick(logits, Sampling(), 3, position) for position in range(4000))
    for token, p in enumerate((0.5, 0.3, 0.15, 0.05)):
        assert abs(counts[token] / 4000 - p) < 4 * math.sqrt(p * (1 - p) / 4000)


def test_a_draw_is_the_first_token_whose_cumulative_probability_exceeds_it() -> None:
    logits = [math.log(0.25)] * 4
    for position in range(50):
        assert sampler.pick(logits, Sampling(), 3, position) == int(uniform(3, position) * 4)


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    torch = pytest.importorskip("torch")
    from thaw.engines.transformers.sampler import choose

    logits = [0.0] * VOCAB
    for token in (200, 17, 90):
        logits[token] = 2.0
    how = spec(Sampling(temperature=0))
    assert sampler.choose(logits, how).token == choose(torch.tensor(logits), how).token == 17


def test_top_k_top_p_and_min_p_keep_what_they_say() -> None:
    probs = [0.4, 0.3, 0.2, 0.1]
    logits = [math.log(x) for x in probs]

    def kept(**knobs: float) -> set[int]:
        return {sampler.pick(logits, Sampling(**knobs), 1, position) for position in range(300)}  # type: ignore[arg-type]

    assert kept() == {0, 1, 2, 3}
    assert kept(top_k=2) == {0, 1}
    assert kept(top_p=0.39) == {0} and kept(top_p=0.41) == {0, 1} and kept(top_p=0.69) == {0, 1}
    assert kept(min_p=0.51) == {0, 1} and kept(min_p=0.76) == {0}


def test_penalties_are_vllms() -> None:
    logits = [1.0, -1.0, 2.0, 0.5, 0.0, 0.0, 0.0, 0.0]
    how = SampleSpec(
        sampling=Sampling(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5),
        seed=1, position=5, history=[0, 1, 2, 2, 3], output_start=2, banned=frozenset({7}), num_top=0,
    )  # fmt: skip
    assert sampler.penalised(logits, how) == [0.5, -2.0, 1.0 - 1.25, 0.25 - 0.75, 0.0, 0.0, 0.0, -math.inf]


def test_a_bias_is_added_before_penalties() -> None:
    logits = [1.0, -1.0, 2.0, 0.5]
    how = SampleSpec(
        sampling=Sampling(repetition_penalty=2.0, presence_penalty=0.25, logit_bias={0: -3.0, 1: 2.0, 3: 1.0}),  # type: ignore[arg-type]
        seed=1, position=5, history=[0, 1, 2], output_start=2, banned=frozenset({3, 99}), num_top=0,
    )  # fmt: skip
    assert sampler.penalised(logits, how) == [-4.0, 0.5, 0.75, -math.inf]


def test_the_logprob_is_of_the_raw_logits() -> None:
    logits = logits_of(3)
    hot = sampler.choose(logits, spec(Sampling(temperature=5.0, repetition_penalty=2.0, top_k=5)))
    assert hot.logprob == sampler.log_softmax(logits)[hot.token]
