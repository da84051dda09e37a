"""Fixtures that every test may ask for: the real model, and small random models, each made once a run."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["tiers", "budgets", "soak_writer"]

# Machines here are shared: how long an example took says nothing about the code.
settings.register_profile("thaw", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("thaw")


# On a CPU vLLM takes most of the memory for its cache, and tests run two or three engines side by side.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

SERVED = {"on_vllm": ("vllm", "vLLM"), "on_sglang": ("sglang", "SGLang")}
"""Folders of tests on engines with an environment of their own, and the engine's package. None is named as a package
is: pytest puts the folder above on the path, and whoever asks whether vllm is there would find tests."""


OPTIONAL = {"with_langgraph": "langgraph", "with_ray": "ray"}
"""Folders of tests that import an optional package, which is called as its extra is."""


class NotHere(pytest.Dir):
    """A folder of tests that this environment cannot run: one line says so."""

    def collect(self) -> Iterator[pytest.Item]:
        package, title = SERVED[self.path.name]
        pytest.skip(f"{title} is not installed in this environment; `make test-{package}` runs these tests")


class NotInstalled(pytest.Dir):
    """A folder of tests of an extra that is not installed, or what was asked for in it: one line says so."""

    extra: str

    def collect(self) -> Iterator[pytest.Collector]:
        asked = [Path(arg.partition("::")[0]).resolve() for arg in self.config.args]
        for path in {self.path / path.relative_to(self.path).parts[0] for path in asked if self.path in path.parents}:
            yield NotInstalled.of(self.extra, self, path)
        if self.path in asked or not any(self.path in path.parents for path in asked):
            pytest.skip(f"the extra [{self.extra}] is not installed")

    @classmethod
    def of(cls, extra: str, parent: pytest.Collector, path: Path) -> NotInstalled:
        folder: NotInstalled = cls.from_parent(parent, path=path)
        folder.extra = extra
        return folder


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if path.parent == Path(__file__).parent and not is_installed(OPTIONAL.get(path.name, "pytest")):
        return NotInstalled.of(OPTIONAL[path.name], parent, path)
    here = path.parent.parent == Path(__file__).parent and path.name in SERVED
    return NotHere.from_parent(parent, path=path) if here and not is_installed(SERVED[path.name][0]) else None


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


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
    from thaw.testing.models import ARCHITECTURES, make_random_model

    root = tmp_path_factory.mktemp("tiny_models")

    def make(arch: str = "llama", *, dtype: str = "float32", seed: int = 0, **shape: Any) -> Path:
        folder = root / "-".join([arch, dtype, str(seed), *(f"{k}{v}" for k, v in sorted(shape.items()))])
        if folder.exists():
            return folder
        if arch in ARCHITECTURES:
            return make_random_model(arch, folder, dtype=dtype, seed=seed, **shape)
        from kind_models import make_kind_model

        return make_kind_model(arch, folder, dtype=dtype, seed=seed, **shape)

    return make
