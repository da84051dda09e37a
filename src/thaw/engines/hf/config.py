"""A model's config: what of it counts as the model's function, and the tokens that end its texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_NOT_FUNCTION = frozenset(
    (
        "_attn_implementation",
        "_name_or_path",
        "add_cross_attention",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "cross_attention_hidden_size",
        "dtype",
        "eos_token_id",
        "experts_implementation",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_llama_config",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "use_cache",
    )
)
"""Config fields that do not change what the model computes for given tokens."""
_IN_ROPE = ("partial_rotary_factor",)
"""Read from `rope_parameters` by every model of transformers 5; see docs/design/0003-identity-across-versions.md."""


def function_config(config: Mapping[str, Any]) -> dict[str, str]:
    """Of a config (as `to_dict()` gives it) the fields that change the function, each with its value as JSON text."""
    dropped = _NOT_FUNCTION | _said_twice(config)
    kept = {name: value for name, value in config.items() if name not in dropped}
    return {name: json.dumps(value, sort_keys=True, default=str) for name, value in sorted(kept.items())}


def _said_twice(config: Mapping[str, Any]) -> set[str]:
    """Fields that some versions of transformers repeat beside `rope_parameters`, and others say only there.

    Dropped where both say the same; where they differ the field stays, and so does the refusal.
    """
    rope = config.get("rope_parameters")
    inner = rope if isinstance(rope, Mapping) else {}
    return {name for name in _IN_ROPE if name in config and name in inner and config[name] == inner[name]}


def eos_token_ids(folder: Path, config: Any = None) -> tuple[int, ...]:
    """The tokens that end a text of the model in `folder` (or of that hub id): those that the loaded model would name.
    `config` is its config where that is loaded already.

    Raises OSError or ValueError when the folder has no config that can be read.
    """
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(folder) if config is None else config
    try:
        generation = GenerationConfig.from_pretrained(folder)
    except OSError:  # it has no generation_config.json
        generation = GenerationConfig.from_model_config(config)
    return eos_of(generation, config)


def eos_of(generation_config: Any, config: Any) -> tuple[int, ...]:
    """`generation_config` goes before `config`; none at all where neither names one."""
    found = getattr(generation_config, "eos_token_id", None)
    if found is None:
        found = getattr(config, "eos_token_id", None)
    return () if found is None else tuple(found) if isinstance(found, (list, tuple)) else (int(found),)


def stop_set(named: Iterable[int], tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end a turn, in every engine: those that the model's files name, and the tokenizer's end token.

    Of many fine-tunes only the tokenizer knows the token that ends a turn."""
    own = getattr(tokenizer, "eos_token_id", None)
    found = dict.fromkeys((*named, *(() if own is None else (own,))))
    return tuple(token for token in found if 0 <= token < vocab_size)
