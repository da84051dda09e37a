"""What a recurrent layer keeps after a token, read from a config: its state's parts, in the format's order of axes.

    conv…       the last kernel - 1 inputs of the causal convolution, [channel][column], the oldest column first; a part
                for each stretch of channels that is split over heads in its own way
    recurrent   the state matrix of each head: [key][value] of a delta rule (GDN), [channel][state] of Mamba2

transformers keeps `kernel` columns, the oldest of which no later token reads: it is left out here. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from thaw.core.cache import StatePart

Config: TypeAlias = Mapping[str, Any]
Parts: TypeAlias = tuple[StatePart, ...]
DTYPE: Any = "float32"
"""Of the state matrices, whatever the model runs in; a boot compares it with what the stock model keeps."""
RECURRENT = "recurrent"
"""The part that is no convolution's."""
LAYER_TYPES = ("linear_attention", "mamba", "conv", "hybrid")
"""Layer types that keep a state; of "hybrid" layers, keys and values too."""
GDN_CHUNK = 64
"""Tokens that the delta rule's kernels read at a time."""
FORGETFUL = ("jamba", "mamba", "falcon_mamba")
"""Model types whose own class begins from an empty state matrix where several tokens follow a state."""


def parts(config: Config) -> Parts:
    """The parts of a recurrent layer, of a model that runs in float32; none where thaw does not know the layers of its
    type, or the config lacks a number."""
    read = _READ.get(str(config.get("model_type")))
    try:
        return read(config) if read is not None else ()
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return ()


def at_dtype(found: Parts, dtype: Any) -> Parts:
    """The same of a model that runs in `dtype`: its convolutions keep that, its state matrices do not."""
    return tuple(msgspec.structs.replace(p, dtype=p.dtype if p.name == RECURRENT else dtype) for p in found)


def layer_types(config: Config, num_layers: int) -> list[str] | None:
    """What a config of recurrent layers says of each layer, where it does not say it in `layer_types`."""
    listed = config.get("layers_block_type")
    if isinstance(listed, Sequence):
        return list(map(str, listed))
    if config.get("model_type") == "bamba":
        attends = config.get("attn_layer_indices") or ()
        return ["full_attention" if layer in attends else "linear_attention" for layer in range(num_layers)]
    return ["hybrid"] * num_layers if config.get("model_type") == "falcon_h1" else None


def chunk(config: Config) -> int:
    """How many tokens the recurrent kernel reads at a time, counted from where a prefill begins; 1: one by one."""
    read = _READ.get(str(config.get("model_type")))
    if read is _gdn:
        return GDN_CHUNK
    if read is _short_conv or read is None:
        return 1
    return int(config.get("mamba_chunk_size") or config.get("chunk_size") or 1)


def has_delta_rule(config: Config) -> bool:
    """Whether its state matrices are those of a delta rule."""
    return _READ.get(str(config.get("model_type"))) is _gdn


def _gdn(config: Config) -> Parts:
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key_dim, value_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
    columns = config["linear_conv_kernel_dim"] - 1
    return (
        _part("conv.q", keys, key_dim, columns),
        _part("conv.k", keys, key_dim, columns),
        _part("conv.v", values, value_dim, columns),
        _part(RECURRENT, values, key_dim, value_dim),
    )


def _mamba2(heads: str, head_dim: str, groups: str, state: str, kernel: str) -> Callable[[Config], Parts]:
    """A reader of configs that call the numbers so."""

    def read(config: Config) -> Parts:
        columns = config[kernel] - 1
        return (
            _part("conv.x", config[heads], config[head_dim], columns),
            _part("conv.b", config[groups], config[state], columns),
            _part("conv.c", config[groups], config[state], columns),
            _part(RECURRENT, config[heads], config[head_dim], config[state]),
        )

    return read


def _short_conv(config: Config) -> Parts:
    """No heads: the channels are dealt out as the attention layers' heads are."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return (_part("conv", heads, hidden // heads, config["conv_L_cache"] - 1),)


def _part(name: str, heads: int, *shape: int) -> StatePart:
    return StatePart(name=name, num_heads=heads, shape=shape, dtype=DTYPE)


_MAMBA_N = _mamba2("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv")
_READ: dict[str, Callable[[Config], Parts]] = {
    "qwen3_next": _gdn,
    "qwen3_5_text": _gdn,
    "qwen3_5_moe_text": _gdn,
    "bamba": _MAMBA_N,
    "granitemoehybrid": _MAMBA_N,
    "falcon_h1": _MAMBA_N,
    "nemotron_h": _mamba2("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"),
    "zamba2": _mamba2("n_mamba_heads", "mamba_headdim", "mamba_ngroups", "mamba_d_state", "mamba_d_conv"),
    "lfm2": _short_conv,
    "lfm2_moe": _short_conv,
    "lfm3": _short_conv,
}
RUNS = frozenset(_READ)
"""Model types whose recurrent layers thaw knows."""
