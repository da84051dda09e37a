"""A model's cache groups, read layer by layer from its config as transformers resolves it. No torch here.

`layers` says what each layer keeps, `groups` puts layers that keep the same together. A boot compares the result with
the stock model's own cache (`single.check`), so a config that is read wrongly here ends a boot and corrupts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from thaw.core.cache import DTYPE_BYTES, CacheGroup, FullKV, LatentKV, PointState, SlidingKV, StatePart, layers_of
from thaw.engines.hf import recurrent
from thaw.engines.hf.config import MAX_LAYERS, WINDOWED

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads")
HIDDEN = ("hidden_size", "n_embd", "d_model")
HEAD_DIM = ("head_dim", "attention_head_dim", "kv_channels", "dim_head")
"""What configs call these numbers."""
NOTHING = ("moe", "mlp")
"""Layer types without attention."""


class KV(NamedTuple):
    """Keys and values of each head; of the last `window` tokens where that is given. The stock cache holds each head
    `repeats` times over."""

    heads: int
    dim: int
    value_dim: int | None = None
    window: int | None = None
    repeats: int = 1


class Latent(NamedTuple):
    """One vector a token: the compressed KV (`rank`), then the roped part of the key (`rope`)."""

    rank: int
    rope: int


class States(NamedTuple):
    """A recurrent layer's state after a token."""

    parts: tuple[StatePart, ...]


Spec: TypeAlias = KV | Latent | States
Kept: TypeAlias = tuple[Spec, ...]
"""What a layer keeps: nothing where it has no attention or reads another layer's KV; two for a layer of two kinds."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model: a multimodal class has it one level down."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def layers(config: Mapping[str, Any]) -> list[Kept]:
    """What each layer of a text config keeps; nothing at all where the config does not say."""
    count = num_layers(config)
    if count is None or count > MAX_LAYERS:
        return []
    kinds = config.get("layer_types") or recurrent.layer_types(config, count)
    if not isinstance(kinds, Sequence) or not kinds:
        kinds = [_only_kind(config)] * count
    if len(kinds) < count:
        return []
    kept = [_layer(_of_layer(config, i), str(kind)) for i, kind in enumerate(kinds[:count])]
    return [] if None in kept else _without_shared(config, kept)  # type: ignore[arg-type]


def groups(config: Mapping[str, Any], dtype: str) -> tuple[CacheGroup, ...]:
    """The cache groups of a text config at `dtype`; none where the config does not say."""
    if dtype not in DTYPE_BYTES:
        return ()
    return tuple(_named(layers(config), dtype))


def places(kept: Sequence[Kept]) -> list[list[tuple[int, int, Spec]]]:
    """For each layer (group, row, spec) of what it keeps: the row is its place among the group's layers. Groups with
    tokens are counted first, in their order: a session's pages have those alone."""
    members = list(_members(kept).items())
    return [
        [(g, rows.index(layer), spec) for g, (spec, rows) in enumerate(members) if layer in rows]
        for layer in range(len(kept))
    ]


def first(config: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The first of these fields that the config has."""
    return next((config[name] for name in names if config.get(name) is not None), None)


def num_layers(config: Mapping[str, Any]) -> int | None:
    """How many layers there are; some configs only list them."""
    count = first(config, LAYERS) or len(config.get("layers_block_type") or ())
    return count if isinstance(count, int) and count > 0 else None


def shape(config: Mapping[str, Any]) -> tuple[int | None, int | None, int | None]:
    """(layers, KV heads, head size) of the common shape."""
    heads, hidden, dim = (first(config, names) for names in (HEADS, HIDDEN, HEAD_DIM))
    if dim is None and hidden and heads:
        dim = hidden // heads
    return num_layers(config), _kv_heads(config, heads), dim


def _only_kind(config: Mapping[str, Any]) -> str:
    """The type of every layer where the config lists none."""
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        return "sliding_attention"
    return "full_attention"


def _of_layer(config: Mapping[str, Any], layer: int) -> Mapping[str, Any]:
    """The config of one layer, where layers differ (Gemma 4). They are named by numbers, or by text that may
    have zeros before it ("05" of thirty layers)."""
    own = config.get("per_layer_config")
    if not isinstance(own, Mapping):
        return config
    names = (layer, *(str(layer).zfill(width) for width in range(1, len(str(MAX_LAYERS)) + 1)))
    return {**config, **next((own[name] for name in names if own.get(name)), {})}


def _layer(config: Mapping[str, Any], kind: str) -> Kept | None:
    """None where the type is unknown or the numbers are missing."""
    if kind in NOTHING:
        return ()
    if kind in recurrent.LAYER_TYPES:
        found = recurrent.parts(config)
        attends = _layer(config, "full_attention") if kind == "hybrid" else ()
        return None if attends is None or not found else (*attends, States(found))
    window = config.get(WINDOWED[kind]) if kind in WINDOWED else None
    if kind != "full_attention" and not isinstance(window, int):
        return None
    rank, rope = config.get("kv_lora_rank"), config.get("qk_rope_head_dim")
    if rank:
        return (Latent(rank, rope),) if isinstance(rank, int) and isinstance(rope, int) and window is None else None
    _, heads, dim = shape(config)
    if not all(isinstance(n, int) and n > 0 for n in (heads, dim)):
        return None
    return (_kv(config, heads, dim, window),)  # type: ignore[arg-type]


def _kv(config: Mapping[str, Any], heads: int, dim: int, window: int | None) -> KV:
    if config.get("model_type") == "mimo_v2_flash":  # windowed layers have twice the heads
        return KV(heads * (1 if window is None else 2), dim, config.get("v_head_dim"), window)
    if config.get("new_decoder_architecture"):  # Falcon's
        return KV(heads, dim, None, window, int(first(config, HEADS)) // heads)
    return KV(heads, dim, None, window)


def _without_shared(config: Mapping[str, Any], kept: list[Kept]) -> list[Kept]:
    """The last layers of Gemma 3n and 4 read the KV of earlier ones."""
    shared = config.get("num_kv_shared_layers")
    if not isinstance(shared, int) or not 0 < shared < len(kept):
        return kept
    return [*kept[:-shared], *[()] * shared]


def _kv_heads(config: Mapping[str, Any], heads: Any) -> Any:
    """Falcon and GPT-BigCode say by a flag that all query heads share one, Falcon's newer shape how many there are."""
    if config.get("new_decoder_architecture"):
        return config.get("num_kv_heads") or heads
    if config.get("multi_query") is not None:
        return 1 if config["multi_query"] else heads
    return config.get("num_key_value_heads") or heads


def _members(kept: Sequence[Kept]) -> dict[Spec, list[int]]:
    """The layers that keep each spec, in the order of first layers; those of tokens before states."""
    members: dict[Spec, list[int]] = {}
    for layer, specs in enumerate(kept):
        for spec in specs:
            members.setdefault(spec, []).append(layer)
    return dict(sorted(members.items(), key=lambda one: isinstance(one[0], States)))


def _named(kept: Sequence[Kept], dtype: str) -> Iterator[CacheGroup]:
    """Groups are called after their kind; a second one of a kind gets a number."""
    seen: dict[str, int] = {}
    for spec, members in _members(kept).items():
        base = _name(spec)
        seen[base] = seen.get(base, 0) + 1
        name = base if seen[base] == 1 else f"{base}-{seen[base]}"
        yield _group(spec, {"name": name, **layers_of(members)}, dtype)


def _name(spec: Spec) -> str:
    if isinstance(spec, KV):
        return "full" if spec.window is None else "sliding"
    return "latent" if isinstance(spec, Latent) else "state"


def _group(spec: Spec, fields: dict[str, Any], dtype: Any) -> CacheGroup:
    if isinstance(spec, States):
        return PointState(parts=recurrent.at_dtype(spec.parts, dtype), **fields)
    if isinstance(spec, Latent):
        return LatentKV(width=spec.rank + spec.rope, dtype=dtype, **fields)
    fields |= {"num_kv_heads": spec.heads, "head_dim": spec.dim, "dtype": dtype}
    if spec.value_dim is not None and spec.value_dim != spec.dim:
        fields["value_dim"] = spec.value_dim
    return FullKV(**fields) if spec.window is None else SlidingKV(window=spec.window, **fields)
