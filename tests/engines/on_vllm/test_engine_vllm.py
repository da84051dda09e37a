"""The law book on a real vLLM: its engine core and worker in processes of their own, as a user runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.testing import EngineTests

pytest.importorskip("vllm")

from thaw.engines.vllm.client.engine import VllmEngine


class TestVllm(EngineTests):
    """Its laws of bytes, boundary and forks run on all cores (conftest.py); over HTTP the whole book runs on one."""

    changes_weights = True
    other_weights: ClassVar[Path]

    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls, tiny_model: Callable[..., Path]) -> Callable[..., Engine]:
        folder = tiny_model("llama", dtype="bfloat16", head_dim=64)
        cls.other_weights = tiny_model("llama", dtype="bfloat16", head_dim=64, seed=1)

        def boot(**changes: object) -> Engine:
            return load_engine("vllm", **{"model": str(folder), "enforce_eager": True, **changes})

        return boot

    def change_weights(self, engine: Engine) -> None:
        """As trainers do: the workers load other weights in place, and thaw is not told."""
        assert isinstance(engine, VllmEngine)
        engine.collective_rpc("reload_weights", kwargs={"weights_path": str(self.other_weights)})

    def guard_off(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        assert isinstance(engine, VllmEngine)
        engine.switch(watch_weights=False)
