"""Small random models of other kinds than those of `thaw.testing.models`: windows, latents, an attention of the model's
own, recurrent layers, and the text part of multimodal classes.

They are drawn as those of `thaw.testing.models` are, so that a model looks at its KV, and have their tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from recurrent_shapes import DECAY, MORE
from recurrent_shapes import SHAPES as RECURRENT
from thaw.testing.models import _COMMON, VOCAB_SIZE, _stream, _tokenizer
from thaw.testing.models import _SHAPES as _PLAIN

if TYPE_CHECKING:
    import torch

__all__ = ["BOTH", "KINDS", "OF_KINDS", "ON_VLLM", "PARTS", "RECURRENT", "WINDOW", "make_kind_model"]

KINDS = {
    "falcon": "full attention of a model's own: heads that its cache repeats",
    "gpt2": "full attention of a model's own: learned positions",
    "cohere": "full attention, scaled logits",
    "gemma2": "windows and full attention, soft caps",
    "gpt_oss": "windows and full attention, sinks",
    "gemma3_text": "windows and full attention, a rope for each",
    "gemma4_text": "windows and full attention of other head sizes, layers that read other layers' KV",
    "mimo_v2_flash": "windows and full attention, values narrower than keys",
    "llama4_text": "chunks and full attention",
    "olmo3": "windows and full attention",
    "mellum": "windows and full attention",
    "deepseek_v3": "latents (MLA)",
    "minicpm3": "latents (MLA)",
}
"""Architectures whose cache or attention is of another kind, and what each is for."""
ON_SGLANG = {
    "olmo3": "tested", "mellum": "tested", "minicpm3": "tested", "gemma3_text": "tested",
    "deepseek_v3": "not on a CPU", "gpt_oss": "not on a CPU", "llama4_text": "not in SGLang", "gemma2": "not tried",
    "gemma4_text": "not tried", "mimo_v2_flash": "not tried", "gpt2": "tested", "cohere": "tested",
    "falcon": "not in SGLang",
}  # fmt: skip
"""What the table of kinds says of these on SGLang, on a CPU (`on_sglang/test_kinds_sglang.py`)."""
ON_VLLM = {
    **dict.fromkeys(("falcon", "gpt2", "cohere", "deepseek_v3"), "tested on 0.32"),
    **dict.fromkeys(("gpt_oss", "gemma2", "gemma3_text", "llama4_text", "olmo3"), "tested on 0.32"),
    "mellum": "starts in 0.32; not run with thaw",
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "lfm2"), "tested on 0.32"),
    **dict.fromkeys(("granitemoehybrid", "falcon_h1", "nemotron_h", "zamba2"), "tested on 0.32"),
    **dict.fromkeys(("gemma4_text", "mimo_v2_flash", "minicpm3", "bamba"), "refused by name"),
}
"""What the table of kinds says of these on vLLM, on a CPU (`on_vllm/test_kinds_….py`)."""
BOTH = ("lfm3",)
"""Architectures with windows, recurrent states and full attention."""
WINDOW = 40
"""Tokens that a token attends to in the layers with a window."""
PARTS = ("gemma3", "mistral3", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
"""Multimodal architectures; the text part runs."""
_SHAPES: dict[str, dict[str, Any]] = {
    "falcon": {
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True,
        "alibi": False, "ffn_hidden_size": 160,
    },
    "granite": {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128},
    "stablelm": {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128},
    "nemotron": {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128},
    "gpt2": {"num_hidden_layers": 2, "num_attention_heads": 4},
    "cohere": {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "logit_scale": 0.25},
    "gemma2": {
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "query_pre_attn_scalar": 16, "sliding_window": WINDOW,
    },
    "gpt_oss": {
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "gemma3_text": {
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16,
        "sliding_window": WINDOW, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    },
    "gemma4_text": {
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "global_head_dim": 32, "sliding_window": WINDOW, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB_SIZE,
    },
    "mimo_v2_flash": {
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "v_head_dim": 8,
        "sliding_window": WINDOW, "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    },
    "llama4_text": {
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "attention_chunk_size": 64, "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "no_rope_layers": [1, 0, 1], "num_local_experts": 2, "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 96,
    },
    "deepseek_v3": {
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32,
        "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "head_dim": 8,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
        "moe_intermediate_size": 32, "n_shared_experts": 1,
    },
    "minicpm3": {
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32,
        "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 16, "scale_emb": 1,
        "scale_depth": 1.0, "dim_model_base": 64,
    },
    "mellum": {
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "sliding_window": WINDOW, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    },
    "olmo3": {
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "sliding_window": WINDOW, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "deepseek_v2": {
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32,
        "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "head_dim": 8,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
        "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1,
    },
    "glm4_moe_lite": {
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32,
        "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "head_dim": 8,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
        "n_shared_experts": 1, "mlp_layer_types": ["dense", "sparse", "sparse"], "first_k_dense_replace": 1,
    },
    "lfm3": {
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "conv_L_cache": 3,
        "layer_types": ["conv", "sliding_attention", "full_attention", "conv"], "sliding_window": WINDOW,
    },
    **RECURRENT,
    **MORE,
}  # fmt: skip
_TINY_VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32}
_TINY_TOWER = {**_TINY_VISION, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
_TINY_QWEN = {**_TINY_VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
_PARTIAL_MROPE = {**_MROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}
_FIRST_UNUSED = 259
_SHAPES_OF_PARTS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": _SHAPES["gemma3_text"], "vision_config": {**_TINY_TOWER, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4, "image_token_index": _FIRST_UNUSED,
    },
    "mistral3": {
        "text_config": {**_PLAIN["llama"], "model_type": "mistral", "sliding_window": None},
        "vision_config": {**_TINY_TOWER, "model_type": "pixtral", "head_dim": 16}, "image_token_index": _FIRST_UNUSED,
    },
    "qwen2_5_vl": {
        "text_config": {**_PLAIN["qwen2"], "num_attention_heads": 4, "rope_parameters": _MROPE},
        "vision_config": {**_TINY_QWEN, "fullatt_block_indexes": [0]}, "image_token_id": _FIRST_UNUSED,
    },
    "qwen3_vl": {
        "text_config": {
            **_PLAIN["qwen3"], "head_dim": 16, "rope_parameters": {**_MROPE, "mrope_interleaved": True},
        },
        "vision_config": {**_TINY_QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        "image_token_id": _FIRST_UNUSED,
    },
    "qwen3_5": {
        "text_config": {**RECURRENT["qwen3_5_text"], "rope_parameters": _PARTIAL_MROPE},
        "vision_config": {**_TINY_QWEN, "num_position_embeddings": 16}, "image_token_id": _FIRST_UNUSED,
    },
    "qwen3_5_moe": {
        "text_config": {**MORE["qwen3_5_moe_text"], "rope_parameters": _PARTIAL_MROPE},
        "vision_config": {**_TINY_QWEN, "num_position_embeddings": 16}, "image_token_id": _FIRST_UNUSED,
    },
}  # fmt: skip
OF_KINDS = (*_SHAPES, *_SHAPES_OF_PARTS)
"""All that are made here."""


def make_kind_model(arch: str, out_dir: Path, *, dtype: str = "float32", seed: int = 0, **shape: Any) -> Path:
    """Writes a model of `OF_KINDS` and its tokenizer into `out_dir`, made if missing, and returns it; the arguments are
    those of `make_random_model`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    out_dir.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(arch, **_fields(arch, shape))
    made: Any = AutoModelForImageTextToText if arch in _SHAPES_OF_PARTS else AutoModelForCausalLM
    model = made.from_config(config, dtype=torch.float32)
    _draw_weights(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(out_dir)
    _tokenizer().save_pretrained(out_dir)
    return out_dir


def _fields(arch: str, shape: dict[str, Any]) -> dict[str, Any]:
    """Those of its config."""
    if arch in _SHAPES_OF_PARTS:
        own = _SHAPES_OF_PARTS[arch]
        return {**own, "text_config": _COMMON | own["text_config"] | shape}
    return _COMMON | _SHAPES[arch] | shape


def _draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Overwrites each parameter from its own stream of (seed, name): adding a layer changes no other tensor."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(_stream(seed, name))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(_scale(name, noise))


def _scale(name: str, noise: torch.Tensor) -> torch.Tensor:
    if name.endswith(("embed_tokens.weight", "embed_in.weight", "word_embeddings.weight", "wte.weight")):
        return noise
    if noise.ndim >= 2:
        return noise * float(noise.shape[-1] ** -0.5)  # [out, in]: deviation 1/sqrt(fan_in)
    if name.endswith("A_log"):
        return DECAY + noise * 0.3
    if name.endswith("bias"):
        return noise * 0.1
    return 1 + noise * 0.1  # the gain of a norm
