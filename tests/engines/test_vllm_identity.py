"""Snapshots move between engines: from a folder alone, the identity that the transformers engine gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from thaw.core import canonical  # noqa: E402
from thaw.core.cache import CacheGroup  # noqa: E402
from thaw.core.identity import ModelIdentity  # noqa: E402
from thaw.engines import load_engine  # noqa: E402
from thaw.engines.hf.codec import HFCodec  # noqa: E402
from thaw.engines.hf.weights import CACHE_NAME  # noqa: E402
from thaw.engines.served.client.identity import model_identity  # noqa: E402

DTYPES = ("bfloat16", "float16", "float32")


def fresh(folder: Path, to: Path) -> Path:
    """A copy that no engine has hashed yet."""
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns(CACHE_NAME)))


def of_folder(folder: Path, dtype: str, groups: tuple[CacheGroup, ...]) -> ModelIdentity:
    codec = HFCodec(transformers.AutoTokenizer.from_pretrained(folder))
    return model_identity(folder, dtype=dtype, groups=groups, codec=codec)


def of_engine(folder: Path, dtype: str) -> ModelIdentity:
    with load_engine("transformers", model=str(folder), dtype=dtype) as engine:
        return engine.identity()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gpt_neox"])
def test_a_folder_has_the_identity_of_the_running_model(
    arch: str, dtype: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    running = of_engine(fresh(tiny_model(arch), tmp_path / "a"), dtype)
    from_files = of_folder(fresh(tiny_model(arch), tmp_path / "b"), dtype, running.groups)
    assert from_files == running
    assert canonical.encode(from_files) == canonical.encode(running)


@pytest.mark.parametrize("dtype", DTYPES)
def test_smollm2_too(demo_model: Path, tmp_path: Path, dtype: str) -> None:
    running = of_engine(demo_model, dtype)
    assert of_folder(fresh(demo_model, tmp_path / "b"), dtype, running.groups) == running


def test_configs_in_the_words_of_transformers_4(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = fresh(tiny_model("llama"), tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    config |= {"rope_theta": 5e5, "rope_scaling": None, "torch_dtype": config.pop("dtype"), "architectures": None}
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config))
    running = of_engine(folder, "float32")
    assert "500000" in running.config["rope_parameters"]
    assert of_folder(folder, "float32", running.groups) == running


def test_another_function_is_another_identity(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = fresh(tiny_model("llama"), tmp_path / "a")
    running = of_engine(folder, "float32")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    changed = of_folder(folder, "float32", running.groups)
    assert changed.config["rms_norm_eps"] == "0.001" and changed.weights == running.weights
    assert of_folder(folder, "bfloat16", running.groups).dtype != running.dtype
