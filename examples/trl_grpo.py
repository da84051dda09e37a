"""GRPO with TRL, its rollouts made by thaw in the trainer's own model.

    python examples/trl_grpo.py [path/to/model] [--steps 6] [--generations 8] [--json]

`thaw.attach` joins the module that TRL trains, in this process. There is no second copy of the weights, and the module
is not changed. Each prompt is prefilled once, by one session; its N forks then generate as one batch. Every optimizer
step is a new policy: KV of the old weights is refused, so no rollout can mix two policies.

Without a model, the example creates a random one of a few hundred kilobytes. It is rewarded for writing lower-case
letters, which it learns in a few steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

import thaw
from thaw import Repository, Sampling
from thaw.repo import Trajectory
from thaw.testing.models import make_random_model

STORY = "The pump stands in the cellar. It is tested on Mondays, and the log is kept beside the door. " * 3
PROMPTS = [STORY + question for question in ("Where is the pump? ", "When is it tested? ", "Where is the log? ")]
Rollout = dict[str, Any]


def rollout(repo: Repository, prompts: list[str], trainer: GRPOTrainer) -> Rollout:
    """A `rollout_func` for TRL. Its prompts come with N copies of each, one after the other."""
    step = int(trainer.state.global_step)
    repo.engine.set_policy(str(step))
    sampling = Sampling(max_tokens=trainer.args.max_completion_length, temperature=trainer.args.temperature)
    done: list[Trajectory] = []
    num_prefilled = 0
    for i, (prompt, copies) in enumerate(itertools.groupby(prompts)):
        with repo.session(seed=1000 * step + i) as trunk:
            trunk.append(prompt)
            with trunk.fork(len(list(copies))) as children:
                outs = children.generate(sampling=sampling)
                done += [child.trajectory() for child in children]
        num_prefilled += outs[0].num_cached_tokens + sum(out.usage.num_prefilled_tokens for out in outs)
    return {
        "prompt_ids": [list(t.prompt_ids) for t in done],
        "completion_ids": [list(t.completion_ids) for t in done],
        "logprobs": [list(t.logprobs) for t in done],
        "env_mask": [list(t.own_mask) for t in done],  # 0 where a token was inherited, or put in by a tool
        "policy": [t.policy_versions[0] for t in done],  # what TRL does not know goes to the reward functions
        "num_prefilled": num_prefilled,
    }


def lower_case(completions: list[str], **_: Any) -> list[float]:
    """The share of lower-case letters: something that can be checked, and that a small model can learn."""
    return [sum(c.islower() and c.isascii() for c in text) / max(1, len(text)) for text in completions]


def train(model: Path, config: GRPOConfig, watch: Callable[[Rollout, GRPOTrainer], None]) -> GRPOTrainer:
    """Train `model`; `watch` sees every rollout before TRL does."""

    def rollout_func(prompts: list[str], trainer: GRPOTrainer) -> Rollout:
        output = rollout(repo, prompts, trainer)
        watch(output, trainer)
        return output

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=lower_case,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        args=config,
        rollout_func=rollout_func,
    )
    trainer.remove_callback(PrinterCallback)
    with (
        thaw.attach(trainer.model, tokenizer=trainer.processing_class) as engine,
        thaw.open(Path(config.output_dir) / "rollouts", engine=engine) as repo,
    ):
        trainer.train()
    return trainer


def settings(folder: str | Path, steps: int, generations: int) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(folder), max_steps=steps, num_generations=generations, max_completion_length=24, temperature=1.0,
        per_device_train_batch_size=generations, gradient_accumulation_steps=1, gradient_checkpointing=True,
        learning_rate=5e-3, lr_scheduler_type="constant", seed=1, use_cpu=True, bf16=False,
        logging_strategy="no", report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO with TRL, rollouts by thaw")
    parser.add_argument("model", nargs="?", type=Path, help="a folder (default: a random model, made now)")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def watch(output: Rollout, trainer: GRPOTrainer) -> None:
        rewards = lower_case(trainer.processing_class.batch_decode(output["completion_ids"], skip_special_tokens=True))
        row = {
            "step": trainer.state.global_step,
            "policies": sorted(set(output["policy"])),
            "reward": sum(rewards) / len(rewards),
            "num_prompt_tokens": sum(map(len, output["prompt_ids"])),
            "num_prefilled_tokens": output["num_prefilled"],
        }
        rows.append(row)
        if not asked.json:
            print(
                f"step {row['step']}  policy {row['policies'][0]}  reward {row['reward']:.3f}  "
                f"prefilled {row['num_prefilled_tokens']} of {row['num_prompt_tokens']} prompt tokens"
            )

    with tempfile.TemporaryDirectory() as folder:
        model = asked.model or make_random_model("llama", Path(folder) / "model")
        train(model, settings(folder, asked.steps, asked.generations), watch)
    if asked.json:
        print(json.dumps({"rollouts": rows}))


if __name__ == "__main__":
    main()
