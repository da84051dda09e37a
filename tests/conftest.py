"""Fixtures that every test may ask for: the real model, and small random models, each made once a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Machines here are shared: how long an example took says nothing about the code.
settings.register_profile("thaw", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("thaw")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that asks for the real model is marked so; nobody can forget it and slow `make test-fast` down."""
    for item in items:
        if "demo_model" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.model)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of SmolLM2-135M-Instruct, built if missing, whatever THAW_MODEL says: tests know this model."""
    from thaw.demo.model import ensure_demo_model

    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("THAW_MODEL", raising=False)
        return ensure_demo_model(lambda line: print(line, file=sys.stderr, flush=True))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model("llama", dtype="bfloat16", seed=1)`: the folder of a random model, made once a run."""
    from thaw.testing.models import make_random_model

    root = tmp_path_factory.mktemp("tiny_models")

    def make(arch: str = "llama", *, dtype: str = "float32", seed: int = 0) -> Path:
        folder = root / f"{arch}-{dtype}-{seed}"
        return folder if folder.exists() else make_random_model(arch, folder, dtype=dtype, seed=seed)

    return make
