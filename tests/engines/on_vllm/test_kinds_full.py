"""Full attention of other models than Llama and its kin in a real vLLM: learned positions, scaled logits, norms and
multipliers of their own. In float32, where transformers' own logits are near and those of wrong KV are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.testing import CrossingTests
from thaw.testing.laws.kit import Lab, every_knob, ids, same, seeded
from thaw.testing.plans import mount_at

pytest.importorskip("vllm")

from thaw.engines.vllm.client.engine import VllmEngine

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"hidden_size": 128, "n_embd": 128},
    "falcon": {"hidden_size": 128, "ffn_hidden_size": 512},
    "cohere": {"hidden_size": 128, "tie_word_embeddings": True},
    "granite": {"attention_multiplier": 0.2, "embedding_multiplier": 2.0, "logits_scaling": 4.0},
    "stablelm": {},
    "nemotron": {},
}
"""vLLM's own limits: heads of 32 numbers, Falcon's feed-forward of four times the width, tied weights in Cohere."""
QUICK = ("gpt2",)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(arch, marks=() if arch in QUICK else pytest.mark.slow("the same on one more model of the kind"))
        for arch in SHAPES
    ],
)
def folder(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Path:
    return tiny_model(request.param, **SHAPES[request.param])


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[VllmEngine]:
    options = {"enforce_eager": True, "max_model_len": 2048, "dtype": "float32"}
    with load_engine("vllm", model=str(folder), **options) as loaded:
        yield cast(VllmEngine, loaded)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


def test_a_cut_continues_like_the_uninterrupted_parent(engine: VllmEngine, lab: Lab) -> None:
    for count in (41, 127, 128, 129, 300):
        session = lab.begin(engine, count, start=count)
        moved = lab.move(engine, session, engine)
        same(lab.one(engine, session, seeded(6), (5,)), lab.one(engine, moved, seeded(6), (5,)))
        same(lab.one(engine, session, every_knob(), ids(4)), lab.one(engine, moved, every_knob(), ids(4)))


class TestVllmAndTransformers(CrossingTests):
    tolerance = 1e-3

    @pytest.fixture(scope="class")
    @classmethod
    def here(cls, folder: Path) -> Iterator[Engine]:
        with load_engine("transformers", model=str(folder)) as loaded:
            yield loaded

    @pytest.fixture
    def there(self, engine: VllmEngine) -> Engine:
        return engine
