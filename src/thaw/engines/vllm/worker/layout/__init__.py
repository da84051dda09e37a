"""KV between vLLM's paged caches and thaw's canonical blobs: which layout the caches of a worker have.

What a layout does is in `base`. Whether one can do it for these caches is asked here; each imports what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from thaw.core.cache import FullKV, LatentKV, SlidingKV, TokenGroup, layers_of
from thaw.core.errors import Unsupported
from thaw.engines.hf.latents import num_halved
from thaw.engines.vllm.worker.layout.base import BITS, KVLayout, layer_order

HEAD_DIMS_OF_ONE_HEAD = frozenset({32, 64, 80, 96, 112, 128, 192, 224, 256, 512})
"""Head sizes believed of a cache with one KV head; others (288 of MLA's 512 + 64) are a latent, not keys and values."""

LATENT = "MLAAttentionSpec"
"""What vLLM calls the spec of latents' caches."""
QUANTISED = "its dtype is {} (a quantized cache); start the engine with kv_cache_dtype='auto'"
DEVICE = "KV caches on device {!r} cannot be snapshotted; thaw reads those of cuda and cpu"


class LayerGroup(NamedTuple):
    """Layers that are one of thaw's cache groups: their names, the place of their block table among those of vLLM's KV
    cache groups, and how many tokens a token attends to (None: all)."""

    names: tuple[str, ...]
    table: int
    window: int | None = None


def layer_groups(groups: Sequence[Sequence[str]], windows: Mapping[str, int]) -> tuple[LayerGroup, ...]:
    """Of vLLM's KV cache groups, which name their layers, and the windows of those that have one: layers of one table
    and window are a group, in the order of their first layers."""
    order = layer_order(dict.fromkeys(name for names in groups for name in names))
    table = {name: at for at, names in enumerate(groups) for name in names}
    members: dict[tuple[int, int | None], list[str]] = {}
    for name in order:
        members.setdefault((table[name], windows.get(name)), []).append(name)
    return tuple(LayerGroup(tuple(names), at, window) for (at, window), names in members.items())


def make_layout(kv_caches: Mapping[str, Any]) -> KVLayout:
    """From what vLLM hands to `register_kv_caches`: {layer name: cache}.

    Raises Unsupported, naming the layer, for what is not [B, H, N, 2D] full attention of one shape: MLA, mamba's lists
    of states, quantized caches, mixed shapes, layers that share one cache. A sliding window does not show in a tensor:
    whoever knows the cache's spec has to refuse it.
    """
    checked = _full_attention(kv_caches)
    device = next(iter(checked.values())).device.type
    if device == "cpu":
        from thaw.engines.vllm.worker.layout.packed import CpuPackedPages

        return CpuPackedPages(checked)
    if device == "cuda":
        from thaw.engines.vllm.worker.layout.strided_triton import TritonPages

        return TritonPages(checked)
    raise Unsupported(DEVICE.format(device))


def make_latent_layout(kv_caches: Mapping[str, Any], num_halved: int = 0) -> KVLayout:
    """Likewise of caches that their spec calls latents (MLA); `num_halved` as `LatentPages` takes it. Raises
    Unsupported, naming the layer, for what is not [B, 1, N, D] of one shape."""
    checked = _alike(kv_caches, _no_latent)
    device = next(iter(checked.values())).device.type
    if device not in ("cpu", "cuda"):
        raise Unsupported(DEVICE.format(device))
    from thaw.engines.vllm.worker.layout.strided import LatentPages

    return LatentPages(checked, num_halved=num_halved)


def make_layouts(
    kv_caches: Mapping[str, Any],
    groups: Sequence[Sequence[str]],
    specs: Sequence[object] = (),
    config: Mapping[str, Any] | None = None,
) -> tuple[KVLayout, ...]:
    """One for each of these groups of layers, by their names. `specs`: vLLM's own of each; of full attention where
    none is given. `config`: the text model's, asked where there are latents. Raises `Unsupported` as
    `make_layout`, and for caches of no group, whose layers use those of others."""
    halved = num_halved(config or {}) if any(map(is_latent, specs)) else 0
    latent = partial(make_latent_layout, num_halved=halved)
    makers = [latent if is_latent(spec) else make_layout for spec in specs or (None,) * len(groups)]
    if len(groups) == 1:
        return (makers[0](kv_caches),)
    strange = sorted(kv_caches.keys() - {name for names in groups for name in names})
    if strange:
        raise Unsupported(
            f"layer {strange[0]!r} is in no KV cache group; thaw snapshots layers with caches of their own"
        )
    return tuple(make({name: kv_caches[name] for name in names}) for make, names in zip(makers, groups, strict=True))


def require_whole_blocks(layouts: Sequence[KVLayout], specs: Sequence[Any]) -> None:
    """Raise `Unsupported` where a block of vLLM's tables is several of its cache: attention kernels that take fewer
    tokens than a block has get it split, and the ids of the tables are not those of the cache then."""
    for layout, spec in zip(layouts, specs, strict=True):
        if layout.block_size != spec.block_size:
            raise Unsupported(
                f"blocks of {spec.block_size} tokens that the attention takes in pieces of {layout.block_size}: they "
                f"were not run; start vLLM with block_size={layout.block_size} (--block-size {layout.block_size})"
            )


def is_latent(spec: object) -> bool:
    """Whether vLLM's spec of a group is that of latents."""
    return type(spec).__name__ == LATENT


def cache_groups(
    layouts: Sequence[KVLayout], num_kv_heads: int, windows: Sequence[int | None] = ()
) -> tuple[TokenGroup, ...]:
    """What the layouts are of a model with so many KV heads in all. `windows`: of each, where some have one."""
    order = layer_order(dict.fromkeys(name for layout in layouts for name in layout.layer_names))
    found: list[TokenGroup] = []
    for layout, window in zip(layouts, windows or (None,) * len(layouts), strict=True):
        kind = "latent" if layout.num_planes == 1 else "full" if window is None else "sliding"
        before = sum(group.name.partition(".")[0] == kind for group in found)
        fields: dict[str, Any] = {
            "name": f"{kind}.{before}" if before else kind,
            "dtype": str(layout.dtype).removeprefix("torch."),
            **layers_of([order.index(name) for name in layout.layer_names]),
        }
        found.append(_group(layout, num_kv_heads, window, fields))
    return tuple(found)


def _group(layout: KVLayout, num_kv_heads: int, window: int | None, fields: dict[str, Any]) -> TokenGroup:
    if layout.num_planes == 1:
        return LatentKV(width=layout.head_dim, **fields)
    fields |= {"num_kv_heads": num_kv_heads, "head_dim": layout.head_dim}
    return FullKV(**fields) if window is None else SlidingKV(window=window, **fields)


def _full_attention(kv_caches: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The caches, each found to be keys and values of full attention, all of one shape, dtype and device."""
    return _alike(kv_caches, _refusal)


def _alike(kv_caches: Mapping[str, Any], refusal: Callable[[object], str | None]) -> dict[str, torch.Tensor]:
    """The caches, each one that `refusal` has nothing against, all of one shape, dtype and device."""
    if not kv_caches:
        raise Unsupported("the engine registered no KV cache; thaw snapshots models with full attention")
    for name, cache in kv_caches.items():
        reason = refusal(cache)
        if reason is not None:
            raise Unsupported(f"the cache of layer {name!r} cannot be snapshotted: {reason}")
    first, *others = kv_caches
    for name in others:
        one, two = (
            f"{list(cache.shape)} {cache.dtype} on {cache.device}" for cache in (kv_caches[first], kv_caches[name])
        )
        if one != two:
            raise Unsupported(f"mixed KV caches cannot be snapshotted: layer {first!r} has {one}, layer {name!r} {two}")
    owners: dict[int, str] = {}
    for name, cache in kv_caches.items():
        other = owners.setdefault(cache.data_ptr(), name)
        if other != name:
            raise Unsupported(f"layers {other!r} and {name!r} share one cache; thaw snapshots layers with their own")
    return dict(kv_caches)


def _refusal(cache: object) -> str | None:
    """Why a layer's cache is not one of full attention in a dtype that is moved; None when it is."""
    if not isinstance(cache, torch.Tensor):
        return "it is a list of states (mamba or linear attention), not keys and values"
    if cache.dtype not in BITS:
        return QUANTISED.format(cache.dtype)
    if cache.dim() != 4 or cache.shape[3] % 2:
        return f"its shape is {list(cache.shape)}, not [blocks, heads, slots, 2 x head_dim] (MLA or another attention)"
    if cache.shape[1] == 1 and cache.shape[3] // 2 not in HEAD_DIMS_OF_ONE_HEAD:
        return f"its shape is {list(cache.shape)}: one head of {cache.shape[3]} numbers is the latent of MLA"
    return None


def _no_latent(cache: object) -> str | None:
    """Why a layer's cache is not one of latents in a dtype that is moved; None when it is."""
    if not isinstance(cache, torch.Tensor) or cache.dim() != 4 or cache.shape[1] != 1:
        shape = list(getattr(cache, "shape", ()))
        return f"its shape is {shape}, not [blocks, 1, slots, width of the latent]; thaw was not run with such caches"
    return None if cache.dtype in BITS else QUANTISED.format(cache.dtype)
