"""The law book on a real SGLang: a server of its own processes, reached over HTTP as any client reaches it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.engines.sglang.client.engine import SglangEngine
from thaw.testing import EngineTests

pytest.importorskip("sglang")


class TestSglang(EngineTests):
    changes_weights = True
    other_weights: Path

    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls, tiny_model: Callable[..., Path]) -> Callable[..., Engine]:
        folder = tiny_model("llama", dtype="bfloat16", head_dim=64)
        cls.other_weights = tiny_model("llama", dtype="bfloat16", head_dim=64, seed=1)

        def boot(**changes: object) -> Engine:
            return load_engine("sglang", **{"model": str(folder), "chunked_prefill_size": 512, **changes})

        return boot

    def change_weights(self, engine: Engine) -> None:
        """As trainers do: the server loads other weights in place, and thaw is not told."""
        assert isinstance(engine, SglangEngine)
        engine.update_weights(self.other_weights)

    def guard_off(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        assert isinstance(engine, SglangEngine)
        engine.switch(watch_weights=False)
