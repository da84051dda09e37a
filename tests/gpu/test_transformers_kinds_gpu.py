"""Cache kinds of transformers on a GPU: the whole law book on windows that are kept of all tokens and on two models
with recurrent layers, and its laws of exactness on every other kind."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "engines"))

from test_engine_states import RecurrentLaws  # noqa: E402

from kind_models import KINDS  # noqa: E402
from thaw.engines import load_engine  # noqa: E402
from thaw.engines.base import Engine  # noqa: E402
from thaw.engines.embedded.weights import WeightsWatch  # noqa: E402
from thaw.testing import EngineTests, ExactnessTests  # noqa: E402
from thaw.testing.laws.groups_law import GroupsLaw  # noqa: E402
from thaw.testing.laws.kit import Load  # noqa: E402
from thaw.testing.laws.proof_law import ProofLaw  # noqa: E402

pytestmark = pytest.mark.gpu
WINDOWED = [kind for kind, what in KINDS.items() if "windows" in what or "chunks" in what]


def factory(folder: Path, **options: object) -> Load:
    return lambda **changes: load_engine("transformers", model=str(folder), device="cuda", **{**options, **changes})


class TestEveryLawOfWindows(EngineTests):
    changes_weights = True

    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls, tiny_model: Callable[..., Path]) -> Load:
        return factory(tiny_model("gpt_oss"), interior=True)

    def change_weights(self, engine: Engine) -> None:
        with torch.no_grad():
            engine._backend._module.get_input_embeddings().weight.mul_(-1.0)  # type: ignore[attr-defined]

    def guard_off(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(WeightsWatch, "_look", lambda self: None)


class OnGpu(RecurrentLaws):
    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls, tiny_model: Callable[..., Path]) -> Load:
        return factory(tiny_model(cls.arch, dtype=cls.dtype), recent_points=64)


class TestEveryLawOfDeltaRules(OnGpu):
    arch: ClassVar[str] = "qwen3_next"


class TestEveryLawOfMamba(OnGpu):
    arch: ClassVar[str] = "granitemoehybrid"
    dtype: ClassVar[str] = "bfloat16"


class TestWindowsOfTheEnd(GroupsLaw, ProofLaw):
    @pytest.fixture(scope="class", params=WINDOWED)
    @classmethod
    def engine_factory(cls, request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Load:
        return factory(tiny_model(request.param))


class TestExactnessOfKinds(ExactnessTests):
    @pytest.fixture(scope="class", params=list(itertools.product(KINDS, ("bfloat16", "float32"))), ids="-".join)
    @classmethod
    def engine_factory(cls, request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Load:
        arch, dtype = request.param
        options = {"interior": True} if arch in WINDOWED else {}
        return factory(tiny_model(arch, dtype=dtype), **options)
