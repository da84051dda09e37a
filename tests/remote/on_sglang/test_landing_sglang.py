"""SGLang loads a remote's branch into its arena while it is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from landing_laws import LandingTests, pieces, pushed, there

from thaw.engines import load_engine
from thaw.engines.base import Engine

pytest.importorskip("sglang")

__all__ = ["pieces", "pushed", "there"]


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    model = tiny_model("llama", dtype="bfloat16", head_dim=64)
    with load_engine("sglang", model=str(model), max_total_tokens=4096) as running:
        yield running


class TestSglang(LandingTests):
    pass
