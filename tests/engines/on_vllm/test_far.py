"""A store of vLLM's whose packs lie in a tier of another package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from far_served import FarServed
from thaw.engines import load_engine
from thaw.engines.base import Engine

if TYPE_CHECKING:
    from distant.server import Vault

pytest.importorskip("vllm")


class TestVllm(FarServed):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, server: Vault, tiny_model: Callable[..., Path]) -> Iterator[Engine]:
        folder = str(tiny_model("llama", dtype="bfloat16", head_dim=64))
        with load_engine("vllm", model=folder, enforce_eager=True, max_model_len=2560) as booted:
            yield booted
