"""A worker whose cache holds nothing but NaN: what a restored session reads must have been written."""

from __future__ import annotations

from typing import Any

from in_place import InPlace


class Scrub(InPlace):
    """A worker extension (`worker_extension_cls`): its methods become the worker's, called by `collective_rpc`."""

    def fill_with_nan(self) -> int:
        """All pages but the null block's. How many bytes that were."""
        import torch

        found: dict[int, Any] = {}
        for layer in self.model_runner.compilation_config.static_forward_context.values():
            caches = getattr(layer, "kv_cache", None)
            for cache in caches if isinstance(caches, (list, tuple)) else (caches,):
                if isinstance(cache, torch.Tensor) and cache.numel():
                    found.setdefault(cache.untyped_storage().data_ptr(), cache)
        nbytes = 0
        for cache in found.values():
            whole = torch.empty(0, dtype=torch.uint8).set_(cache.untyped_storage())
            page = whole.numel() // self.model_runner.kv_cache_config.num_blocks
            whole[page:].fill_(0xFF)
            nbytes += whole.numel() - page
        return nbytes
