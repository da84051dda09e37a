"""What vLLM's own kernels on a CPU ask of the small models' shapes (`kind_models`), and fields that its classes
read and transformers does not write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from kind_models import make_kind_model

BLOCK = 128
"""Tokens of a block of full attention, unless vLLM is told otherwise."""
YARN = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 2048, "truncate": False,
}  # fmt: skip
"""vLLM reads these fields of every gpt-oss."""
WINDOWS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "head_dim": 64,
        "num_hidden_layers": 6,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"],
        "query_pre_attn_scalar": 1024,
    },
    "gpt_oss": {
        "head_dim": 64,
        "intermediate_size": 64,
        "rope_parameters": YARN,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "llama4_text": {"head_dim": 64, "attention_chunk_size": BLOCK},
    "olmo3": {"head_dim": 32},
    "gemma2": {
        "head_dim": 64,
        "num_hidden_layers": 4,
        "query_pre_attn_scalar": 64,
        "attn_logit_softcapping": 2.0,
        "tie_word_embeddings": True,
    },
}
"""Gemma 3 has five layers with a window for each without; its scores here leave every token of a window a part. gpt-oss
has sinks, and vLLM gives a window to every other layer of it, whatever its config says. Llama 4 has chunks. OLMo 3
runs on vLLM's transformers backend. Gemma 2's soft caps are low enough here to cap something."""
_GDN = {"head_dim": 64, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
RECURRENT: dict[str, dict[str, Any]] = {
    "qwen3_next": _GDN,
    "qwen3_5_text": _GDN,
    "lfm2": {"hidden_size": 256, "conv_dim": 256, "block_dim": 256, "tie_word_embeddings": True},
    "lfm2_moe": {"hidden_size": 256, "tie_word_embeddings": True},
    "granitemoehybrid": {"hidden_size": 256, "mamba_d_head": 64},
    "nemotron_h": {"hidden_size": 256, "mamba_head_dim": 64, "head_dim": 64},
    "falcon_h1": {"hidden_size": 256, "mamba_d_head": 64, "mamba_d_ssm": 512, "head_dim": 64},
    "zamba2": {"hidden_size": 256, "num_key_value_heads": 4},
}
SHAPES = WINDOWS | RECURRENT
TIED = ("gemma2", "lfm2", "lfm2_moe")
"""Models of which vLLM reads no head beside the embeddings."""
RANK, ROPED = 512, 64
LATENT: dict[str, Any] = {
    "kv_lora_rank": RANK, "qk_rope_head_dim": ROPED, "head_dim": ROPED, "qk_nope_head_dim": 32, "v_head_dim": 32,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 1024,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    },
}  # fmt: skip
"""The one width that vLLM has on a CPU. Its kernel for processors with AMX takes heads in multiples of 32."""
V3 = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
"""What files of DeepSeek V3 say, too."""


def make_shaped(arch: str, folder: Path, *, dtype: str) -> Path:
    """A small model of these shapes, made if missing."""
    if (folder / "config.json").exists():
        return folder
    made = make_kind_model(arch, folder, dtype=dtype, **SHAPES[arch])
    if arch in TIED:
        _shrink_embeddings(made / "model.safetensors")
    return made


def _shrink_embeddings(weights: Path) -> None:
    """They are the head, too: as large as others are, each token would be followed by itself, whatever the cache
    holds."""
    tensors = load_file(weights)
    (name,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
    save_file({**tensors, name: tensors[name] * 0.1}, weights, {"format": "pt"})
