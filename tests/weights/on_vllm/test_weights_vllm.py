"""vLLM loads a stored model straight from packs: the same bits as from its files, and errors name what is wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from weights_models import (
    CHANGES,
    GREEDY,
    LAYER,
    TEXT,
    flip,
    forged,
    goes_on_without_the_models_files,
    said,
)

import thaw
from thaw.core.errors import ThawError
from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.store import Store
from thaw.weights import WeightsBook
from verbs import SOURCE
from verbs import here as thaw_here
from verbs import thaw as thaw_out

pytest.importorskip("vllm")

OPTIONS: dict[str, Any] = {"enforce_eager": True, "max_model_len": 512}


def boot(model: Path, **more: Any) -> Engine:
    return load_engine("vllm", model=str(model), **{**OPTIONS, **more})


def test_a_folder_without_the_models_files_goes_on_bitwise(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    goes_on_without_the_models_files(boot, tiny_model("llama", dtype="bfloat16", head_dim=64), tmp_path)


def words_of_failed_boot(model: Path, capfd: pytest.CaptureFixture[str], **more: str) -> str:
    with pytest.raises(ThawError) as failed:
        boot(model, **more)
    said = capfd.readouterr()
    return f"{failed.value}\n{said.out}\n{said.err}"


def test_a_flipped_byte_in_a_pack_is_named(
    tmp_path: Path, book_of_base: WeightsBook, capfd: pytest.CaptureFixture[str]
) -> None:
    blob = book_of_base.show("base").manifest.tensors[LAYER].blob
    assert blob is not None
    model = book_of_base.model("base")
    with Store.open(tmp_path / "repo") as store:
        flip(store, blob)
    assert f"tensor {LAYER}: pack" in words_of_failed_boot(model, capfd)


def test_a_set_that_is_not_its_config_is_named(book_of_base: WeightsBook, capfd: pytest.CaptureFixture[str]) -> None:
    for change, words in CHANGES.values():
        assert re.search(words, words_of_failed_boot(forged(book_of_base, change), capfd))


def test_the_loader_is_for_stored_models(tiny_model: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    said = words_of_failed_boot(tiny_model("llama", dtype="bfloat16", head_dim=64), capfd, load_format="thaw")
    assert "loads models that lie in a thaw repository" in said


@pytest.mark.slow("boots two engines of two ranks each")
def test_each_rank_takes_its_part(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama", dtype="bfloat16", head_dim=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        with boot(folder, tensor_parallel_size=2) as engine, thaw.open(tmp_path / "repo", engine=engine) as repo:
            repo.weights.add(folder, "base")
            model = repo.weights.model("base")
            with repo.session(seed=1) as session:
                session.append(TEXT * 4)
                session.commit("read", branch="main")
                expected = said(session.generate("Go on. ", GREEDY))
        with (
            boot(model, tensor_parallel_size=2) as engine,
            thaw.open(tmp_path / "repo", engine=engine) as repo,
            repo.fork("main", 1) as kids,
        ):
            assert said(kids.generate("Go on. ", GREEDY)[0]) == expected


@pytest.mark.slow("boots a server")
@pytest.mark.timeout(1200)
def test_up_starts_a_stored_model(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    thaw_here(tmp_path, "init")
    with Store.open(tmp_path / ".thaw") as store:
        WeightsBook(store).add(tiny_model("llama", dtype="bfloat16", head_dim=64), "base")
    arguments = ("--", "--max-model-len", "512", "--enforce-eager")
    paths = f"{SOURCE}:{os.environ.get('PYTHONPATH', '')}"
    thaw_out(tmp_path, "up", "--model", "thaw:base", *arguments, VLLM_CPU_KVCACHE_SPACE="1", PYTHONPATH=paths)
    try:
        thaw_here(tmp_path, "run", "a document that is read once " * 5, "--no-generate")
    finally:
        thaw_out(tmp_path, "down")
    with Store.open(tmp_path / ".thaw") as store:
        assert WeightsBook(store).show("base").num_commits == 1
        assert '"thaw:base"' in str(store.get_setting("engine"))
