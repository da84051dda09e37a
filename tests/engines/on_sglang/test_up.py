"""`thaw up --engine sglang`: a stock SGLang server, started, joined by the verbs, looked at, ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thaw import attach
from thaw.engines.sglang.settings import VARIABLE
from thaw.serve import record as served
from verbs import here, thaw


def options_of(pid: int) -> dict[str, Any]:
    """What the plug-in was told."""
    for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        name, _, value = entry.partition(b"=")
        if name.decode() == VARIABLE:
            found: dict[str, Any] = json.loads(value)
            return found
    return {}


def joined_by_its_address(folder: Path, url: str) -> None:
    """Another repository, whose doctor asks the server itself."""
    folder.mkdir()
    here(folder, "init")
    here(folder, "run", "--engine", url, "read once", "--no-generate")
    found = {f["name"]: f for f in here(folder, "doctor", "--quick")["findings"]}
    assert found["server"]["status"] == found["connector"]["status"] == "ok"
    assert "SGLang" in found["connector"]["text"]


@pytest.mark.slow("boots a server")
@pytest.mark.timeout(1200)
def test_the_verbs_join_the_server_that_up_started(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    model = str(tiny_model("llama", dtype="bfloat16", head_dim=64))
    here(tmp_path, "init")
    arguments = ("--arena", "1GiB", "--", "--context-length", "512", "--skip-server-warmup")
    settings = {VARIABLE: '{"pin_fraction": 0.125}'}
    up = thaw(tmp_path, "up", "--engine", "sglang", "--model", model, *arguments, **settings)
    try:
        told = options_of(up["pid"])
        assert (told["arena_nbytes"], told["pin_fraction"], told["mail"]) == (1 << 30, 0.125, up["mail"])
        again = here(tmp_path, "up", "--engine", "sglang", "--model", model, code=4)
        assert "sglang is up already" in again["error"]["message"]
        found = {f["name"]: f for f in here(tmp_path, "doctor", "--quick")["findings"]}
        assert found["server"]["status"] == "ok" and up["url"] in found["server"]["text"]
        assert found["connector"]["status"] == "ok" and "1 of 1 workers" in found["connector"]["text"]
        thaw(tmp_path, "run", "a document that is read once " * 5, "--no-generate")
        forked = thaw(tmp_path, "fork", "main", "Why?", "How?", "--max-tokens", "4", "--ignore-eos")
        assert len(forked["children"]) == 2
        assert here(tmp_path, "verify", "main")["ok"]
        counts = here(tmp_path, "engine", "stats")
        assert counts["captures"] >= 1 and counts["hydrates"] >= 1
        assert here(tmp_path, "engine", "switch", "off") == {"url": up["url"], "on": False}
        assert "switched off" in here(tmp_path, "run", "more", code=2)["error"]["message"]
        assert here(tmp_path, "engine", "switch", "on", up["url"])["on"] is True
        joined_by_its_address(tmp_path / "another", up["url"])
        with attach(up["url"]) as engine:
            assert (engine.info.name, engine.options["url"]) == ("sglang", up["url"])
    finally:
        down = thaw(tmp_path, "down")
    assert down == {"ended": True, "url": up["url"], "pid": up["pid"]}
    assert served.born(up["pid"]) == "" and not Path(up["mail"]).exists()
    assert here(tmp_path, "down")["ended"] is False
