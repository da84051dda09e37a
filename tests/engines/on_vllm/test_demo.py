"""`make demo ENGINE=vllm`: the story on the real model, in two vLLMs one after the other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from thaw.receipt import verify

pytest.importorskip("vllm")
pytestmark = pytest.mark.soak(
    "the real model in two boots of vLLM",
    receipt="vllm-demo",
    covers=("src/thaw/demo", "src/thaw/engines/vllm", "src/thaw/engines/served", "src/thaw/data"),
)


def test_all_that_the_demo_promises_holds(demo_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "thaw.cli", "demo", "--engine", "vllm", "--model", str(demo_model), "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    story = json.loads(done.stdout)
    assert story["ok"] is True and [check["held"] for check in story["checks"]] == [True] * 6
    assert len(story["children"]) == 4 and story["hydrated"]["proof"]["first_mismatch"] is None
    assert story["parent"]["logprobs"] == story["resumed"]["logprobs"]
    assert verify(tmp_path / story["folder"] / "receipt.json").ok
