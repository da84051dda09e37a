"""What the transformers engine can hold, decided from a model's config alone. No torch here.

Supported: the decoder-only models of `RUNS`, with a rope that does not change with length. What each layer keeps is
read in `groups.py`. Models of one plain full group run packed (`packed.py`) where thaw's attention is known to compute
what theirs does (`PACKED`); all others run as stock, one session a pass (`single.py`). Everything else is refused by
name. The doctor and the boot ask this one table, each with the config as transformers resolves it
(`hf.config.resolved`), so they say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from thaw.core.cache import CacheGroup, is_plain, token_nbytes
from thaw.core.errors import Unsupported
from thaw.engines.hf.config import WINDOWED, num_positions, ropes
from thaw.engines.transformers import recurrent
from thaw.engines.transformers.groups import KV, NOTHING, Latent, groups, layers, shape, text_config

TESTED = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GPTNeoXForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Lfm2ForCausalLM",
    "Lfm3ForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "BambaForCausalLM",
    "FalconH1ForCausalLM",
    "NemotronHForCausalLM",
    "Zamba2ForCausalLM",
    "FalconForCausalLM",
    "GPT2LMHeadModel",
    "CohereForCausalLM",
    "Gemma2ForCausalLM",
    "GptOssForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma4ForCausalLM",
    "MiMoV2FlashForCausalLM",
    "Llama4ForCausalLM",
    "DeepseekV3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
)
PACKED = frozenset(
    (
        "afmoe",
        "apertus",
        "arcee",
        "aria_text",
        "biogpt",
        "bitnet",
        "cwm",
        "dots1",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "exaone_moe",
        "flex_olmo",
        "gemma",
        "gemma3_text",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt_neox",
        "granite",
        "granitemoe",
        "granitemoeshared",
        "helium",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "hy_v3",
        "hyperclovax",
        "internlm3",
        "iquestcoder",
        "jais2",
        "kolibri1",
        "laguna",
        "lfm2",
        "lfm2_moe",
        "lfm3",
        "llama",
        "mellum",
        "minimax_m2",
        "minimax_m3_vl_text",
        "ministral3",
        "mistral",
        "mixtral",
        "nanochat",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "opt",
        "persimmon",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "solar_open",
        "starcoder2",
    )
)
"""Model types whose own attention and head compute what thaw's do, where they are one plain full group."""
SINGLE = frozenset(
    (
        "bloom",
        "codegen",
        "cohere",
        "cohere2",
        "cohere2_moe",
        "deepseek_v2",
        "deepseek_v3",
        "doge",
        "falcon",
        "gemma2",
        "gemma3n_text",
        "gemma4_text",
        "glm4_moe_lite",
        "glm4v_text",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox_japanese",
        "gpt_oss",
        "gptj",
        "granite_swa",
        "granitemoe_swa",
        "jetmoe",
        "llama4_text",
        "mimo_v2_flash",
        "minicpm3",
        "ministral",
        "mpt",
        "nemotron",
        "qwen2_5_vl_text",
        "qwen2_vl_text",
        "qwen3_vl_moe_text",
        "qwen3_vl_text",
        "stablelm",
        "vaultgemma",
        "xglm",
        "youtu",
    )
)
"""Model types that run with their own attention and head only."""
RUNS = PACKED | SINGLE | recurrent.RUNS
"""Model types that somebody has looked at; `tests/engines/test_shapes.py` boots each. Others are refused."""
WINDOWS = frozenset(
    (
        "afmoe",
        "cohere2",
        "cohere2_moe",
        "cwm",
        "exaone4",
        "exaone_moe",
        "gemma2",
        "gemma3_text",
        "gemma3n_text",
        "gemma4_text",
        "gpt_oss",
        "granite_swa",
        "granitemoe_swa",
        "kolibri1",
        "laguna",
        "lfm3",
        "llama4_text",
        "mellum",
        "mimo_v2_flash",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "olmo3",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "starcoder2",
        "vaultgemma",
    )
)
"""Those of them whose layers may have a window or chunks."""
ONE_MASK = frozenset(("ministral3", "mistral", "mixtral", "phi3", "phimoe", "qwen3_moe", "starcoder2"))
"""Those of them whose class gives all layers one mask, of a window where the config names one."""
LATENTS = frozenset(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"))
"""Those of them that keep latents (MLA)."""
WITH_TEXT = frozenset(
    (
        "aya_vision",
        "cohere2_vision",
        "gemma3",
        "gemma4",
        "glm4v",
        "idefics3",
        "internvl",
        "llama4",
        "llava",
        "mistral3",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_vl",
        "qwen3_vl_moe",
        "smolvlm",
    )
)
"""Multimodal types whose text part runs by itself: no image, sound or video can be in a session."""
WHY = {
    "bert": "it is an encoder",
}
"""Why some others are not there."""
DTYPES = ("bfloat16", "float16", "float32")
"""What the engine runs in."""
OWN = "auto"
"""A dtype for the weights' own."""
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")
"""Fields that name the tokens which stand for what is no text."""
SCALED = ("logits_scaling", "logit_scale")
CAPPED = ("attn_logit_softcapping", "final_logit_softcapping")
"""What thaw's own attention and head do not compute."""
LENGTH_ROPES = ("dynamic", "longrope", "su")  # "su" is longrope's first name


ALIBI = ("bloom", "falcon", "mpt")
"""Types that compute ALiBi positions themselves."""
STATES = ("ssm_cfg", "mamba_d_state", "state_size", "time_step_rank", "linear_num_value_heads")
"""Fields of models with recurrent layers."""


class Support(msgspec.Struct, frozen=True, kw_only=True):
    """`supported` with `reasons` against it (empty when supported); `tested` architectures are in thaw's own tests.

    `groups`: its cache groups at `dtype`, and `kv_token_nbytes` their bytes a token; empty, and None, when the config
    does not say. `packed`: thaw's attention takes the place of the model's own."""

    architecture: str
    supported: bool
    tested: bool
    reasons: tuple[str, ...]
    num_layers: int | None
    num_kv_heads: int | None
    head_dim: int | None
    dtype: str
    groups: tuple[CacheGroup, ...]
    kv_token_nbytes: int | None
    max_model_len: int | None
    packed: bool


def examine(config: Mapping[str, Any], dtype: str | None = None) -> Support:
    """Read a resolved config (as `to_dict()` gives it) and say whether it is supported, and why not."""
    architecture = str((config.get("architectures") or [config.get("model_type", "unknown")])[0])
    text = text_config(config)
    layers, heads, dim = shape(text)
    own = next((c[name] for c in (config, text) for name in ("dtype", "torch_dtype") if c.get(name)), "float32")
    dtype = str(dtype or own).removeprefix("torch.")
    reasons = tuple(_reasons(config, text, architecture))
    if dtype not in (*DTYPES, OWN):
        reasons += (f"it runs in {dtype}; load it with dtype one of {', '.join(DTYPES)}",)
    found = groups(text, dtype)
    return Support(
        architecture=architecture,
        supported=not reasons,
        tested=architecture in TESTED,
        reasons=reasons,
        num_layers=layers,
        num_kv_heads=heads,
        head_dim=dim,
        dtype=dtype,
        groups=found,
        kv_token_nbytes=token_nbytes(found) if found else None,
        max_model_len=num_positions(text),
        packed=config is text and _is_packed(text),
    )


def require(config: Mapping[str, Any], dtype: str | None = None) -> Support:
    """`examine`, raising `Unsupported` with every reason."""
    found = examine(config, dtype)
    if not found.supported:
        raise Unsupported(
            f"{found.architecture} is not supported: {'; '.join(found.reasons)}. See `thaw doctor --config`."
        )
    return found


def placeholders(config: Mapping[str, Any]) -> dict[int, str]:
    """The tokens that stand for an image, a video or sound in a model of several parts, and the field that says so."""
    return {config[name]: name for name in PLACEHOLDERS if isinstance(config.get(name), int)}


def _is_packed(text: Mapping[str, Any]) -> bool:
    found = groups(text, "float32")
    more = any(text.get(name) not in (None, False, 1) for name in (*SCALED, *CAPPED))
    return text.get("model_type") in PACKED and len(found) == 1 and is_plain(found) and not more


def _reasons(config: Mapping[str, Any], text: Mapping[str, Any], architecture: str) -> list[str]:
    out = []
    if config.get("is_encoder_decoder"):
        out.append("it is an encoder-decoder model")
    if not _has_head(architecture, config is not text) and config.get("architectures"):
        out.append(f"{architecture} is not a causal language model with a language-model head")
    states = recurrent.LAYER_TYPES if text.get("model_type") in recurrent.RUNS else ()
    known = {"full_attention", *WINDOWED, *NOTHING, *states}
    kinds = sorted(set(map(str, text.get("layer_types") or ())) - known)
    if kinds:
        out.append(f"some layers are of a kind that thaw does not know ({', '.join(kinds)})")
    kinds = sorted(_rope_types(text) & set(LENGTH_ROPES))
    if kinds:
        out.append(f"its rope ({', '.join(kinds)}) changes with length, so stored keys would change too")
    if _alibi(text) and text.get("model_type") not in ALIBI:
        out.append("it uses ALiBi positions")
    if text.get("model_type") in recurrent.FORGETFUL:
        out.append("its own code forgets the recurrent state where several tokens follow it")
    elif any(text.get(key) for key in STATES) and text.get("model_type") not in recurrent.RUNS:
        out.append("it has recurrent layers that thaw does not know")
    if config.get("quantization_config") is not None:
        out.append("its weights are quantised in a way that was not tested")
    out += [] if out else _unknown(config, text)
    if not layers(text):
        out.append("the config does not give layers, heads and head size")
    elif not token_nbytes(groups(text, "float32")):
        out.append("none of its layers attends; thaw keeps recurrent states beside attention")
    return out


def _has_head(architecture: str, of_several_parts: bool) -> bool:
    suffixes = ("ForCausalLM", "LMHeadModel", *(("ForConditionalGeneration",) if of_several_parts else ()))
    return architecture.endswith(suffixes)


def _unknown(config: Mapping[str, Any], text: Mapping[str, Any]) -> list[str]:
    outer, inner = str(config.get("model_type")), str(text.get("model_type"))
    if config is not text and outer not in WITH_TEXT:
        return [f"thaw does not run the text part of models of type {outer} yet"]
    if inner not in RUNS:
        return [WHY.get(inner, f"thaw does not run models of type {inner} yet")]
    kept = {spec for specs in layers(text) for spec in specs}
    out = []
    if inner not in WINDOWS and any(isinstance(spec, KV) and spec.window for spec in kept):
        out.append(f"its config names a sliding window, which models of type {inner} are not known to have")
    if inner in ONE_MASK and text.get("sliding_window") and any(isinstance(s, KV) and s.window is None for s in kept):
        out.append(
            f"its config names layers without a window beside sliding_window={text['sliding_window']}, and the class "
            f"of models of type {inner} gives every layer that window"
        )
    if inner not in LATENTS and (text.get("kv_lora_rank") or any(isinstance(spec, Latent) for spec in kept)):
        out.append(f"its config names a latent cache (MLA), which models of type {inner} are not known to have")
    return out


def _rope_types(config: Mapping[str, Any]) -> set[str]:
    """The kinds of rope; newer configs may give one for each kind of layer."""
    return {str(one.get("rope_type") or one.get("type") or "") for one in ropes(config)}


def _alibi(config: Mapping[str, Any]) -> bool:
    """Bloom always has it and no field says so; MPT says it one level down."""
    inner = config.get("attn_config")
    return bool(
        config.get("alibi")
        or config.get("position_embedding_type") == "alibi"
        or config.get("model_type") == "bloom"
        or (isinstance(inner, Mapping) and inner.get("alibi"))
    )
