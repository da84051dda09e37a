"""A fork pool over a trainer's own module: every optimizer step is a policy, and no KV of an old one is served."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from thaw import Sampling  # noqa: E402
from thaw.core.errors import StaleSession  # noqa: E402
from thaw.pool import BranchResult, ForkPool  # noqa: E402

PROMPT = [(5 * i + 1) % 256 for i in range(300)]
SAMPLING = Sampling(max_tokens=12, ignore_eos=True)


@pytest.fixture
def module(tiny_model: Callable[..., Path]) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama")).train()


@pytest.fixture
def pool(module: Any, tiny_model: Callable[..., Path]) -> Iterator[ForkPool]:
    with ForkPool(module, tokenizer=transformers.AutoTokenizer.from_pretrained(tiny_model("llama"))) as pool:
        yield pool


def step(module: Any) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True)
    ids = torch.tensor([PROMPT[:64]])
    module(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def gap(module: Any, result: BranchResult) -> float:
    """Between the result's log probabilities and those of the module as it is now."""
    t = result.trajectory
    mode = module.training
    with torch.no_grad():
        logits = module.eval()(input_ids=torch.tensor([[*t.prompt_ids, *t.completion_ids]])).logits[0]
    module.train(mode)
    table = torch.log_softmax(logits[len(t.prompt_ids) - 1 : -1], -1)
    return max(abs(float(row[i]) - x) for row, i, x in zip(table, t.completion_ids, t.logprobs, strict=True))


def test_a_round_after_a_step_is_of_the_new_weights_and_reads_the_prompt_anew(module: Any, pool: ForkPool) -> None:
    for version in ("0", "1", "2"):
        pool.set_policy(version)
        first, again = pool.fork(PROMPT, 4, SAMPLING), pool.fork(PROMPT, 4, SAMPLING)
        assert first[0].decision is not None and first[0].decision.num_prefilled_tokens == 300
        assert again[0].decision is not None and again[0].decision.num_prefilled_tokens == 0
        for result in (*first, *again):
            assert result.trajectory.policy_versions == (version,) * 12
            assert gap(module, result) < 1e-3
        step(module)
        assert gap(module, first[0]) > 0.05  # the negative control: under other weights they are others


def test_a_result_of_an_old_policy_is_no_point_to_fork_from(module: Any, pool: ForkPool) -> None:
    results = pool.fork(PROMPT, 2, SAMPLING)
    assert gap(module, pool.fork(results[0], 2, SAMPLING)[0]) < 1e-3
    step(module)
    pool.set_policy("1")
    with pytest.raises(StaleSession):
        pool.fork(results[0], 2, SAMPLING)


def test_a_step_that_nobody_announced_is_noticed(module: Any, pool: ForkPool) -> None:
    results = pool.fork(PROMPT, 2, SAMPLING)
    step(module)
    with pytest.raises(StaleSession):
        pool.fork(results[0], 2, SAMPLING)
    new = pool.fork(PROMPT, 2, SAMPLING)[0]  # plain tokens have no KV that must be kept
    assert gap(module, new) < 1e-3 < 0.05 < gap(module, results[0])
    assert new.decision is not None and new.decision.num_prefilled_tokens == 300
    pool.set_policy("1")
    assert gap(module, pool.fork(PROMPT, 2, SAMPLING)[0]) < 1e-3
