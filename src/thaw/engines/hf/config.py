"""A model's config: what of it counts as the model's function, and the tokens that end its texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from thaw.core.errors import InvalidRequest, ThawError, Unsupported
from thaw.engines.hf.beside import is_there, read_object

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
ROPE, OLD_ROPE = "rope_parameters", "rope_scaling"
"""transformers 5's name for the rope's fields, and the name that transformers 4 and model cards have for it."""
MAX_LAYERS = 100_000
"""Classes write down each layer's kind, so a config that says more is not asked."""
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length")
"""What configs call the number of their positions; the first one there counts."""
STRETCHED = ("yarn", "linear")
"""Ropes whose `factor` says by how much positions are stretched, beyond what the model was trained with."""
WINDOWED = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""Layer types that keep their last tokens alone, and the field that says how many a token attends to."""
GENERATION = "generation_config.json"
ATTENTION = "eager"
"""Where a model is only looked at: every class has it, and a config may ask for one that is not installed."""
SEVERAL = "ForConditionalGeneration"
"""How the names of classes of several parts end."""
NONSENSE = (TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)
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
    rope = config.get(ROPE)
    inner = rope if isinstance(rope, Mapping) else {}
    return {name for name in _IN_ROPE if name in config and name in inner and config[name] == inner[name]}


def load_config(folder: str | Path, overrides: Mapping[str, Any] | None = None) -> Any:
    """The resolved config of the model in `folder` (or of that hub id), with `overrides` in place of its own fields.

    Raises OSError or ValueError when there is no config that can be read, `InvalidRequest` for one whose values make no
    sense, `Unsupported` for one that only code beside it reads.
    """
    config = _own_config(folder)
    for name, value in (overrides or {}).items():
        setattr(config, ROPE if name == OLD_ROPE else name, value)
    if overrides and getattr(config, ROPE, None):
        config.standardize_rope_params()
    return config


def _own_config(folder: str | Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        refuse_foreign_code(folder, error)
        raise
    except nonsense() as error:
        raise _senseless(folder, error) from None


def auto_class(config: Any) -> Any:
    """transformers' class for the files of this config: a causal language model, or, where the config says so, a class
    of several parts whose text part is one."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    several = str((config.architectures or [""])[0]).endswith(SEVERAL) and config is not config.get_text_config()
    return AutoModelForImageTextToText if several else AutoModelForCausalLM


def refuse_foreign_code(model: str | Path, error: Exception) -> None:
    """Raise `Unsupported` where `error` is what transformers says of a model that comes with code of its own."""
    if "trust_remote_code" in str(error):
        raise Unsupported(f"{model} comes with code of its own, and thaw runs none of it") from None


@contextmanager
def sensible(name: object) -> Iterator[None]:
    """Turns what transformers raises of a config whose values make no sense into `InvalidRequest`."""
    try:
        yield
    except nonsense(ValueError, RuntimeError) as error:
        raise _senseless(name, error) from None


def nonsense(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What transformers raises, beside OSError and ValueError, of files that it did not expect; and `more`."""
    try:
        from huggingface_hub.errors import StrictDataclassError
    except ImportError:
        return (*NONSENSE, *more)
    return (*NONSENSE, StrictDataclassError, *more)


def _senseless(name: object, error: Exception) -> InvalidRequest:
    return InvalidRequest(f"the config of {name} makes no sense: {type(error).__name__}: {error}")


def resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json's fields as transformers completes them: with its class's own values, and a rope in one place.

    As it is where transformers is not here or does not know its type. Raises what `sensible` takes where its values
    make no sense.
    """
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        return dict(config)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return dict(config)
    long = [name for name, value in config.items() if "layer" in name and isinstance(value, int) and value > MAX_LAYERS]
    if long:
        raise ValueError(f"{long[0]}={config[long[0]]}")
    fields: dict[str, Any] = CONFIG_MAPPING[kind].from_dict(_with_floats(config)).to_dict()
    return fields


def _with_floats(value: Any) -> Any:
    """The numbers that JSON has not, which transformers writes as {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {name: _with_floats(one) for name, one in value.items()}
    return [_with_floats(one) for one in value] if isinstance(value, list) else value


def windows(config: Mapping[str, Any]) -> dict[str, int]:
    """Of a text config as transformers completes it, the fields by which some of its layers have a window, and how many
    tokens a token attends to there."""
    kinds = config.get("layer_types") or ()
    return {field: config[field] for kind, field in WINDOWED.items() if kind in kinds and config.get(field)}


def may_have_windows(model: str) -> bool:
    """Whether the config.json of a folder, or of a hub id that was fetched before, says that layers have windows. False
    where there is none that can be read."""
    path = _config_file(model)
    try:
        config = read_object(path) if path is not None else {}
        inner = config.get("text_config")
        if not any(isinstance(part, Mapping) and set(WINDOWED.values()) & part.keys() for part in (config, inner)):
            return False
        whole = resolved(config)
    except nonsense(OSError, ValueError, ThawError):  # the engine says what is wrong with it
        return False
    text = whole.get("text_config")
    return bool(windows(text if isinstance(text, Mapping) else whole))


def model_type(model: str) -> str:
    """What the config.json says that `may_have_windows` reads; "" where there is none that can be read."""
    path = _config_file(model)
    try:
        return str(read_object(path).get("model_type", "")) if path is not None else ""
    except nonsense(OSError, ValueError, ThawError):  # the engine says what is wrong with it
        return ""


def _config_file(model: str) -> Path | None:
    if Path(model).is_dir():
        return Path(model, "config.json")
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def overridden(config: Any, names: Iterable[str]) -> dict[str, Any]:
    """What an engine's resolved `config` has in the fields `names`, for `load_config`."""
    resolved = config.to_dict()
    return {name: resolved[name] for name in (ROPE if n == OLD_ROPE else n for n in names) if name in resolved}


def num_positions(config: Mapping[str, Any]) -> int | None:
    """How many positions a model of this config (as `to_dict()` gives it) has; None where nothing says it.

    A rope that is stretched by `factor` has more than `max_position_embeddings` says where that is still the number
    before: model cards add yarn to a config and leave the number alone. With several ropes, the least stretched counts.
    """
    own = next((config[name] for name in POSITIONS if config.get(name) is not None), None)
    if not isinstance(own, int) or own <= 0:
        return None
    return min((_stretched(own, rope) for rope in ropes(config)), default=own)


def _stretched(own: int, rope: Mapping[str, Any]) -> int:
    kind, factor = rope.get("rope_type") or rope.get("type"), rope.get("factor")
    if kind not in STRETCHED or not isinstance(factor, (int, float)) or isinstance(factor, bool):
        return own
    before = rope.get("original_max_position_embeddings") or own
    return max(own, int(before * factor)) if isinstance(before, int) else own


def ropes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The fields of its rope; of several where each kind of layer has its own."""
    rope = config.get(ROPE) or config.get(OLD_ROPE)
    if not isinstance(rope, Mapping):
        return []
    return [one for one in rope.values() if isinstance(one, Mapping)] or [rope]


def check_length(config: Mapping[str, Any], wanted: object) -> None:
    """Raise `InvalidRequest` where a `max_model_len` of `wanted` is no number of tokens that the model has positions
    for; None is left to the engine."""
    if wanted is None:
        return
    limit = num_positions(config)
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        raise InvalidRequest(f"max_model_len={wanted!r}: must be a number of tokens, 1 or more")
    if limit is not None and wanted > limit:
        raise InvalidRequest(
            f"max_model_len={wanted}: this model has {limit} positions; a longer rope (yarn) is said in its config.json"
        )


def eos_token_ids(folder: Path, config: Any = None) -> tuple[int, ...]:
    """The tokens that end a text of the model in `folder` (or of that hub id): those that the loaded model would name.
    `config` is its config where that is loaded already.

    Raises OSError or ValueError when the folder has no config that can be read, `IncompleteModel` for a
    generation_config.json that cannot.
    """
    from transformers import GenerationConfig

    config = _own_config(folder) if config is None else config
    if is_there(Path(folder, GENERATION)):
        read_object(Path(folder, GENERATION))
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
