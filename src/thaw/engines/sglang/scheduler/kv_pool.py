"""SGLang's KV pool, a rank's own heads, to and from thaw's canonical order.

A pool keeps a layer's keys, and its values, as [slots, heads, head_dim]; slot 0 (with pages: page 0) is padding. A
token of a request lies in any slot. Only that plain layout is read; every other is refused by name at boot.
"""

from __future__ import annotations

from typing import Any

import torch

from thaw.core.cache import FullKV
from thaw.core.errors import Unsupported

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class KVPool:
    """`piece` tensors are [head][layer][K|V][token][head_dim] in host memory."""

    def __init__(self, pool: Any) -> None:
        reason = refusal(pool)
        if reason is not None:
            raise Unsupported(f"SGLang's KV pool {type(pool).__name__}: {reason}")
        self._keys, self._values = list(pool.k_buffer), list(pool.v_buffer)
        first = self._keys[0]
        self.num_slots, self.num_heads, self.head_dim = first.shape
        self.num_layers, self.dtype, self.device = len(self._keys), first.dtype, first.device
        self._on_host = first.device.type == "cpu"

    def group(self, num_kv_heads: int) -> FullKV:
        """What it is of a model with so many KV heads in all."""
        return FullKV(
            name="full",
            first_layer=0,
            num_layers=self.num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=self.head_dim,
            dtype=str(self.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        )

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
            for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
                keys[slots] = source[:, layer, 0].transpose(0, 1)
                values[slots] = source[:, layer, 1].transpose(0, 1)
            if not self._on_host:
                torch.cuda.synchronize(self.device)

    def _sent(self, piece: torch.Tensor) -> torch.Tensor:
        """On the accelerator. Of a longer piece each run of tokens goes over by itself: at once they would be put
        together in new host memory first."""
        if piece.is_contiguous():
            return piece.to(self.device, non_blocking=True)
        out = torch.empty(piece.shape, dtype=piece.dtype, device=self.device)
        for to, run in zip(out.flatten(0, 2), (r for h in piece for layer in h for r in layer), strict=True):
            to.copy_(run, non_blocking=True)
        return out

    def _gather(self, slots: torch.Tensor, out: torch.Tensor) -> None:
        for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            out[:, layer, 0] = keys[slots].transpose(0, 1)
            out[:, layer, 1] = values[slots].transpose(0, 1)

    def describe(self) -> dict[str, str]:
        return {"device": str(self.device.type), "kind": "sglang-slots"}


def refusal(pool: Any) -> str | None:
    """Why this pool's KV is not read; None when it is."""
    if type(pool).__name__ != "MHATokenToKVPool":
        return "only full attention's pool is read (no latent, sliding-window, hybrid or quantised KV)"
    if getattr(pool, "use_hnd", False) or getattr(pool, "kv_cache_layout", "nhd") != "nhd":
        return "its layout is not [slots, heads, head_dim]; start SGLang without SGLANG_USE_HND_KVCACHE"
    keys, values = pool.k_buffer, pool.v_buffer
    if not keys or keys[0].dim() != 3 or keys[0].shape != values[0].shape:
        return f"its shape is {[tuple(x[0].shape) for x in (keys, values) if x]}, not [slots, heads, head_dim] twice"
    if keys[0].dtype not in DTYPES or pool.store_dtype != pool.dtype:
        return f"its dtype is {pool.dtype} (quantised KV); start SGLang with --kv-cache-dtype auto"
    return None
