"""What releases before 0.32 do not have: kinds of cache and adapters. Each is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kind_models import make_kind_model
from thaw.core.errors import Unsupported
from thaw.engines import load_engine
from thaw.testing.models import make_random_adapter

vllm = pytest.importorskip("vllm")
if tuple(int(part) for part in vllm.__version__.split(".")[:2]) >= (0, 32):
    pytest.skip("this release has these kinds", allow_module_level=True)

HAS_FROM = rf"on vLLM {vllm.__version__.split('+')[0]}.* from 0\.32 on"
YARN = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 2048, "truncate": False,
}  # fmt: skip
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "gemma3_text": ({"head_dim": 64}, r"windows \(sliding_window=\d+\)"),
    "gpt_oss": ({"head_dim": 64, "intermediate_size": 64, "rope_parameters": YARN}, r"windows \(sliding_window=\d+\)"),
    "llama4_text": ({"head_dim": 64, "attention_chunk_size": 128}, r"windows \(attention_chunk_size=128\)"),
    "olmo3": ({"head_dim": 32}, r"windows \(sliding_window=\d+\)"),
    "deepseek_v3": ({"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64}, r"MLA \(latent attention\)"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_older_release_refuses_the_kind_by_name(tmp_path: Path, kind: str) -> None:
    shape, named = KINDS[kind]
    folder = make_kind_model(kind, tmp_path / kind, dtype="bfloat16", **shape)
    with pytest.raises(Unsupported, match=f"{named} {HAS_FROM}"):
        load_engine("vllm", model=str(folder), enforce_eager=True, max_model_len=1024)


def test_an_older_release_refuses_recurrent_layers_by_name(tmp_path: Path) -> None:
    shape = {"head_dim": 64, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
    folder = make_kind_model("qwen3_next", tmp_path / "recurrent", dtype="bfloat16", **shape)
    with pytest.raises(Unsupported, match=r"qwen3_next: a model with recurrent layers needs vLLM 0\.32"):
        load_engine("vllm", model=str(folder), enforce_eager=True, max_model_len=1024)


def test_an_older_release_refuses_adapters_by_name(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model("llama", dtype="bfloat16", head_dim=64)
    adapters = {"law": make_random_adapter(model, tmp_path / "law", seed=1)}
    with pytest.raises(Unsupported, match=r"LoRA on vLLM .*: adapters are part of a session from 0\.32 on"):
        load_engine("vllm", model=str(model), adapters=adapters, enforce_eager=True, max_model_len=1024)
