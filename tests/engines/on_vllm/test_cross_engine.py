"""Snapshots cross engines: KV of transformers goes on in vLLM and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.testing import CrossingTests

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", dtype="bfloat16", head_dim=64)


class TestVllmAndTransformers(CrossingTests):
    @pytest.fixture(scope="class")
    @classmethod
    def here(cls, folder: Path) -> Iterator[Engine]:
        with load_engine("transformers", model=str(folder)) as engine:
            yield engine

    @pytest.fixture(scope="class")
    @classmethod
    def there(cls, folder: Path) -> Iterator[Engine]:
        with load_engine("vllm", model=str(folder), enforce_eager=True, max_model_len=2048) as engine:
            yield engine
