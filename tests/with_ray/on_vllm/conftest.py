"""Real vLLMs on Ray clusters of this machine, one engine on each node, and each on one core.

On several cores the last bits of a log probability depend on the shape of a batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EngineOptions = dict[str, Any]


@pytest.fixture(scope="session")
def vllm_options(tiny_model: Callable[..., Path]) -> EngineOptions:
    """Of a pool, whatever its backend."""
    folder = tiny_model("llama", dtype="bfloat16", head_dim=64)
    return {
        "model": str(folder), "enforce_eager": True, "max_model_len": 2048, "retries": 8, "stall_s": 240,
        "heartbeat_s": 120, "arena_nbytes": 1 << 28,
        "env": {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"},
    }  # fmt: skip
