"""`thaw up` on a stock vLLM server: started with the one file, joined by the verbs, looked at, ended."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thaw import attach
from thaw.core.errors import NotFound
from thaw.engines import load_engine
from thaw.serve import record as served
from thaw.serve.command import require, server_of
from verbs import SOURCE, here, thaw


def joined_by_its_address(folder: Path, url: str, mail: Path) -> None:
    """What the doctor says of a server that another repository joins: also where a worker has not loaded the plug-in,
    which vLLM itself says nowhere but in its log."""
    folder.mkdir()
    here(folder, "init")
    here(folder, "run", "--engine", url, "read once", "--no-generate")

    def looked(code: int = 0) -> dict[str, Any]:
        return {f["name"]: f for f in here(folder, "doctor", "--quick", code=code)["findings"]}

    assert looked()["connector"]["status"] == "ok"
    fact = mail / "facts" / "0"
    fact.rename(mail / "away")
    try:
        found = looked(code=1)["connector"]
        assert found["status"] == "problem" and "0 of 1 workers" in found["text"]
    finally:
        (mail / "away").rename(fact)


@pytest.mark.slow("boots a server")
@pytest.mark.timeout(1200)
def test_the_verbs_join_the_server_that_up_started(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("llama", dtype="bfloat16", head_dim=64)
    here(tmp_path, "init")
    arguments = ("--", "--max-model-len", "512", "--enforce-eager")
    up = thaw(tmp_path, "up", "--model", str(model), *arguments, VLLM_CPU_KVCACHE_SPACE="1")
    try:
        assert "is up already" in here(tmp_path, "up", "--model", str(model), code=4)["error"]["message"]
        found = {f["name"]: f for f in here(tmp_path, "doctor", "--quick")["findings"]}
        assert found["server"]["status"] == "ok" and up["url"] in found["server"]["text"]
        assert found["connector"]["status"] == "ok" and "1 of 1 workers" in found["connector"]["text"]
        thaw(tmp_path, "run", "a document that is read once " * 5, "--no-generate")
        forked = thaw(tmp_path, "fork", "main", "Why?", "How?", "--max-tokens", "4", "--ignore-eos")
        assert len(forked["children"]) == 2
        assert here(tmp_path, "verify", "main")["ok"]
        counts = here(tmp_path, "engine", "stats")
        assert counts["captures"] >= 1 and counts["blocks"] > 0
        assert here(tmp_path, "engine", "switch", "off") == {"url": up["url"], "on": False}
        assert "switched off" in here(tmp_path, "run", "more", code=2)["error"]["message"]
        assert here(tmp_path, "engine", "switch", "on", up["url"])["on"] is True
        joined_by_its_address(tmp_path / "another", up["url"], Path(up["mail"]))
        with attach(up["url"]) as engine:
            assert engine.options["url"] == up["url"]
    finally:
        down = thaw(tmp_path, "down")
    assert down == {"ended": True, "url": up["url"], "pid": up["pid"]}
    assert served.born(up["pid"]) == "" and not Path(up["mail"]).exists()
    assert here(tmp_path, "down")["ended"] is False


@pytest.mark.parametrize("arch", ["qwen3_5_text", "gemma3"])
def test_a_model_whose_class_imports_torchvision_is_refused_where_there_is_none(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a server or vLLM starts, with what to install. vLLM itself says that it could not inspect a class."""
    monkeypatch.setattr(sys, "path", [place for place in sys.path if Path(place).name != ".vision"])
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    if importlib.util.find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed beside vLLM here")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": arch}))
    here(tmp_path, "init")
    said = here(tmp_path, "up", "--engine", "vllm", "--model", str(model), code=2)["error"]["message"]
    assert "does not have torchvision" in said and arch in said and "pip install" in said
    with pytest.raises(NotFound, match=f"{arch} imports torchvision"):
        load_engine("vllm", model=str(model))
    (model / "config.json").write_text(json.dumps({"model_type": "qwen3_next"}))
    require(server_of("vllm"), sys.executable, str(model), named_one=False)
