"""The law book on `transformers`, with small random models that look at their KV.

The whole of it on one architecture, the laws that can differ from model to model on all of them, in both dtypes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

import stretched_rope

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from thaw.engines import load_engine  # noqa: E402
from thaw.engines.base import Engine, GenerateRequest  # noqa: E402
from thaw.engines.embedded.weights import WeightsWatch  # noqa: E402
from thaw.testing import EngineTests, ExactnessTests  # noqa: E402
from thaw.testing.laws.kit import Load, ids, seeded  # noqa: E402
from thaw.testing.models import ARCHITECTURES  # noqa: E402
from thaw.testing.reference import Reference  # noqa: E402

WHOLE = ("llama", "float32")
QUICK = {("qwen2", "bfloat16")}
"""With llama in float32: two architectures and both dtypes at every run; the other pairs are marked slow."""
MORE = pytest.mark.slow("the same laws on one more architecture or dtype")
MODELS = [
    pytest.param(pair, id="-".join(pair), marks=() if pair in QUICK else MORE)
    for pair in itertools.product(ARCHITECTURES, ("bfloat16", "float32"))
    if pair != WHOLE
]


def factory(folder: Path) -> Load:
    return lambda **changes: load_engine("transformers", model=str(folder), **changes)


class TestEveryLaw(EngineTests):
    changes_weights = True

    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls, tiny_model: Callable[..., Path]) -> Load:
        return factory(tiny_model(WHOLE[0], dtype=WHOLE[1]))

    def change_weights(self, engine: Engine) -> None:
        with torch.no_grad():
            engine._backend._module.model.layers[0].mlp.down_proj.weight.mul_(-1.0)  # type: ignore[attr-defined]

    def guard_off(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(WeightsWatch, "_look", lambda self: None)


class TestExactness(ExactnessTests):
    @pytest.fixture(scope="class", params=MODELS)
    @classmethod
    def engine_factory(cls, request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Load:
        arch, dtype = request.param
        return factory(tiny_model(arch, dtype=dtype))


@pytest.mark.parametrize(
    "knobs", [{}, {"temperature": 0.0}, {"temperature": 0.3, "top_k": 3, "repetition_penalty": 1.5}]
)
def test_entropies_are_those_of_the_stock_models_forward_pass(
    tiny_model: Callable[..., Path], knobs: dict[str, float]
) -> None:
    """Whatever the sampler's parameters are. The control: those of the token before."""
    folder, prompt = tiny_model("llama"), ids(70)
    with load_engine("transformers", model=str(folder)) as engine:
        session = engine.open(seed=5)
        asked = seeded(24, entropy=True, **knobs)
        out = engine.generate([GenerateRequest(session=session, prompt=prompt, sampling=asked)]).result()[0]
    expected = Reference(folder).entropies(prompt, out.token_ids)
    assert out.entropies == pytest.approx(expected, abs=1e-4)
    assert out.entropies[1:] != pytest.approx(expected[:-1], abs=1e-2)


def test_a_session_may_be_as_long_as_a_stretched_rope(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    stretched_rope.check("transformers", stretched_rope.stretched(tiny_model("llama"), tmp_path / "model"))
