"""The text part of multimodal classes in a real vLLM, which needs torchvision to look at such a class. Those of full
attention and windows are here; the one with recurrent layers is among `test_kinds_recurrent`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from multimodal import make_multimodal

from thaw.core.cache import SlidingKV, token_groups
from thaw.core.errors import Unsupported
from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.testing import CrossingTests
from thaw.testing.laws.kit import Lab, every_knob, ids, same, seeded
from thaw.testing.plans import mount_at

vllm = pytest.importorskip("vllm")
pytest.importorskip("torchvision", reason="vLLM does not look at a multimodal class without it")
if tuple(int(part) for part in vllm.__version__.split(".")[:2]) < (0, 32):
    pytest.skip("older releases refuse multimodal classes by name", allow_module_level=True)

from thaw.engines.vllm.client.engine import VllmEngine  # noqa: E402

OPTIONS: dict[str, Any] = {"enforce_eager": True, "max_model_len": 2048, "dtype": "float32"}
ONCE_MORE = pytest.mark.soak("the same on one more class", receipt="vllm-more-multimodal-classes")
CLASSES = [
    pytest.param("qwen3_vl"),
    pytest.param("gemma3", marks=pytest.mark.slow("the same with windows")),
    pytest.param("qwen2_5_vl", marks=ONCE_MORE),
    pytest.param("mistral3", marks=ONCE_MORE),
]


@pytest.fixture(scope="module", params=CLASSES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_multimodal(request.param, tmp_path_factory.mktemp("parts") / request.param, dtype="float32")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[VllmEngine]:
    with load_engine("vllm", model=str(folder), language_model_only=True, **OPTIONS) as loaded:
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


def test_its_windows_are_the_text_parts(engine: VllmEngine, folder: Path) -> None:
    windows = {group.window for group in token_groups(engine.info.groups) if isinstance(group, SlidingKV)}
    assert windows == ({40} if folder.name == "gemma3" else set())


@pytest.mark.parametrize("arch", ["qwen3_vl", "qwen3_5"])
def test_where_media_may_come_the_boot_is_refused_and_says_what_to_do(arch: str, tmp_path: Path) -> None:
    made = make_multimodal(arch, tmp_path / arch, dtype="bfloat16")
    with pytest.raises(Unsupported, match="--language-model-only"):
        load_engine("vllm", model=str(made), **{**OPTIONS, "dtype": "bfloat16"})


class TestVllmAndTransformers(CrossingTests):
    tolerance = 1e-3

    @pytest.fixture(scope="class")
    @classmethod
    def here(cls, folder: Path) -> Iterator[Engine]:
        if folder.name == "gemma3":
            pytest.skip("the law continues from tokens whose window the transformers engine did not keep")
        with load_engine("transformers", model=str(folder)) as loaded:
            yield loaded

    @pytest.fixture
    def there(self, engine: VllmEngine) -> Engine:
        return engine
