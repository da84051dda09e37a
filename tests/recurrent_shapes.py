"""Small shapes of models with recurrent layers, for `make_kind_model`. Each has a layer that attends, too."""

from __future__ import annotations

from typing import Any

_ATTENTION: dict[str, Any] = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
_GDN: dict[str, Any] = {
    **_ATTENTION, "head_dim": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
_MAMBA2: dict[str, Any] = {
    **_ATTENTION, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_expand": 2,
    "mamba_chunk_size": 64,
}  # fmt: skip
_ONE_ATTENDS = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_GDN, **_EXPERTS},
    "qwen3_5_text": _GDN,
    "lfm2": {
        **_ATTENTION, "layer_types": ["conv", "full_attention", "conv", "conv"], "conv_L_cache": 3,
        "block_auto_adjust_ff_dim": False,
    },
    "granitemoehybrid": {
        **_MAMBA2, "layer_types": _ONE_ATTENDS, "num_local_experts": 0, "shared_intermediate_size": 96,
        "logits_scaling": 4.0,
    },
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 128, "head_dim": 16},
    "nemotron_h": {
        **_ATTENTION, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8, "expand": 2,
        "chunk_size": 64, "layers_block_type": ["mamba", "attention", "mamba", "mlp"], "head_dim": 16,
    },
    "zamba2": {
        **_ATTENTION, "n_mamba_heads": 8, "mamba_ngroups": 2, "mamba_d_state": 8, "mamba_expand": 2, "chunk_size": 64,
        "layers_block_type": ["mamba", "hybrid", "mamba", "mamba"], "num_mem_blocks": 1, "adapter_rank": 8,
    },
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "qwen3_5_moe_text": {**_GDN, **_EXPERTS},
    "lfm2_moe": {
        **_ATTENTION, "layer_types": ["conv", "full_attention", "conv", "conv"], "conv_L_cache": 3,
        "num_dense_layers": 1, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    },
}  # fmt: skip
"""The same with experts."""
DECAY = -2.0
"""Mean of the logarithm of how fast a state decays: slowly, so that it still holds what was read long ago."""
