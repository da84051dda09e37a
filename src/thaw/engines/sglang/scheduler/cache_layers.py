"""What each layer of the model that SGLang runs keeps, and the cache groups that follow.

It is read from the attention modules that run, not from the config: a class that ignores its config's window has none.
Groups are named and ordered as the transformers engine has them for the same layers, so that the identities agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from thaw.core.cache import CacheGroup, FullKV, LatentKV, SlidingKV, TokenGroup, layers_of
from thaw.core.errors import Unsupported
from thaw.engines.sglang.scheduler.kv_pool import StripPool, is_latent, strip_pool

WINDOWS = ("torch_native", "triton", "fa3", "flashinfer")
"""Attention backends that keep to each layer's own window in a pool that has all tokens."""


def cache_layers(
    pool: Any, modules: Sequence[Any], config: Mapping[str, Any], num_kv_heads: int
) -> tuple[tuple[TokenGroup, ...], tuple[StripPool, ...]]:
    """The cache groups of a model with so many KV heads in all, and the part of the pool that is each group's.
    `modules` are those of the model that runs, `config` is the text model's. Raises `Unsupported`."""
    windows = {} if is_latent(pool) else _windows(modules)
    members: dict[int | None, list[int]] = {}
    for layer in range(pool.layer_num):
        members.setdefault(windows.get(layer), []).append(layer)
    pools = tuple(strip_pool(pool, layers, config) for layers in members.values())
    groups = zip(_names(members), members.items(), pools, strict=True)
    return tuple(_group(pool, name, w, layers, own, num_kv_heads) for name, (w, layers), own in groups), pools


def require_windows(groups: Sequence[CacheGroup], backends: Sequence[str | None]) -> None:
    """Raise `Unsupported` where a layer has a window and an attention backend may read beyond it."""
    strange = sorted({str(backend) for backend in backends} - set(WINDOWS))
    if strange and any(isinstance(group, SlidingKV) for group in groups):
        raise Unsupported(
            f"attention_backend={', '.join(strange)} on a model with sliding windows: thaw does not load what lies "
            f"before a window, and knows of {', '.join(WINDOWS)} that they never use it; choose one of them"
        )


def _windows(modules: Sequence[Any]) -> dict[int, int]:
    """By its number, how many tokens a token of a windowed layer attends to, itself among them."""
    found: dict[int, set[int]] = {}
    for module in modules:
        if type(module).__name__ != "RadixAttention":
            continue
        if module.is_cross_attention:
            raise Unsupported(f"layer {module.layer_id} attends to an encoder; only decoder-only models are supported")
        size = module.sliding_window_size
        found.setdefault(module.layer_id, set()).add(size + 1 if size is not None and size > -1 else 0)
    mixed = sorted(layer for layer, sizes in found.items() if len(sizes) > 1)
    if mixed:
        raise Unsupported(f"layer {mixed[0]} has attention of two kinds, with windows of {sorted(found[mixed[0]])}")
    return {layer: size for layer, sizes in found.items() for size in sizes if size}


def _names(windows: Mapping[int | None, Any]) -> Iterator[str]:
    """A group is called after its kind; a second one of a kind gets a number."""
    seen: dict[str, int] = {}
    for window in windows:
        base = "full" if window is None else "sliding"
        seen[base] = seen.get(base, 0) + 1
        yield base if seen[base] == 1 else f"{base}-{seen[base]}"


def _group(
    pool: Any, name: str, window: int | None, layers: Sequence[int], own: StripPool, num_kv_heads: int
) -> TokenGroup:
    fields: dict[str, Any] = {**layers_of(layers), "dtype": str(own.dtype).removeprefix("torch.")}
    if is_latent(pool):
        return LatentKV(name="latent", width=own.width, **fields)
    fields |= {"name": name, "num_kv_heads": num_kv_heads, "head_dim": own.width}
    return FullKV(**fields) if window is None else SlidingKV(window=window, **fields)
