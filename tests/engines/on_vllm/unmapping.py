"""What vLLM 0.33's GPU worker does around a sleep, on a CPU that keeps its memory: the connector is told, and what lay
in the KV cache is gone."""

from __future__ import annotations

from typing import Any

JUNK = 0x5A


class Unmapping:
    """A worker extension (`worker_extension_cls`). `tell`: whether the connector hears of it, as from 0.33 on."""

    def unmap(self, tell: bool) -> None:
        connector = _connector()
        if tell:
            connector.unregister_kv_caches()
        for cache in connector._kv_caches.values():
            cache.fill_(float(JUNK))

    def map(self) -> None:
        _connector().restore_kv_caches()


def _connector() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()
