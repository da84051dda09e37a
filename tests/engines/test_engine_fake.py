"""The law book on `fake`."""

from __future__ import annotations

import pytest

from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.engines.embedded.weights import WeightsWatch
from thaw.testing import EngineTests
from thaw.testing.laws.kit import Load


class TestFake(EngineTests):
    changes_weights = True

    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls) -> Load:
        return lambda **changes: load_engine("fake", **changes)

    def change_weights(self, engine: Engine) -> None:
        engine._backend.weights[0] ^= 0x55  # type: ignore[attr-defined]

    def guard_off(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(WeightsWatch, "_look", lambda self: None)
