"""Nothing that one request holds ends the engine: SGLang's hooks as thaw answers them, without an SGLang.
`on_sglang/test_http.py` sends odd messages to a real one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from thaw.core.errors import ThawError
from thaw.core.sampling import Sampling
from thaw.engines.served.sampling_extra import SamplingExtra

torch = pytest.importorskip("torch")
from thaw.engines.sglang.scheduler.sampler import Chosen, sample  # noqa: E402 - it needs torch

LIKELIEST = (3, 5)


def chosen(seed: int) -> Chosen:
    extra = SamplingExtra(sampling=Sampling(temperature=1.0), seed=seed, output_start=2)  # type: ignore[arg-type]
    return Chosen(extra, [1, 2])


def step(rows: list[tuple[int, Chosen]]) -> list[int]:
    logits = torch.zeros(2, 8)
    for row, token in enumerate(LIKELIEST):
        logits[row, token] = 50.0
    output = SimpleNamespace(next_token_logits=logits, next_token_logprobs=None)
    batch = SimpleNamespace(seq_lens_cpu=torch.tensor([2, 2]), return_logprob=False)
    found: list[int] = sample(lambda *_: torch.zeros(2, dtype=torch.long), rows, None, output, batch).tolist()
    return found


def test_a_token_that_cannot_be_chosen_costs_its_own_request() -> None:
    sound, broken = chosen(1), chosen(2)
    heard: list[ThawError] = []
    broken.failed = heard.append

    def fails(*_: Any) -> int:
        raise RuntimeError("nobody foresaw this")

    assert broken._row is not None
    broken._row.pick = fails  # type: ignore[method-assign]
    assert step([(0, sound), (1, broken)]) == list(LIKELIEST)
    assert [error.kind for error in heard] == ["storage-failed"] and "nobody foresaw this" in str(heard[0])
    assert step([(0, chosen(1)), (1, chosen(2))]) == list(LIKELIEST) and len(heard) == 1
