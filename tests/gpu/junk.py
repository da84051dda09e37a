"""A vLLM worker whose cache holds what no model computed: what a restored session reads must have been written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

LARGE = 1e4


class Junk:
    """A worker extension (`worker_extension_cls`): its methods become the worker's, called by `collective_rpc`.

    The null block stays as it is: a graph's padding reads it."""

    model_runner: Any

    def fill_with_nan(self) -> int:
        """All pages. How many bytes that were."""
        return self.fill(float("nan"))

    def fill_with_junk(self) -> int:
        """Likewise with numbers that an attention's mask removes: a page's tail holds a former owner's, never NaN."""
        return self.fill(LARGE)

    def fill(self, value: float) -> int:
        return sum(_fill(cache, value) for cache in self._caches())

    def _caches(self) -> Iterator[Any]:
        import torch

        found: dict[tuple[int, int], Any] = {}
        for layer in self.model_runner.compilation_config.static_forward_context.values():
            caches = getattr(layer, "kv_cache", None)
            for cache in caches if isinstance(caches, (list, tuple)) else (caches,):
                if isinstance(cache, torch.Tensor) and cache.numel():
                    found[cache.data_ptr(), cache.numel()] = cache
        yield from found.values()


def _fill(cache: Any, value: float) -> int:
    cache[1:].fill_(value)
    return int(cache[1:].nbytes)
