"""What the transformers engine can hold, decided from a model's config alone. No torch here.

Supported: the decoder-only models of `RUNS`, where every layer keeps keys and values of every token in one shape, with
a rope that does not change with length. Everything else is refused by name. The doctor and the boot ask this one table,
each with the config as transformers resolves it (`hf.config.resolved`), so they say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from thaw.core.cache import DTYPE_BYTES, CacheGroup, FullKV, token_nbytes
from thaw.core.errors import Unsupported
from thaw.engines.hf.config import num_positions, ropes

TESTED = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPTNeoXForCausalLM")
RUNS = frozenset(
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
"""Model types that thaw's pages, attention and head compute as their own code does; `tests/engines/test_shapes.py`
boots each. One that is not here is refused until somebody has looked at it."""
WHY = {
    "bert": "it is an encoder",
    "cohere": "its logits are scaled, and thaw computes the head alone",
    "falcon": "its attention asks the cache for more than thaw's gives",
    "gpt_oss": "its attention has sinks",
    "nemotron": "its attention takes a mask, which thaw does not compute",
    "stablelm": "its attention takes a mask, which thaw does not compute",
}
"""Why some others are not there."""
DTYPES = ("bfloat16", "float16", "float32")
"""What the engine runs in."""
OWN = "auto"
"""A dtype for the weights' own."""
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads")
HIDDEN = ("hidden_size", "n_embd", "d_model")
HEAD_DIM = ("head_dim", "kv_channels", "dim_head")
"""What configs call these numbers."""
SCALED = ("logits_scaling", "logit_scale")
LENGTH_ROPES = ("dynamic", "longrope", "su")  # "su" is longrope's first name


class Support(msgspec.Struct, frozen=True, kw_only=True):
    """`supported` with `reasons` against it (empty when supported); `tested` architectures are in thaw's own tests.

    `groups`: its cache groups at `dtype`, and `kv_token_nbytes` their bytes a token; empty, and None, when the config
    does not say."""

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


def examine(config: Mapping[str, Any], dtype: str | None = None) -> Support:
    """Read a resolved config (as `to_dict()` gives it) and say whether it is supported, and why not."""
    architecture = str((config.get("architectures") or [config.get("model_type", "unknown")])[0])
    layers, heads, dim = _shape(config)
    dtype = str(dtype or config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    reasons = tuple(_reasons(config, architecture))
    if dtype not in (*DTYPES, OWN):
        reasons += (f"it runs in {dtype}; load it with dtype one of {', '.join(DTYPES)}",)
    groups = _groups(layers, heads, dim, dtype)
    return Support(
        architecture=architecture,
        supported=not reasons,
        tested=architecture in TESTED,
        reasons=reasons,
        num_layers=layers,
        num_kv_heads=heads,
        head_dim=dim,
        dtype=dtype,
        groups=groups,
        kv_token_nbytes=token_nbytes(groups) if groups else None,
        max_model_len=num_positions(config),
    )


def require(config: Mapping[str, Any], dtype: str | None = None) -> Support:
    """`examine`, raising `Unsupported` with every reason."""
    found = examine(config, dtype)
    if not found.supported:
        raise Unsupported(
            f"{found.architecture} is not supported: {'; '.join(found.reasons)}. See `thaw doctor --config`."
        )
    return found


def _shape(config: Mapping[str, Any]) -> tuple[int | None, int | None, int | None]:
    layers, heads, hidden, dim = (_first(config, names) for names in (LAYERS, HEADS, HIDDEN, HEAD_DIM))
    if dim is None and hidden and heads:
        dim = hidden // heads
    return layers, _kv_heads(config, heads), dim


def _groups(layers: Any, heads: Any, dim: Any, dtype: str) -> tuple[CacheGroup, ...]:
    if None in (layers, heads, dim) or dtype not in DTYPE_BYTES:
        return ()
    one = FullKV(
        name="full",
        first_layer=0,
        num_layers=int(layers),
        num_kv_heads=int(heads),
        head_dim=int(dim),
        dtype=dtype,  # type: ignore[arg-type]
    )
    return (one,)


def _kv_heads(config: Mapping[str, Any], heads: Any) -> Any:
    """Falcon and GPT-BigCode say by a flag that all query heads share one, Falcon's newer shape how many there are."""
    if config.get("new_decoder_architecture"):
        return config.get("num_kv_heads") or heads
    if config.get("multi_query") is not None:
        return 1 if config["multi_query"] else heads
    return config.get("num_key_value_heads") or heads


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _reasons(config: Mapping[str, Any], architecture: str) -> list[str]:
    out = []
    if config.get("is_encoder_decoder"):
        out.append("it is an encoder-decoder model")
    if not architecture.endswith(("ForCausalLM", "LMHeadModel")) and config.get("architectures"):
        out.append(f"{architecture} is not a causal language model with a language-model head")
    if config.get("kv_lora_rank"):
        out.append("it keeps a latent cache (MLA, kv_lora_rank)")
    kinds = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if kinds:
        out.append(f"some layers are not full attention ({', '.join(map(str, kinds))})")
    if config.get("sliding_window") and config.get("use_sliding_window", True) and not config.get("layer_types"):
        out.append(f"it attends through a sliding window of {config['sliding_window']} tokens")
    kinds = sorted(_rope_types(config) & set(LENGTH_ROPES))
    if kinds:
        out.append(f"its rope ({', '.join(kinds)}) changes with length, so stored keys would change too")
    if config.get("attn_logit_softcapping") or config.get("final_logit_softcapping"):
        out.append("its logits are soft-capped")
    if _alibi(config):
        out.append("it uses ALiBi positions")
    if any(
        config.get(key)
        for key in ("ssm_cfg", "mamba_d_state", "state_size", "time_step_rank", "linear_num_value_heads")
    ):
        out.append("it has recurrent layers")
    if config.get("quantization_config") is not None:
        out.append("its weights are quantised in a way that was not tested")
    scaled = [f"{name}={config[name]}" for name in SCALED if config.get(name) not in (None, 1)]
    if scaled:
        out.append(f"its logits are scaled ({', '.join(scaled)}), and thaw computes the head alone")
    model_type = str(config.get("model_type"))
    if not out and model_type not in RUNS:
        out.append(WHY.get(model_type, f"thaw does not run models of type {model_type} yet"))
    if any(value in (None, 0) for value in _shape(config)):
        out.append("the config does not give layers, heads and head size")
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
