"""What the transformers engine takes, decided from config.json alone: everything else is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from thaw.core.cache import LatentKV
from thaw.core.errors import Unsupported
from thaw.engines.transformers.support import examine, require

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "num_attention_heads": 9,
    "num_key_value_heads": 3, "num_hidden_layers": 30, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
    "rope_theta": 100000, "rope_scaling": None,
}  # fmt: skip
GOOD: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama 3 rope": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "qwen2 with its window switched off": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 4096,
        "use_sliding_window": False,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "sliding_window": None,
        "layer_types": ["full_attention"] * 30,
    },
    "gpt_neox": {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "num_key_value_heads": None},
    "mistral without a window": {"architectures": ["MistralForCausalLM"], "sliding_window": None},
    "mistral with a window": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4096},
    "gemma 2, soft caps": {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "sliding_window": 4096,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "layer_types": ["sliding_attention", "full_attention"] * 15,
    },
    "bloom, ALiBi": {"architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_layer": 2, "n_head": 4},
    "latents": {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
    },
}  # fmt: skip
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a window where the class has none": ({"sliding_window": 4096}, "models of type llama are not known to have"),
    "fewer layers than it says": ({"layer_types": ["full_attention"] * 2}, "does not give layers"),
    "a window of no size": (
        {"model_type": "gemma2", "layer_types": ["full_attention", "sliding_attention"] * 15}, "does not give layers",
    ),
    "linear attention": ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
    "MLA": ({"architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 512, "qk_rope_head_dim": 64}, "MLA"),
    "dynamic rope": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    "dynamic rope, new name": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    "longrope": ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
    "longrope under its old name": ({"rope_scaling": {"type": "su"}}, "rope"),
    "a rope for each kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "longrope"}, "other": {"rope_type": "default"}}}, "rope",
    ),
    "encoder-decoder": ({"architectures": ["T5Model"], "is_encoder_decoder": True}, "encoder-decoder"),
    "alibi": ({"alibi": True}, "ALiBi"),
    "mamba": ({"architectures": ["MambaForCausalLM"], "model_type": "mamba", "state_size": 16}, "recurrent"),
    "jamba": ({"architectures": ["JambaForCausalLM"], "mamba_d_state": 16}, "recurrent"),
    "a classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "causal language model"),
    "bert": ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "causal language model"),
    "quantised weights": ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    "no layers": ({"num_hidden_layers": None}, "layers"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_supported(name: str) -> None:
    found = require({**LLAMA, **GOOD[name]})
    assert found.supported and not found.reasons


def test_the_numbers_are_read() -> None:
    found = examine(LLAMA)
    assert (found.num_layers, found.num_kv_heads, found.head_dim, found.dtype) == (30, 3, 64, "bfloat16")
    assert found.kv_token_nbytes == 30 * 2 * 3 * 64 * 2
    assert found.max_model_len == 8192 and found.tested
    assert examine(LLAMA, "float32").kv_token_nbytes == 2 * 30 * 2 * 3 * 64 * 2


def test_a_window_and_a_latent_are_read() -> None:
    windowed = examine({**LLAMA, **GOOD["gemma 2, soft caps"]}).groups
    assert [(group.name, group.num_layers, getattr(group, "window", None)) for group in windowed] == [
        ("sliding", 15, 4096), ("full", 15, None),
    ]  # fmt: skip
    (latent,) = examine({**LLAMA, **GOOD["latents"]}).groups
    assert isinstance(latent, LatentKV) and latent.width == 576 and latent.token_nbytes == 30 * 576 * 2


def test_only_what_thaws_attention_computes_runs_packed() -> None:
    assert require(LLAMA).packed and not require({**LLAMA, **GOOD["mistral with a window"]}).packed
    assert not require({**LLAMA, "model_type": "granite", "logits_scaling": 8.0}).packed


def test_an_architecture_that_was_not_tested_says_so() -> None:
    assert not examine({**LLAMA, "architectures": ["MistralForCausalLM"]}).tested


@pytest.mark.parametrize("name", BAD)
def test_refused_by_name(name: str) -> None:
    config, reason = BAD[name]
    with pytest.raises(Unsupported) as refusal:
        require({**LLAMA, **config})
    assert reason in str(refusal.value) and config.get("architectures", ["Llama"])[0][:5] in str(refusal.value)


@pytest.mark.parametrize("config", [{}, {"architectures": []}, {"architectures": None}, {"rope_scaling": 5},
                                    {"layer_types": None}, {"hidden_size": 0}, {"dtype": 7}])  # fmt: skip
def test_an_odd_config_is_refused_and_not_a_crash(config: dict[str, Any]) -> None:
    assert isinstance(examine(config).supported, bool)
    if "hidden_size" not in config:
        assert not examine(config).supported
