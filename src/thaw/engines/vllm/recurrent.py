"""Models with recurrent layers in vLLM: which are supported, and in what configuration. No torch here.

What was not run is refused by name. A state is captured behind a step, in the order of the runner's own work, and
restored in the background, where a failed load ends its own request: that takes a vLLM that hears of failures by
requests' names, and a scheduler that knows what has been computed when it asks for more.

What was run on a GPU stands in `ON_A_GPU`. Tests that are to run more there (`tests/gpu`) set THAW_UNTRIED_KINDS=1,
which lets them past the refusals of a device, a runner and a mode. It is for no one else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from thaw.core.errors import Unsupported
from thaw.engines.vllm import versions
from thaw.engines.vllm.block_tables import of_groups

MODES = {
    "qwen3_next": ("align", "none"),
    "qwen3_5_text": ("align", "none"),
    "qwen3_5_moe_text": ("align", "none"),
    "lfm2": ("align", "none"),
    "lfm2_moe": ("align", "none"),
    "granitemoehybrid": ("none",),
    "falcon_h1": ("none",),
    "nemotron_h": ("none",),
    "zamba2": ("none",),
}
"""By model type, the values of `mamba_cache_mode` that were run: "align" with vLLM's prefix cache, "none" without."""
FULL = "FullAttentionSpec"
ON_A_GPU = {
    "qwen3_next": (("align",), ("V1", "V2")),
    "qwen3_5_text": (("align",), ("V1", "V2")),
    "lfm2": (("align",), ("V1", "V2")),
    "lfm2_moe": (("align",), ("V1",)),
    "granitemoehybrid": (("none",), ("V1", "V2")),
    "falcon_h1": (("none",), ("V1", "V2")),
    "nemotron_h": (("none",), ("V1", "V2")),
    "zamba2": (("none",), ("V1",)),
}
"""By model type, the modes and the runners of vLLM that were run on an NVIDIA GPU."""
UNTRIED = "THAW_UNTRIED_KINDS"
"""Set to 1 by tests on a GPU alone: see the module's text."""
CONV_LAYOUT = "VLLM_SSM_CONV_STATE_LAYOUT"
COLUMNS_FIRST = "SD"
"""How vLLM orders a convolution's state unless CONV_LAYOUT says otherwise."""
NO_MATRICES = ("lfm2", "lfm2_moe")
"""Types of which a state is convolutions alone."""


def is_hybrid(config: Any) -> bool:
    """Whether layers of the model keep a state, and thaw knows its type."""
    return bool(config.model_config.is_hybrid) and _type(config) in MODES


def require(config: Any) -> None:
    """Raise `Unsupported` for the first thing about a model with recurrent layers that was not run."""
    kind, cache = _type(config), config.cache_config
    what = f"{kind}: a model with recurrent layers"
    if not versions.names_failed_loads():
        raise Unsupported(f"{what} needs vLLM 0.32, which hears of a failed load by its request; older ones end")
    blocks = getattr(config.model_config.hf_text_config, "num_mem_blocks", 1)
    if blocks != 1:
        raise Unsupported(f"{what} with {blocks} blocks of shared attention (num_mem_blocks): one alone was run")
    on_cpu = config.device_config.device_type == "cpu"
    if on_cpu or os.environ.get(UNTRIED) != "1":
        _require_tried(kind, what, config)
    if getattr(config.scheduler_config, "async_scheduling", False):
        raise Unsupported(f"{what} needs steps that are put together one by one: start vLLM with --no-async-scheduling")
    if config.parallel_config.tensor_parallel_size > 1:
        raise Unsupported(f"{what} was run on one rank alone; start vLLM with tensor_parallel_size=1")
    if versions.whole(config).kv_transfer_config is not None and _is_beside_others(versions.whole(config)):
        raise Unsupported(f"{what}: no other connector may stand beside thaw's")
    if os.environ.get(CONV_LAYOUT, COLUMNS_FIRST) != COLUMNS_FIRST:
        order = os.environ[CONV_LAYOUT]
        raise Unsupported(f"{CONV_LAYOUT}={order}: {what} was run with {COLUMNS_FIRST} alone; unset it")
    _require_float32(kind, str(getattr(cache, "mamba_ssm_cache_dtype", "auto")), on_cpu=on_cpu)
    if str(getattr(cache, "mamba_cache_dtype", "auto")) != "auto":
        raise Unsupported(f"mamba_cache_dtype={cache.mamba_cache_dtype}: convolutions keep the model's; use auto")


def _require_tried(kind: str, what: str, config: Any) -> None:
    """The device, vLLM's runner and the mode of its cache of states."""
    device = str(config.device_config.device_type)
    if device not in ("cpu", "cuda"):
        raise Unsupported(f"{what} was run on a CPU and on NVIDIA's GPUs alone, not on {device}")
    if device == "cuda" and kind not in ON_A_GPU:
        raise Unsupported(f"{what} was run on a CPU alone; on a GPU these were: {', '.join(sorted(ON_A_GPU))}")
    modes, runners = (MODES[kind], ("V1",)) if device == "cpu" else ON_A_GPU[kind]
    if (runner := versions.runner(config)) not in runners:
        raise Unsupported(f"{what} was run on vLLM's V1 runner alone, not on {runner}; set VLLM_USE_V2_MODEL_RUNNER=0")
    mode = str(getattr(config.cache_config, "mamba_cache_mode", ""))
    if mode not in modes:
        how = {"none": "without its prefix cache (enable_prefix_caching=False)", "align": "with its prefix cache"}
        raise Unsupported(
            f"{what} was run on {device} with mamba_cache_mode {' and '.join(modes)}, not {mode}; "
            f"start vLLM {how[modes[-1]]}"
        )


def _require_float32(kind: str, dtype: str, *, on_cpu: bool) -> None:
    """Of the state matrices. By "auto" vLLM means float32 on a CPU, and the convolutions' dtype on a GPU."""
    if dtype not in ("auto", "float32"):
        raise Unsupported(f"mamba_ssm_cache_dtype={dtype}: state matrices are float32; use auto")
    if dtype == "auto" and not on_cpu and kind not in NO_MATRICES:
        raise Unsupported(
            "mamba_ssm_cache_dtype=auto is the model's dtype on a GPU; state matrices are float32: set it"
        )


def require_groups(groups: Sequence[Any]) -> None:
    """Raise `Unsupported` unless the groups of vLLM's caches are full attention in one and states in the others."""
    tables = of_groups(groups)
    kinds = [type(groups[number].kv_cache_spec).__name__ for number in tables.tokens]
    if kinds != [FULL] or not tables.states:
        raise Unsupported(
            f"a model with recurrent layers whose other caches are {kinds}: one group of full attention is supported"
        )
    spec = groups[tables.tokens[0]].kv_cache_spec
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(spec, name, None) is not None:
            raise Unsupported(f"{name}={getattr(spec, name)}: beside recurrent layers only full attention is supported")
    for table in tables.states:
        state = groups[table.group].kv_cache_spec
        checkpoints = getattr(state, "num_prefill_checkpoint_blocks", 0) and state.mamba_cache_mode == "align"
        if getattr(state, "num_speculative_blocks", 0) or checkpoints:
            raise Unsupported("speculative or checkpoint blocks of recurrent states: they were not run")


def _type(config: Any) -> str:
    return str(getattr(config.model_config.hf_text_config, "model_type", ""))


def _is_beside_others(config: Any) -> bool:
    return str(config.kv_transfer_config.kv_connector) == "MultiConnector"
