"""What thaw supports of SGLang, by name: of an engine's configuration once at boot, of one request when it comes."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Iterable
from typing import Any

from thaw.core.errors import ThawError, Unsupported
from thaw.engines.hf.config import load_config, overridden, ropes

NO_ADAPTERS = "adapters are part of a session's identity on vLLM alone: merge it into the model, or use vLLM"
REFUSED = (
    ("speculative_algorithm", "a draft's state is not captured"),
    ("enable_hierarchical_cache", "two tiers below one tree; thaw's arena is the one"),
    ("enable_lora", NO_ADAPTERS),
    ("enable_dp_attention", "ranks own requests there, not heads"),
    ("disable_radix_cache", "a session's KV is found in the tree"),
    ("enable_mixed_chunk", "a decode step inside a prefill batch has other bits"),
    ("enable_beam_search", "a session is one sequence"),
    ("enable_streaming_session", "SGLang's own sessions keep KV beside the tree"),
)
"""Arguments of SGLang's that are refused when they are set, and why."""
ONE = (
    ("pp_size", "ranks own layers there, and thaw counts on each rank having all of them"),
    ("dp_size", "each replica has a scheduler of its own; start one server each"),
    ("attn_dp_size", "ranks own requests there, not heads"),
    ("attn_cp_size", "ranks own tokens there, not heads"),
    ("dcp_size", "ranks own tokens there, not heads"),
    ("nnodes", "all ranks and their clients share folders of one host"),
)
"""Sizes that are refused beyond one, and why."""
ALONE = (
    ("session_params", "SGLang's own session and thaw's are two; leave one of the two out"),
    ("input_embeds", "a session is made of tokens"),
    ("mm_inputs", "media features are not part of a session yet"),
    ("lora_id", NO_ADAPTERS),
    ("custom_logit_processor", "thaw chooses the tokens of its requests itself"),
)
GRAMMAR = ("json_schema", "regex", "ebnf", "structural_tag")


def require(context: Any) -> None:
    """Raise `Unsupported` for the first thing that thaw cannot capture exactly."""
    args = context.server_args
    for name, why in REFUSED:
        if getattr(args, name, None):
            raise Unsupported(f"{name}={getattr(args, name)}: {why}; start SGLang without it")
    if context.is_hybrid_ssm:
        raise Unsupported("hybrid and recurrent models: layers that keep a state are not supported")
    if context.is_hybrid_swa:
        raise Unsupported(
            "sliding windows in a pool of their own: SGLang lets go there of what left the window, so no session could "
            "go on where it was; start SGLang with --disable-hybrid-swa-memory, as thaw's own boots do"
        )
    for name, why in ONE:
        if (getattr(args, name, 1) or 1) > 1:
            raise Unsupported(f"{name}={getattr(args, name)}: {why} (several ranks by tp_size alone are supported)")
    if getattr(args, "disaggregation_mode", "null") != "null":
        raise Unsupported(f"disaggregation_mode={args.disaggregation_mode}: prefill and decode in one engine only")
    _require_files(args, context.model_config)
    _require_rope(context.model_config)
    if getattr(context.model_config, "is_multimodal", False):
        raise Unsupported("multimodal models: media features are not part of a session yet")


def _require_rope(model: Any) -> None:
    """What runs must be the function that the identity names. SGLang has config classes of its own for some models, and
    they look for one rope where transformers' newer files have one for each type of layer (OLMo 3)."""
    config = model.hf_text_config
    base = getattr(config, "rope_theta", None)
    if base is None or not type(config).__module__.startswith("sglang."):
        return
    try:
        said = load_config(model.model_path).get_text_config().to_dict()
    except (OSError, ValueError, ThawError):  # then it has no identity either
        return
    others = sorted({rope["rope_theta"] for rope in ropes(said) if rope.get("rope_theta", base) != base})
    if others:
        raise Unsupported(
            f"{config.model_type} with ropes of base {', '.join(map(str, others))}: this SGLang does not read them and "
            f"takes {base}, so it computes another function than the model's"
        )


def attention_backends(args: Any) -> list[str | None]:
    """Those that prefill and decode, as SGLang resolved them."""
    usual = getattr(args, "attention_backend", None)
    return [getattr(args, name, None) or usual for name in ("prefill_attention_backend", "decode_attention_backend")]


LOADED_FROM_FILES = ("auto", "safetensors", "fastsafetensors", "runai_streamer", "layered")
"""Values of `load_format` that read the files which the identity is made of."""


def _require_files(args: Any, model: Any) -> None:
    """What runs must be what the folder says, for that is the model's identity; overridden fields are part of it."""
    load_format = getattr(args, "load_format", "auto")
    load_format = str(getattr(load_format, "value", load_format))
    if load_format not in LOADED_FROM_FILES:
        raise Unsupported(
            f"load_format={load_format}: the weights that run must be those of the folder's files; use auto"
        )
    for name in ("quantization", "torchao_config"):
        if getattr(args, name, None) and getattr(model.hf_config, "quantization_config", None) is None:
            raise Unsupported(
                f"{name}={getattr(args, name)} of a checkpoint that is not quantised: other weights run than its files "
                "hold; start SGLang without it"
            )


def overrides(args: Any, model: Any) -> dict[str, Any]:
    """The config's fields that SGLang was told to run in place of the folder's, as it resolved them."""
    return overridden(model.hf_config, json.loads(args.json_model_override_args))


def require_functions(targets: Iterable[str]) -> None:
    """Raise `Unsupported` where SGLang has not what thaw wraps: its registry of hooks only logs that."""
    for target in targets:
        try:
            pkgutil.resolve_name(target)
        except (ImportError, AttributeError):
            raise Unsupported(f"this SGLang has no {target}; thaw was tested with 0.5.22 and 0.5.23") from None


def require_request(request: Any) -> None:
    """Raise `Unsupported` where a request that carries thaw's message asks for what a session cannot continue with."""
    for name, why in ALONE:
        if getattr(request, name, None) is not None:
            raise Unsupported(f"{name} in a request that carries kv_hints of thaw's: {why}")
    params = request.sampling_params
    for name in GRAMMAR:
        if getattr(params, name, None):
            raise Unsupported(
                f"{name} in a request that carries kv_hints of thaw's: a grammar's position is no part of a session "
                "yet; leave one of the two out"
            )
    if getattr(params, "n", 1) != 1:
        raise Unsupported("n in a request that carries kv_hints of thaw's: a session is one sequence; fork it")
    if request.return_logprob and request.logprob_start_len >= 0:
        raise Unsupported("logprob_start_len: a prompt whose KV is there is not read, so it has no log probabilities")
