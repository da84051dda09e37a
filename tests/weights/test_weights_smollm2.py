"""Weights in the store, with a real model: SmolLM2-135M-Instruct, whose embedding is its head."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from weights_models import FILE, commit_text, forked, going_on, rewrite, tensors

import thaw

LAYERS = ("model.layers.3.mlp.down_proj.weight", "model.layers.20.self_attn.q_proj.weight")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> tuple[Path, object]:
    """A repository with a commit and the model, and what the commit's session said with the model's own files."""
    folder = tmp_path_factory.mktemp("real")
    return folder / "repo", commit_text(folder / "repo", demo_model, with_weights=True)


def packed(path: Path) -> int:
    return sum(pack.stat().st_size for pack in (path / "packs").iterdir())


@pytest.mark.slow("runs a real model")
def test_the_repository_alone_goes_on_bitwise(tmp_path: Path, real: tuple[Path, object]) -> None:
    copy = Path(shutil.copytree(real[0], tmp_path / "copy"))
    with thaw.open(copy, create=False) as look:
        (entry,) = look.weights.list()
        model = look.weights.model(entry.name)
    with going_on(copy, model) as repo:
        assert forked(repo) == real[1]


@pytest.mark.slow("hashes a real model")
def test_a_set_costs_its_tensors_a_fine_tune_what_it_changed_an_adapter_itself(
    tmp_path: Path, real: tuple[Path, object], demo_model: Path
) -> None:
    with thaw.open(real[0], create=False) as repo:
        (base,) = repo.weights.list()
        found = tensors(demo_model)
        assert base.nbytes == sum(one.nbytes for one in found.values()) and "lm_head.weight" not in found
        sizes = [packed(real[0])]
        assert base.nbytes <= sizes[0] <= 1.01 * base.nbytes + 8_000_000  # the session's KV, tokenizer and objects

        tuned = Path(shutil.copytree(demo_model, tmp_path / "tuned"))
        rewrite(tuned, lambda all_of: [all_of.update({name: all_of[name] + 0.01}) for name in LAYERS])
        added = repo.weights.add(tuned)
        sizes.append(packed(real[0]))
        changed = sum(found[name].nbytes for name in LAYERS)
        assert added.nbytes_written == changed and sizes[1] - sizes[0] <= 1.01 * changed + 100_000  # its manifest
        assert (tuned / FILE).stat().st_size > 50 * changed

        lora = {f"{name}.lora_A": torch.randn(16, found[name].shape[1]) for name in LAYERS}
        (tmp_path / "lora").mkdir()
        save_file(lora, tmp_path / "lora" / "adapter_model.safetensors")
        (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16}))
        itself = sum(one.nbytes for one in lora.values())
        assert repo.weights.add(tmp_path / "lora", base=base.name).nbytes_written == itself
        assert packed(real[0]) - sizes[1] <= 1.01 * itself + 20_000
