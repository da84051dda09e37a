"""Engines here boot warm (`tests/warm`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

import warm
from thaw.testing import ExactnessTests

PRELOADED = ("vllm/libs/libtcmalloc*.so*", "torch/lib/libgomp*.so*")
"""What vLLM has its own processes preload on a CPU."""


LONGEST = ("test_http", "test_smollm2", "test_boot_options", "test_up", "test_pool", "test_operators")
"""Files that come first, so that none of these is begun last while the other processes have nothing left to do."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        laws = getattr(item, "cls", None)
        if laws is not None and laws.__name__ == "TestVllm" and hasattr(ExactnessTests, item.originalname):  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.all_cores("only on several cores do bits depend on the shape of a batch"))
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


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
