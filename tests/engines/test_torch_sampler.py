"""The torch sampler's short cuts against their long way, bit for bit, and numbers that are none."""

from __future__ import annotations

import math

import pytest

from thaw.core.sampling import Sampling

torch = pytest.importorskip("torch")

from thaw.core.canonical import U64  # noqa: E402
from thaw.engines.sampling import sampler as ps  # noqa: E402
from thaw.engines.sampling import torch_sampler as ts  # noqa: E402
from thaw.engines.served.sampling_extra import SamplingExtra  # noqa: E402
from thaw.engines.served.worker.sampler import Row  # noqa: E402

VOCAB = 3000


def logits_of(seed: int, spread: float = 3.0) -> torch.Tensor:
    """Rounded, so that many are equal."""
    dice = torch.Generator().manual_seed(seed)
    return (torch.randn(VOCAB, generator=dice) * spread * 16).round() / 16


FILTERS = {
    "top_p": {"top_p": 0.9},
    "top_p of a flat row": {"top_p": 0.999, "temperature": 50.0},
    "tiny top_p": {"top_p": 1e-9},
    "top_k": {"top_k": 40},
    "top_k and top_p": {"top_k": 300, "top_p": 0.5},
    "top_k over the vocabulary": {"top_k": VOCAB + 1, "top_p": 0.8},
    "min_p leaves fewer than top_k": {"min_p": 0.5, "top_k": 50, "top_p": 0.9},
}


def long_way(probs_V: torch.Tensor, s: Sampling) -> torch.Tensor:
    """top_k and top_p by a stable sort of everything."""
    values, tokens = torch.sort(probs_V, descending=True, stable=True)
    limited = 0 < s.top_k < VOCAB
    if limited:
        values, tokens = values[: s.top_k], tokens[: s.top_k]
    sums = torch.cumsum(values, 0)
    before = torch.cat([sums.new_zeros(1), sums[:-1]])
    kept = tokens[before < s.top_p * (sums[-1] if limited else probs_V.sum())]
    out_V = torch.zeros_like(probs_V)
    out_V[kept] = probs_V[kept]
    return out_V


@pytest.mark.parametrize("head", [1, 7, 1024, VOCAB])
@pytest.mark.parametrize("name", FILTERS)
def test_looking_at_the_head_alone_changes_no_bit(name: str, head: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ts, "HEAD", head)
    s = Sampling(**FILTERS[name])  # type: ignore[arg-type]
    for seed in range(20):
        probs_V = torch.softmax(logits_of(seed).double() / s.temperature, 0)
        probs_V = torch.where(probs_V >= s.min_p * probs_V.max(), probs_V, 0.0)
        assert torch.equal(ts._top(probs_V, s), long_way(probs_V, s))


BROKEN = {
    "a NaN": ({7: math.nan}, 7),
    "an infinity": ({7: math.inf}, 7),
    "only NaN": (dict.fromkeys(range(VOCAB), math.nan), 0),
    "nothing allowed": (dict.fromkeys(range(VOCAB), -math.inf), 0),
    "one allowed": (dict.fromkeys(set(range(VOCAB)) - {9}, -math.inf), 9),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("knobs", [{}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}], ids=str)
def test_no_number_makes_choosing_fail(what: str, knobs: dict[str, float]) -> None:
    values, expected = BROKEN[what]
    logits_V = logits_of(1)
    logits_V[list(values)] = torch.tensor(list(values.values()))
    past = ts.Past(seen={1, 2}, counts={2: 3})
    s = Sampling(**knobs, repetition_penalty=1.2, frequency_penalty=0.1)  # type: ignore[arg-type]
    assert ts.pick(logits_V, s, 5, 11, past) == expected


def test_ids_outside_the_vocabulary_ban_and_penalise_nothing() -> None:
    s = Sampling(repetition_penalty=1.5, frequency_penalty=0.5, logit_bias={5: 1.0, VOCAB: 100.0})  # type: ignore[arg-type]
    inside, outside = {3, 4}, {VOCAB, VOCAB + 9}
    for seed in range(20):
        expected = ts.pick(logits_of(seed), s, seed, 3, ts.Past(inside, inside, dict.fromkeys(inside, 2)))
        past = ts.Past(inside | outside, inside | outside, dict.fromkeys(inside | outside, 2))
        assert ts.pick(logits_of(seed), s, seed, 3, past) == expected


def test_choosing_changes_no_logit() -> None:
    logits_V = logits_of(2)
    before = logits_V.clone()
    ts.pick(logits_V, Sampling(repetition_penalty=2.0, top_p=0.5), 1, 2, ts.Past({5}, {6}, {}))
    assert torch.equal(logits_V, before)


def test_an_entropy_is_shannons_in_nats() -> None:
    for seed in range(5):
        logprobs_V = torch.log_softmax(logits_of(seed), 0)
        expected = -math.fsum(math.exp(x) * x for x in logprobs_V.tolist())
        assert ts.entropy(logprobs_V) == pytest.approx(expected, abs=1e-9)
        assert ps.entropy(logprobs_V.tolist()) == pytest.approx(expected, abs=1e-12)
    for entropy, values in ((ts.entropy, torch.tensor), (ps.entropy, list)):
        assert entropy(values([math.log(0.25)] * 4)) == pytest.approx(math.log(4), abs=1e-6)
        assert entropy(values([0.0, -math.inf, -math.inf])) == 0.0


def test_a_row_tells_the_entropy_of_each_step_where_it_was_asked_to() -> None:
    """By the token's place in the output, so that a step that is run again is told again."""
    logits_V, told = logits_of(1), []
    for asked in (True, False):
        extra = SamplingExtra(sampling=Sampling(entropy=asked), seed=U64(1), output_start=2)
        row = Row((), extra, [1, 2], output := [], lambda index, value: told.append((index, value)))
        output.append(row.pick(logits_V))
        row.pick(logits_V)
    assert [index for index, _ in told] == [0, 1]
    assert told[0][1] == ts.entropy(torch.log_softmax(logits_V, 0))
