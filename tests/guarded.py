"""The law book as all ways to an SGLang run it: over HTTP, in process (`law_book.py`), and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from thaw.engines.base import Engine
from thaw.engines.sglang.client.engine import SglangEngine
from thaw.testing import EngineTests


class GuardedTests(EngineTests):
    """With the guard of the weights. A subclass gives `boot`."""

    changes_weights = True
    other_weights: Path

    @classmethod
    def boot(cls, model: Path, **changes: object) -> Engine:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls, tiny_model: Callable[..., Path]) -> Callable[..., Engine]:
        cls.other_weights = tiny_model("llama", dtype="bfloat16", head_dim=64, seed=1)
        return partial(cls.boot, tiny_model("llama", dtype="bfloat16", head_dim=64))

    def change_weights(self, engine: Engine) -> None:
        """As trainers do: the server loads other weights in place, and thaw is not told."""
        assert isinstance(engine, SglangEngine)
        engine.update_weights(self.other_weights)

    def guard_off(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        assert isinstance(engine, SglangEngine)
        engine.switch(watch_weights=False)
