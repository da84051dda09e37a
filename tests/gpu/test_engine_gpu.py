"""The law book on a GPU: vLLM's own defaults there (V2 runner, CUDA graphs, asynchronous scheduling), and its
batch-invariant mode when VLLM_BATCH_INVARIANT=1 is set for the whole run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.testing import EngineTests

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")
if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

from thaw.engines.vllm.client.engine import VllmEngine  # noqa: E402

pytestmark = pytest.mark.gpu


class TestGpu(EngineTests):
    changes_weights = True
    other_weights: ClassVar[Path]

    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls, tiny_model: Callable[..., Path]) -> Callable[..., Engine]:
        folder = tiny_model("llama", dtype="bfloat16", head_dim=64)
        cls.other_weights = tiny_model("llama", dtype="bfloat16", head_dim=64, seed=1)

        def boot(**changes: object) -> Engine:
            usual = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30, "arena_nbytes": 1 << 30}
            return load_engine("vllm", **{"model": str(folder), **usual, **changes})

        return boot

    def change_weights(self, engine: Engine) -> None:
        assert isinstance(engine, VllmEngine)
        engine.collective_rpc("reload_weights", kwargs={"weights_path": str(self.other_weights)})

    def guard_off(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        assert isinstance(engine, VllmEngine)
        engine.switch(watch_weights=False)
