"""The text part of a multimodal class in a real vLLM, which needs torchvision to look at such a class."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from kind_models import make_kind_model
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

SHAPE: dict[str, Any] = {
    "head_dim": 32, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6], "mrope_interleaved": True,
    },
}  # fmt: skip
PATCHES = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
SIZE = {"size": {"shortest_edge": 3136, "longest_edge": 12_845_056}}
OPTIONS = {"enforce_eager": True, "max_model_len": 2048, "dtype": "float32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_kind_model("qwen3_vl", tmp_path_factory.mktemp("parts") / "model", dtype="float32", **SHAPE)
    for name, kind in (("preprocessor", "image_processor"), ("video_preprocessor", "video_processor")):
        of = "Qwen2VLImageProcessor" if kind == "image_processor" else "Qwen3VLVideoProcessor"
        (made / f"{name}_config.json").write_text(json.dumps({f"{kind}_type": of, **PATCHES, **SIZE}))
    return made


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


def test_where_media_may_come_the_boot_is_refused_and_says_what_to_do(folder: Path) -> None:
    with pytest.raises(Unsupported, match="--language-model-only"):
        load_engine("vllm", model=str(folder), **OPTIONS)


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
