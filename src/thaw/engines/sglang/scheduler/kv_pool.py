"""SGLang's KV pool, a rank's own part, to and from thaw's canonical order.

A pool keeps a layer's keys, and its values, as [slots, heads, head_dim] (`MHATokenToKVPool`), or its latents as
[slots, 1, width] (`MLATokenToKVPool`). Slot 0 (with pages: page 0) is padding. A token of a request lies in any slot,
the same in every layer. Only these plain layouts are read; every other is refused by name at boot.

Layers with a window lie in the same pool as the others, so the KV of all tokens is there. What of them a snapshot has
is the groups' business (`cache_layers`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from thaw.core.errors import Unsupported
from thaw.engines.hf.latents import num_halved

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class StripPool(ABC):
    """Some layers of a pool, which are one strip of thaw's. `piece` tensors are [head][layer][plane][token][width] in
    host memory."""

    def __init__(self, buffers: Sequence[torch.Tensor]) -> None:
        self._buffers = tuple(buffers)
        self.num_slots, self.num_heads, self.width = buffers[0].shape
        self.dtype, self.device = buffers[0].dtype, buffers[0].device
        self._on_host = buffers[0].device.type == "cpu"

    def read(self, slots: torch.Tensor, out: torch.Tensor) -> None:
        """The KV of `slots` (int64, in the tokens' order) into the piece `out`, when what was launched is done."""
        with torch.no_grad():
            if self._on_host:
                self._gather(slots, out)
            else:
                torch.cuda.synchronize(self.device)
                staged = torch.empty(out.shape, dtype=out.dtype, device=self.device)
                self._gather(slots, staged)
                out.copy_(staged)

    def write(self, slots: torch.Tensor, piece: torch.Tensor) -> None:
        """`piece` into `slots`, for the steps that are launched from now on."""
        with torch.no_grad():
            source = piece if self._on_host else self._sent(piece)
            self._scatter(slots, source)
            if not self._on_host:
                torch.cuda.synchronize(self.device)

    def clear(self, slots: torch.Tensor) -> None:
        """Zeros into `slots`: attention gives them no weight, and what weighs nothing must still be a number."""
        with torch.no_grad():
            for buffer in self._buffers:
                buffer[slots] = 0

    def _sent(self, piece: torch.Tensor) -> torch.Tensor:
        """On the accelerator. Of a longer piece each run of tokens goes over by itself: at once they would be put
        together in new host memory first."""
        if piece.is_contiguous():
            return piece.to(self.device, non_blocking=True)
        out = torch.empty(piece.shape, dtype=piece.dtype, device=self.device)
        for to, run in zip(out.flatten(0, 2), (r for h in piece for layer in h for r in layer), strict=True):
            to.copy_(run, non_blocking=True)
        return out

    def describe(self) -> dict[str, str]:
        return {"device": str(self.device.type), "kind": "sglang-slots"}

    @abstractmethod
    def _gather(self, slots: torch.Tensor, out: torch.Tensor) -> None: ...

    @abstractmethod
    def _scatter(self, slots: torch.Tensor, source: torch.Tensor) -> None: ...


class KVPool(StripPool):
    """Keys and values: two planes a layer."""

    def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        super().__init__((*keys, *values))
        self._keys, self._values = keys, values

    def _gather(self, slots: torch.Tensor, out: torch.Tensor) -> None:
        for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            out[:, layer, 0] = keys[slots].transpose(0, 1)
            out[:, layer, 1] = values[slots].transpose(0, 1)

    def _scatter(self, slots: torch.Tensor, source: torch.Tensor) -> None:
        for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            keys[slots] = source[:, layer, 0].transpose(0, 1)
            values[slots] = source[:, layer, 1].transpose(0, 1)


class LatentPool(StripPool):
    """One plane a layer; every rank has all of it. The order of a latent's numbers, and `num_halved`: `hf.latents`;
    SGLang has pairs."""

    def __init__(self, latents: Sequence[torch.Tensor], num_halved: int) -> None:
        super().__init__(latents)
        self._roped = self.width - num_halved

    def _gather(self, slots: torch.Tensor, out: torch.Tensor) -> None:
        for layer, latents in enumerate(self._buffers):
            out[:, layer, 0] = latents[slots].transpose(0, 1)
        roped = out[..., self._roped :]
        roped.copy_(torch.cat([roped[..., 0::2], roped[..., 1::2]], dim=-1))

    def _scatter(self, slots: torch.Tensor, source: torch.Tensor) -> None:
        roped = torch.stack(source[..., self._roped :].chunk(2, dim=-1), dim=-1).flatten(-2)
        source = torch.cat([source[..., : self._roped], roped], dim=-1)
        for layer, latents in enumerate(self._buffers):
            latents[slots] = source[:, layer, 0].transpose(0, 1)


def strip_pool(pool: Any, layers: Sequence[int], config: Mapping[str, Any]) -> StripPool:
    """These layers of SGLang's pool. `config`: of the text model. Raises `Unsupported` for a pool whose KV is not
    read."""
    reason = refusal(pool)
    if reason is not None:
        raise Unsupported(f"SGLang's KV pool {type(pool).__name__}: {reason}")
    if is_latent(pool):
        return LatentPool([pool.kv_buffer[layer] for layer in layers], num_halved(config))
    return KVPool([pool.k_buffer[layer] for layer in layers], [pool.v_buffer[layer] for layer in layers])


def is_latent(pool: Any) -> bool:
    return type(pool).__name__ == "MLATokenToKVPool"


def refusal(pool: Any) -> str | None:
    """Why this pool's KV is not read; None when it is."""
    if type(pool).__name__ not in ("MHATokenToKVPool", "MLATokenToKVPool"):
        return "only pools of one uniform kind are read (no window pool of its own, no states, no quantised KV)"
    if getattr(pool, "use_hnd", False) or getattr(pool, "kv_cache_layout", "nhd") != "nhd":
        return "its layout is not [slots, heads, head_dim]; start SGLang without SGLANG_USE_HND_KVCACHE"
    reason = _latents(pool) if is_latent(pool) else _keys_and_values(pool)
    if reason is not None:
        return reason
    if pool.dtype not in DTYPES or pool.store_dtype != pool.dtype:
        return f"its dtype is {pool.dtype} (quantised KV); start SGLang with --kv-cache-dtype auto"
    return None


def _keys_and_values(pool: Any) -> str | None:
    keys, values = pool.k_buffer, pool.v_buffer
    if not keys or keys[0].dim() != 3 or keys[0].shape != values[0].shape:
        return f"its shape is {[tuple(x[0].shape) for x in (keys, values) if x]}, not [slots, heads, head_dim] twice"
    return None


def _latents(pool: Any) -> str | None:
    if getattr(pool, "use_dsa", False):
        return "it has an indexer's keys beside the latents"
    if getattr(pool, "kv_scale_buffer", None) is not None:
        return "its latents have scales (quantised KV); start SGLang with --kv-cache-dtype auto"
    shapes = {tuple(buffer.shape[1:]) for buffer in pool.kv_buffer}
    if shapes != {(1, pool.kv_lora_rank + pool.qk_rope_head_dim)}:
        return f"its shapes are {sorted(shapes)}, not [slots, 1, {pool.kv_lora_rank} + {pool.qk_rope_head_dim}]"
    return None
