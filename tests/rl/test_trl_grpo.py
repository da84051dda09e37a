"""TRL's GRPOTrainer trains for real, on a small model, with rollouts made by thaw in the trainer's own module.

What thaw hands to TRL is checked against TRL's own tokenizing, the module's own `generate` and TRL's own forward pass
of the weights of that step; and training itself against training on the same rollouts without thaw.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="TRL needs Python 3.11; pip install 'thaw-vllm[trl]'")
torch = pytest.importorskip("torch")

import thaw  # noqa: E402
from thaw import Sampling  # noqa: E402
from thaw.core.errors import StaleSession  # noqa: E402
from thaw.engines.embedded.weights import WeightsWatch  # noqa: E402

pytestmark = pytest.mark.slow("trains a model")
EXAMPLE = Path(__file__).parents[2] / "examples" / "trl_grpo.py"
CLOSE = 2e-3
"""Two orders of summation of one float32 model: its packed pages, and TRL's padded batch."""
Rollout = dict[str, Any]


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], Any]) -> Iterator[Any]:
    """TRL looks for vLLM by name, and would find the folder of thaw's tests of it, which pytest puts within reach."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [p for p in sys.path if Path(p) != EXAMPLE.parents[1] / "tests" / "engines"])
        yield load_example("trl_grpo")


@pytest.fixture
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


def trainers_logprobs(output: Rollout, trainer: Any) -> list[list[float]]:
    """Of the completions' tokens, by TRL's own function and padding, under the weights as they are now."""
    pad = trainer.processing_class.pad_token_id
    wide, long = max(map(len, output["prompt_ids"])), max(map(len, output["completion_ids"]))
    rows, masks = [], []
    for prompt, completion in zip(output["prompt_ids"], output["completion_ids"], strict=True):
        left, right = wide - len(prompt), long - len(completion)
        rows.append([pad] * left + prompt + completion + [pad] * right)
        masks.append([0] * left + [1] * (len(prompt) + len(completion)) + [0] * right)
    with torch.no_grad():
        table, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, torch.tensor(rows), torch.tensor(masks), long
        )
    return [row[: len(ids)] for row, ids in zip(table.tolist(), output["completion_ids"], strict=True)]


def worst(output: Rollout, expected: list[list[float]]) -> float:
    pairs = zip(output["logprobs"], expected, strict=True)
    return max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


def weights_of(trainer: Any) -> dict[str, Any]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_what_trl_gets_is_what_its_own_model_says(example: Any, folder: Path, tmp_path: Path) -> None:
    """Prompt ids, completion ids, log probabilities and mask, at every step, under that step's weights."""
    seen: list[Rollout] = []

    def watch(output: Rollout, trainer: Any) -> None:
        prompts = [trainer.processing_class.decode(ids) for ids in output["prompt_ids"]]
        assert set(prompts) <= set(example.PROMPTS) and len(prompts) == 8 and len(set(prompts)) == 2
        assert output["prompt_ids"] == trainer._tokenize_prompts(prompts)[0]
        assert worst(output, trainers_logprobs(output, trainer)) < CLOSE
        assert output["env_mask"] == [[1] * len(ids) for ids in output["completion_ids"]]
        assert output["policy"] == [str(len(seen))] * 8
        ends = [ids[-1] for ids in output["completion_ids"] if len(ids) < 24]
        assert set(ends) <= set(trainer.eos_token_ids)
        assert trainer.model.training
        seen.append(output)

    config = example.settings(tmp_path, 3, 4)
    config.per_device_train_batch_size = 8
    config.generation_batch_size = 8
    example.train(folder, config, watch)
    assert len(seen) == 3
    assert len({tuple(ids) for ids in seen[0]["completion_ids"]}) == 8


def test_greedy_rollouts_are_those_of_generate(example: Any, folder: Path, tmp_path: Path) -> None:
    """The children of a fork against `model.generate` of the same module, after every optimizer step."""
    steps = []

    def watch(_: Rollout, trainer: Any) -> None:
        mode = trainer.model.training
        with thaw.attach(trainer.model, tokenizer=trainer.processing_class) as engine:
            prompt = example.PROMPTS[0]
            with thaw.open(tmp_path / f"greedy{len(steps)}", engine=engine) as repo:
                trunk = repo.session()
                trunk.append(prompt)
                greedy = Sampling(temperature=0.0, max_tokens=24)
                ours = {out.token_ids for out in trunk.fork(3).generate(sampling=greedy)}
            ids = trainer.processing_class(prompt, return_tensors="pt")
            theirs = trainer.model.eval().generate(**ids, do_sample=False, max_new_tokens=24, use_cache=True)
            trainer.model.train(mode)
            assert ours == {tuple(theirs[0, ids["input_ids"].shape[1] :].tolist())}
            steps.append(ours)

    example.train(folder, example.settings(tmp_path, 3, 4), watch)
    assert len(steps) == 3 and steps[0] != steps[-1]


def test_training_is_the_same_bit_for_bit_as_on_the_same_rollouts_without_thaw(
    example: Any, folder: Path, tmp_path: Path
) -> None:
    """thaw runs the module between the steps and leaves no trace in it."""
    recorded: list[Rollout] = []
    with_thaw = example.train(folder, example.settings(tmp_path / "a", 4, 4), lambda out, _: recorded.append(out))
    again = iter(recorded)
    trainer = example.GRPOTrainer(
        model=example.AutoModelForCausalLM.from_pretrained(folder),
        processing_class=example.AutoTokenizer.from_pretrained(folder),
        reward_funcs=example.lower_case,
        train_dataset=example.Dataset.from_dict({"prompt": example.PROMPTS}),
        args=example.settings(tmp_path / "b", 4, 4),
        rollout_func=lambda prompts, trainer: next(again),
    )
    trainer.train()
    ours, theirs = weights_of(with_thaw), weights_of(trainer)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    start = example.AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(ours["lm_head.weight"], start.lm_head.weight)


def keeping_a_trunk(example: Any, folder: Path, tmp_path: Path) -> list[tuple[Rollout, list[list[float]]]]:
    """Train with rollouts that fork one trunk, read before the first step, for ever: what thaw must refuse."""
    trunks: list[Any] = []
    made: list[tuple[Rollout, list[list[float]]]] = []

    def stale(repo: Any, prompts: list[str], trainer: Any) -> Rollout:
        if not trunks:
            trunks.append(repo.session())
            trunks[0].append(prompts[0])
        with trunks[0].fork(len(prompts)) as kids:
            kids.generate(sampling=Sampling(max_tokens=24))
            done = [kid.trajectory() for kid in kids]
        output = {
            "prompt_ids": [list(t.prompt_ids) for t in done],
            "completion_ids": [list(t.completion_ids) for t in done],
            "logprobs": [list(t.logprobs) for t in done],
        }
        made.append((output, trainers_logprobs(output, trainer)))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "rollout", stale)
        example.train(folder, example.settings(tmp_path, 2, 4), lambda *_: None)
    return made


def test_a_trunk_kept_over_an_optimizer_step_is_refused(example: Any, folder: Path, tmp_path: Path) -> None:
    """Nobody announced the step here."""
    with pytest.raises(StaleSession):
        keeping_a_trunk(example, folder, tmp_path)


def test_without_the_guard_its_rollouts_would_be_of_no_policy(
    example: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: right before the step, wrong after it."""
    monkeypatch.setattr(WeightsWatch, "_look", lambda self: None)
    first, second = keeping_a_trunk(example, folder, tmp_path)
    assert worst(*first) < CLOSE
    assert worst(*second) > 10 * CLOSE


def test_tokens_that_a_tool_put_in_are_not_trained_on(example: Any, folder: Path, tmp_path: Path) -> None:
    """A two-turn rollout: TRL's loss mask is the trajectory's."""
    masks = []

    def two_turns(repo: Any, prompts: list[str], trainer: Any) -> Rollout:
        trunk = repo.session()
        trunk.append(prompts[0])
        with trunk.fork(len(prompts)) as kids:
            kids.generate(sampling=Sampling(max_tokens=6, ignore_eos=True))
            kids.generate("<result>4</result>", Sampling(max_tokens=5, ignore_eos=True))
            done = [kid.trajectory() for kid in kids]
        return {
            "prompt_ids": [list(t.prompt_ids) for t in done],
            "completion_ids": [list(t.completion_ids) for t in done],
            "logprobs": [list(t.logprobs) for t in done],
            "env_mask": [list(t.mask) for t in done],
        }

    def look(self: Any, inputs: Any) -> Any:
        out = real(self, inputs)
        masks.append(out["tool_mask"].tolist())
        expected = trainers_logprobs(
            {"prompt_ids": out["prompt_ids"].tolist(), "completion_ids": out["completion_ids"].tolist()}, self
        )
        for mask, ours, theirs in zip(masks[-1], out["sampling_per_token_logps"].tolist(), expected, strict=True):
            assert all(abs(a - b) < CLOSE for m, a, b in zip(mask, ours, theirs, strict=True) if m)
        return out

    real = example.GRPOTrainer._generate_and_score_completions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "rollout", two_turns)
        patch.setattr(example.GRPOTrainer, "_generate_and_score_completions", look)
        example.train(folder, example.settings(tmp_path, 1, 4), lambda *_: None)
    assert masks == [[[1] * 6 + [0] * len("<result>4</result>") + [1] * 5] * 4]


def test_the_example_learns_and_reads_each_prompt_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--steps", "8", "--json"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)["rollouts"]
    assert [row["policies"] for row in rows] == [[str(i)] for i in range(8)]
    assert all(row["num_prefilled_tokens"] * 8 == row["num_prompt_tokens"] for row in rows)
    rewards = [row["reward"] for row in rows]
    assert sum(rewards[-3:]) > sum(rewards[:3]), rewards
