"""vLLM with 24 blocks, its loads in the background and in step."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from test_operators import Owner

from thaw.core.errors import BadSampling
from thaw.engines import load_engine
from thaw.engines.base import SessionRef
from thaw.engines.served.client.engine import ServedEngine
from thaw.testing import PressureTests
from thaw.testing.laws.kit import Lab, greedy
from thaw.testing.reference import Reference

pytest.importorskip("vllm")

from thaw.engines.vllm.client.engine import VllmEngine

BLOCKS = 24
LOADS = [
    pytest.param(
        1 << 20,
        id="loads in the background",
        marks=pytest.mark.longer_in_soak(
            "1,000 operations in place of 120", receipt="vllm-operations-loads-in-the-background"
        ),
    ),
    pytest.param(
        1 << 40,
        id="loads in step",
        marks=pytest.mark.soak("what holds in the background, once more", receipt="vllm-operations-loads-in-step"),
    ),
]


class TestVllmPressure(PressureTests):
    granule: ClassVar[int] = 128
    operations: ClassVar[tuple[str, ...]] = (*PressureTests.operations, "plain request", "reset")
    num_operations: ClassVar[int] = 1000 if os.environ.get("THAW_SOAK") else 120

    @pytest.fixture(scope="class", params=LOADS)
    @classmethod
    def engine(cls, request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Iterator[VllmEngine]:
        model = str(tiny_model("llama", dtype="bfloat16", head_dim=64))
        with load_engine(
            "vllm", model=model, enforce_eager=True, max_model_len=2048, num_gpu_blocks_override=BLOCKS,
            async_nbytes=request.param,
        ) as loaded:  # fmt: skip
            assert isinstance(loaded, VllmEngine)
            yield loaded

    @pytest.fixture
    def reference(self, tiny_model: Callable[..., Path]) -> Reference:
        return Reference(tiny_model("llama", dtype="bfloat16", head_dim=64))

    @pytest.fixture
    def finished(self, engine: VllmEngine, soak_receipt: Callable[..., None]) -> Callable[[Counter[str]], None]:
        def done(counts: Counter[str]) -> None:
            stats = engine.stats()
            assert stats["preempted"] > 0, "the pool was too large for this test"
            soak_receipt(
                what=f"{self.num_operations} random operations on one vLLM whose blocks hold two of its sessions",
                held="every turn equal to its replay bit for bit and as the model by itself has it, no record and no "
                "block held by nobody",
                counts=dict(counts), engine=stats,
            )  # fmt: skip

        return done

    def operate(
        self, kind: str, engine: ServedEngine, session: SessionRef, reference: Reference, dice: random.Random
    ) -> None:
        assert isinstance(engine, VllmEngine)
        owner = Owner(engine)
        if kind == "reset":
            engine.release_pins()
            assert owner("reset_prefix_cache") is True
        else:
            tokens = engine.view(session).tokens
            assert reference.distance(tokens, *owner.told(tokens, 8, 20)) < self.tolerance

    def num_pinned(self, engine: ServedEngine) -> int:
        return engine.stats()["pinned_blocks"] * self.granule

    def check_nothing_leaks(self, engine: ServedEngine) -> None:
        stats = engine.stats()
        assert stats["running"] == 0
        assert stats["free_blocks"] >= BLOCKS - 1, f"{BLOCKS - stats['free_blocks']} blocks are held by nobody"

    def test_what_vllm_cannot_give_is_refused_by_name(self, engine: VllmEngine, lab: Lab) -> None:
        with pytest.raises(BadSampling):
            lab.one(engine, lab.begin(engine, 10), greedy(2, logprobs=101))
