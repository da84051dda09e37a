"""What the doctor says of models that many people run, by what their config.json says: bytes a token, and of states.

Numbers are of the models' cards, in bfloat16; `per_token` counts each layer that keeps a token's KV, windows included.
States are the convolution's columns in bfloat16 and the recurrence in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

pytest.importorskip("transformers")

from thaw.doctor import model as doctor

KIB = 1024


class Known(NamedTuple):
    """`against`: words of the reason why it is refused as it is published."""

    architecture: str
    model_type: str
    fields: dict[str, Any]
    per_token: int | None
    kinds: dict[str, int]
    """How many layers keep what."""
    against: str = ""
    states: int = 0


def heads(layers: int, query: int, kv: int, dim: int, hidden: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers, "num_attention_heads": query, "num_key_value_heads": kv, "head_dim": dim,
        "hidden_size": hidden, "vocab_size": 1000, "dtype": "bfloat16", **more,
    }  # fmt: skip


def full(architecture: str, model_type: str, per_token: int, layers: int, *rest: int, **more: Any) -> Known:
    return Known(architecture, model_type, heads(layers, *rest, **more), per_token, {"full": layers})


def parts(architecture: str, outer: str, per_token: int, kinds: dict[str, int], **text: Any) -> Known:
    return Known(architecture, outer, {"text_config": text, "dtype": "bfloat16"}, per_token, kinds)


MLA = {"qk_rope_head_dim": 64, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "v_head_dim": 128}
GDN = {
    "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
}  # fmt: skip
LFM2 = ["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)]
LFM2_MOE = ["full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv" for i in range(24)]
NEMOTRON_3_NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
QWEN_35B = heads(40, 16, 2, 256, 2048, linear_num_value_heads=32, **GDN)
"""Of Qwen3.5 and Qwen3.6 alike."""
GRANITE_H = ["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)]
MODELS: dict[str, Known] = {
    "Llama 3.1 8B": full("LlamaForCausalLM", "llama", 128 * KIB, 32, 32, 8, 128, 4096),
    "Llama 3.2 1B": full("LlamaForCausalLM", "llama", 32 * KIB, 16, 32, 8, 64, 2048),
    "Llama 3.2 3B": full("LlamaForCausalLM", "llama", 112 * KIB, 28, 24, 8, 128, 3072),
    "Llama 3.3 70B": full("LlamaForCausalLM", "llama", 320 * KIB, 80, 64, 8, 128, 8192),
    "TinyLlama 1.1B": full("LlamaForCausalLM", "llama", 22 * KIB, 22, 32, 4, 64, 2048),
    "SmolLM2 135M": full("LlamaForCausalLM", "llama", 23040, 30, 9, 3, 64, 576),
    "SmolLM3 3B": full("SmolLM3ForCausalLM", "smollm3", 72 * KIB, 36, 16, 4, 128, 2048),
    "Qwen2.5 0.5B": full("Qwen2ForCausalLM", "qwen2", 12 * KIB, 24, 14, 2, 64, 896),
    "Qwen2.5 1.5B": full("Qwen2ForCausalLM", "qwen2", 28 * KIB, 28, 12, 2, 128, 1536),
    "Qwen2.5 7B": full("Qwen2ForCausalLM", "qwen2", 56 * KIB, 28, 28, 4, 128, 3584),
    "Qwen2.5 32B": full("Qwen2ForCausalLM", "qwen2", 256 * KIB, 64, 40, 8, 128, 5120),
    "Qwen3 0.6B": full("Qwen3ForCausalLM", "qwen3", 112 * KIB, 28, 16, 8, 128, 1024),
    "Qwen3 8B": full("Qwen3ForCausalLM", "qwen3", 144 * KIB, 36, 32, 8, 128, 4096),
    "Qwen3 32B": full("Qwen3ForCausalLM", "qwen3", 256 * KIB, 64, 64, 8, 128, 5120),
    "Qwen3 30B-A3B": full("Qwen3MoeForCausalLM", "qwen3_moe", 96 * KIB, 48, 32, 4, 128, 2048),
    "Qwen3 235B-A22B": full("Qwen3MoeForCausalLM", "qwen3_moe", 188 * KIB, 94, 64, 4, 128, 4096),
    "Mistral 7B v0.3": full("MistralForCausalLM", "mistral", 128 * KIB, 32, 32, 8, 128, 4096, sliding_window=None),
    "Mistral Nemo": full("MistralForCausalLM", "mistral", 160 * KIB, 40, 32, 8, 128, 5120, sliding_window=None),
    "Mixtral 8x7B": full("MixtralForCausalLM", "mixtral", 128 * KIB, 32, 32, 8, 128, 4096, sliding_window=None),
    "Phi 2": full("PhiForCausalLM", "phi", 320 * KIB, 32, 32, 32, 80, 2560),
    "Phi 4": full("Phi3ForCausalLM", "phi3", 200 * KIB, 40, 40, 10, 128, 5120, sliding_window=None),
    "OLMo 2 7B": full("Olmo2ForCausalLM", "olmo2", 512 * KIB, 32, 32, 32, 128, 4096),
    "GLM 4.5 Air": full("Glm4MoeForCausalLM", "glm4_moe", 184 * KIB, 46, 96, 8, 128, 4096),
    "Granite 3.3 8B": full("GraniteForCausalLM", "granite", 160 * KIB, 40, 32, 8, 128, 4096, logits_scaling=16.0),
    "StableLM 2 1.6B": full("StableLmForCausalLM", "stablelm", 192 * KIB, 24, 32, 32, 64, 2048),
    "Pythia 1.4B": full("GPTNeoXForCausalLM", "gpt_neox", 192 * KIB, 24, 16, 16, 128, 2048),
    "GPT-2": Known(
        "GPT2LMHeadModel", "gpt2", {"n_layer": 12, "n_head": 12, "n_embd": 768, "dtype": "bfloat16"}, 36 * KIB,
        {"full": 12},
    ),
    "Falcon 7B": Known(
        "FalconForCausalLM", "falcon",
        {
            "num_hidden_layers": 32, "num_attention_heads": 71, "hidden_size": 4544, "multi_query": True,
            "dtype": "bfloat16",
        },
        8 * KIB, {"full": 32},
    ),
    "Mistral 7B v0.1": Known(
        "MistralForCausalLM", "mistral", heads(32, 32, 8, 128, 4096, sliding_window=4096), 128 * KIB, {"sliding": 32}
    ),
    "Phi 3 mini 4k": Known(
        "Phi3ForCausalLM", "phi3", heads(32, 32, 32, 96, 3072, sliding_window=2047), 384 * KIB, {"sliding": 32}
    ),
    "Gemma 2 9B": Known(
        "Gemma2ForCausalLM", "gemma2", heads(42, 16, 8, 256, 3584, sliding_window=4096), 336 * KIB,
        {"sliding": 21, "full": 21},
    ),
    "Gemma 3 270M": Known(
        "Gemma3ForCausalLM", "gemma3_text", heads(18, 4, 1, 256, 640, sliding_window=512), 18 * KIB,
        {"sliding": 15, "full": 3},
    ),
    "Gemma 3 1B": Known(
        "Gemma3ForCausalLM", "gemma3_text", heads(26, 4, 1, 256, 1152, sliding_window=512), 26 * KIB,
        {"sliding": 22, "full": 4},
    ),
    "OLMo 3 7B": Known(
        "Olmo3ForCausalLM", "olmo3", heads(32, 32, 32, 128, 4096, sliding_window=4096), 512 * KIB,
        {"sliding": 24, "full": 8},
    ),
    "Command R7B": Known(
        "Cohere2ForCausalLM", "cohere2", heads(32, 32, 8, 128, 4096, sliding_window=4096), 128 * KIB,
        {"sliding": 24, "full": 8},
    ),
    "gpt-oss 20B, as published": Known(
        "GptOssForCausalLM", "gpt_oss",
        heads(24, 64, 8, 64, 2880, sliding_window=128, quantization_config={"quant_method": "mxfp4"}), 48 * KIB,
        {"sliding": 12, "full": 12}, "quantised",
    ),
    "gpt-oss 120B in bfloat16": Known(
        "GptOssForCausalLM", "gpt_oss", heads(36, 64, 8, 64, 2880, sliding_window=128), 72 * KIB,
        {"sliding": 18, "full": 18},
    ),
    "DeepSeek V3, as published": Known(
        "DeepseekV3ForCausalLM", "deepseek_v3",
        heads(61, 128, 128, 64, 7168, **MLA, quantization_config={"quant_method": "fp8"}), 61 * 576 * 2,
        {"latent": 61}, "quantised",
    ),
    "DeepSeek V2 Lite": Known(
        "DeepseekV2ForCausalLM", "deepseek_v2", heads(27, 16, 16, 64, 2048, **MLA, q_lora_rank=None), 27 * 576 * 2,
        {"latent": 27},
    ),
    "GLM 4.7 Flash": Known(
        "Glm4MoeLiteForCausalLM", "glm4_moe_lite", heads(47, 20, 20, 64, 2048, **MLA), 47 * 576 * 2, {"latent": 47}
    ),
    "Qwen3-Next 80B-A3B": Known(
        "Qwen3NextForCausalLM", "qwen3_next", heads(48, 16, 2, 256, 2048, linear_num_value_heads=32, **GDN), 24 * KIB,
        {"state": 36, "full": 12}, states=36 * (4 * 32 * 128 * 128 + 2 * 3 * (2 * 16 + 32) * 128),
    ),
    "LFM2 1.2B": Known(
        "Lfm2ForCausalLM", "lfm2", heads(16, 32, 8, 64, 2048, layer_types=LFM2, conv_L_cache=3), 12 * KIB,
        {"state": 10, "full": 6}, states=10 * 2 * 2 * 2048,
    ),
    "Granite 4 H tiny": Known(
        "GraniteMoeHybridForCausalLM", "granitemoehybrid",
        heads(40, 12, 4, 128, 1536, layer_types=GRANITE_H, mamba_n_heads=48, mamba_d_head=64, mamba_d_state=128,
              mamba_n_groups=1, mamba_d_conv=4, logits_scaling=6.0),
        8 * KIB, {"state": 36, "full": 4}, states=36 * (4 * 48 * 64 * 128 + 2 * 3 * (48 * 64 + 2 * 128)),
    ),
    "Granite 4 H small": Known(
        "GraniteMoeHybridForCausalLM", "granitemoehybrid",
        heads(40, 32, 8, 128, 4096, layer_types=GRANITE_H, mamba_n_heads=128, mamba_d_head=64, mamba_d_state=128,
              mamba_n_groups=1, mamba_d_conv=4, logits_scaling=16.0),
        16 * KIB, {"state": 36, "full": 4}, states=36 * (4 * 128 * 64 * 128 + 2 * 3 * (128 * 64 + 2 * 128)),
    ),
    "Nemotron 3 Nano 30B-A3B": Known(
        "NemotronHForCausalLM", "nemotron_h",
        heads(52, 32, 2, 128, 2688, hybrid_override_pattern=NEMOTRON_3_NANO, mamba_num_heads=64, mamba_head_dim=64,
              n_groups=8, ssm_state_size=128, conv_kernel=4, chunk_size=128),
        6 * KIB, {"state": 23, "full": 6}, states=23 * (4 * 64 * 64 * 128 + 2 * 3 * (64 * 64 + 2 * 8 * 128)),
    ),
    "LFM2 8B-A1B": Known(
        "Lfm2MoeForCausalLM", "lfm2_moe", heads(24, 32, 8, 64, 2048, layer_types=LFM2_MOE, conv_L_cache=3), 12 * KIB,
        {"state": 18, "full": 6}, states=18 * 2 * 2 * 2048,
    ),
    "GLM 4.7": full("Glm4MoeForCausalLM", "glm4_moe", 368 * KIB, 92, 96, 8, 128, 5120),
    "MiniMax M2": full("MiniMaxM2ForCausalLM", "minimax_m2", 248 * KIB, 62, 48, 8, 128, 3072),
    "Seed-OSS 36B": full("SeedOssForCausalLM", "seed_oss", 256 * KIB, 64, 80, 8, 128, 5120),
    "DeepSeek V3.2": Known(
        "DeepseekV32ForCausalLM", "deepseek_v32",
        heads(61, 128, 128, 64, 7168, **MLA, index_topk=2048, index_n_heads=64, index_head_dim=128), None, {},
        "indexed_attention",
    ),
    "Mistral Small 3.2 24B": parts(
        "Mistral3ForConditionalGeneration", "mistral3", 160 * KIB, {"full": 40},
        **heads(40, 32, 8, 128, 5120, model_type="mistral", sliding_window=None),
    ),
    "Qwen2.5-VL 7B": parts(
        "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", 56 * KIB, {"full": 28}, **heads(28, 28, 4, 128, 3584)
    ),
    "Qwen3-VL 8B": parts(
        "Qwen3VLForConditionalGeneration", "qwen3_vl", 144 * KIB, {"full": 36}, **heads(36, 32, 8, 128, 4096)
    ),
    "Gemma 3 27B": parts(
        "Gemma3ForConditionalGeneration", "gemma3", 496 * KIB, {"sliding": 52, "full": 10},
        **heads(62, 32, 16, 128, 5376, sliding_window=1024),
    ),
    "Llama 4 Scout": parts(
        "Llama4ForConditionalGeneration", "llama4", 192 * KIB, {"sliding": 36, "full": 12},
        **heads(48, 40, 8, 128, 5120, attention_chunk_size=8192),
    ),
    "Qwen3.5 27B": parts(
        "Qwen3_5ForConditionalGeneration", "qwen3_5", 64 * KIB, {"state": 48, "full": 16},
        **heads(64, 24, 4, 256, 5120, linear_num_value_heads=48, **GDN),
    )._replace(states=48 * (4 * 48 * 128 * 128 + 2 * 3 * (2 * 16 + 48) * 128)),
    "Qwen3.5 35B-A3B": parts(
        "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", 20 * KIB, {"state": 30, "full": 10}, **QWEN_35B
    )._replace(states=30 * (4 * 32 * 128 * 128 + 2 * 3 * (2 * 16 + 32) * 128)),
    "Qwen3.6 35B-A3B": parts(
        "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", 20 * KIB, {"state": 30, "full": 10}, **QWEN_35B
    )._replace(states=30 * (4 * 32 * 128 * 128 + 2 * 3 * (2 * 16 + 32) * 128)),
    "Ministral 3 8B": parts(
        "Mistral3ForConditionalGeneration", "mistral3", 136 * KIB, {"full": 34},
        **heads(34, 32, 8, 128, 4096, model_type="ministral3", sliding_window=None),
    ),
    "Gemma 4 31B": parts(
        "Gemma4ForConditionalGeneration", "gemma4", 50 * 16 * KIB + 10 * 8 * KIB, {"sliding": 50, "full": 10},
        **heads(60, 32, 16, 256, 5376, sliding_window=1024, global_head_dim=512, num_global_key_value_heads=4,
                attention_k_eq_v=True, hidden_size_per_layer_input=0),
    ),
    "Gemma 4 26B-A4B": parts(
        "Gemma4ForConditionalGeneration", "gemma4", 25 * 8 * KIB + 5 * 4 * KIB, {"sliding": 25, "full": 5},
        **heads(30, 16, 8, 256, 2816, sliding_window=1024, global_head_dim=512, num_global_key_value_heads=2,
                attention_k_eq_v=True, hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=128,
                top_k_experts=8, moe_intermediate_size=704),
    ),
    "Kimi K2": Known(
        "DeepseekV3ForCausalLM", "kimi_k2", heads(61, 64, 64, 64, 7168, **MLA), 61 * 576 * 2, {"latent": 61},
        "type kimi_k2",
    ),
}  # fmt: skip
"""Configs from what is published about each model, with the fields that decide what is kept."""


@pytest.mark.parametrize("name", MODELS)
def test_the_doctor_knows_what_a_models_layers_keep(name: str) -> None:
    known = MODELS[name]
    config = {"architectures": [known.architecture], "model_type": known.model_type, **known.fields}
    said = doctor.report(name, config)
    assert (said.kv_token_nbytes, said.state_nbytes or 0) == (known.per_token, known.states)
    assert {group.partition(":")[0]: _num_layers(group) for group in said.cache_groups} == known.kinds
    assert said.dtype == "bfloat16"
    if known.against:
        assert known.against in " ".join(said.reasons)
    else:
        assert said.supported, said.reasons


def _num_layers(group: str) -> int:
    """Of a group in words: "layers 0..3" or "layers 0,2"."""
    named = group.partition("layers ")[2].partition(", ")[0]
    first, _, last = named.partition("..")
    return int(last) - int(first) + 1 if last else named.count(",") + 1
