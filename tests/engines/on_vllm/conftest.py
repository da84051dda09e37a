"""Engines here boot warm (`tests/warm`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

import warm

PRELOADED = ("vllm/libs/libtcmalloc*.so*", "torch/lib/libgomp*.so*")
"""What vLLM has its own processes preload on a CPU."""


@pytest.fixture(scope="session", autouse=True)
def warm_boots() -> Iterator[None]:
    if warm.wanted():
        packages = Path(str(importlib.util.find_spec("vllm").origin)).parents[1]
        found = [next(iter(sorted(packages.glob(pattern))), None) for pattern in PRELOADED]
        preload = ":".join(str(path) for path in found if path is not None)
        here = warm.path_with(Path(__file__).parent)
        warm.start(["warm_vllm"], {"LD_PRELOAD": preload, "PYTHONPATH": here})
        warm.spawn_from_it()
    yield
