"""The law book on a GPU for transformers: the embedded engine's own pass, in float32 and in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.engines.embedded.weights import WeightsWatch
from thaw.testing import EngineTests
from thaw.testing.laws.kit import Load

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

pytestmark = pytest.mark.gpu


class OnGpu(EngineTests):
    changes_weights = True
    dtype: ClassVar[str]

    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls, tiny_model: Callable[..., Path]) -> Load:
        folder = tiny_model("llama", dtype=cls.dtype)
        return lambda **changes: load_engine("transformers", model=str(folder), device="cuda", **changes)

    def change_weights(self, engine: Engine) -> None:
        with torch.no_grad():
            engine._backend._module.model.layers[0].mlp.down_proj.weight.mul_(-1.0)  # type: ignore[attr-defined]

    def guard_off(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(WeightsWatch, "_look", lambda self: None)


class TestFloat32(OnGpu):
    dtype = "float32"


class TestBFloat16(OnGpu):
    dtype = "bfloat16"
