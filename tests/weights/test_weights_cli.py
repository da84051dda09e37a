"""`thaw weights`, and models by the name `thaw:NAME`: real processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from weights_models import nudged, rewrite

SOURCE = Path(__file__).resolve().parents[2] / "src"
Make = Callable[..., Path]
ASK = ("--temperature", "0", "--max-tokens", "6", "--logprobs", "3", "--ignore-eos", "--json")


def thaw(cwd: Path, *words: str, code: int = 0) -> Any:
    env = {key: value for key, value in os.environ.items() if key not in ("THAW_REPO", "THAW_NAMESPACE")}
    done = subprocess.run(
        [sys.executable, "-m", "thaw.cli", *words], cwd=cwd, env=env | {"PYTHONPATH": str(SOURCE)},
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300,
    )  # fmt: skip
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout) if "--json" in words else done.stdout + done.stderr


@pytest.mark.slow("four processes that load torch")
def test_a_repository_alone_goes_on_bitwise(tmp_path: Path, own_model: Make) -> None:
    folder, here, there = own_model(), tmp_path / "here", tmp_path / "there"
    here.mkdir()
    thaw(here, "init", ".")
    thaw(here, "run", "a text to read. " * 20, "--no-generate", "--model", str(folder), "--with-weights")
    expected = thaw(here, "run", "Go on.", "--branch", "first", "--from", "main", *ASK)
    shutil.copytree(here, there)
    shutil.rmtree(folder)
    shutil.rmtree(here)
    assert "base" in thaw(there, "weights", "list")
    found = thaw(there, "run", "Go on.", "--branch", "second", "--from", "main", "--model", "thaw:base", *ASK)
    assert found["token_ids"] == expected["token_ids"] and found["logprobs"] == expected["logprobs"]
    again = thaw(there, "run", "Go on.", "--branch", "third", "--from", "main", *ASK)  # it is remembered
    assert again["token_ids"] == expected["token_ids"] and again["logprobs"] == expected["logprobs"]


@pytest.mark.slow("eight processes, two of which load torch")
def test_the_verbs_say_what_there_is(tmp_path: Path, own_model: Make) -> None:
    thaw(tmp_path, "init", "repo")
    base, tuned = own_model(), rewrite(own_model("tuned"), nudged("lm_head.weight"))
    at = ("-C", "repo")
    assert "no weights yet" in thaw(tmp_path, *at, "weights", "list")
    assert "written in 30 tensors" in thaw(tmp_path, *at, "weights", "add", str(base))
    added = thaw(tmp_path, *at, "weights", "add", str(tuned), "--name", "step-1", "--json")
    assert added["num_written"] == 1 and added["entry"]["name"] == "step-1"
    listed = thaw(tmp_path, *at, "weights", "list", "--json")["weights"]
    assert [one["name"] for one in listed] == ["base", "step-1"]
    shown = thaw(tmp_path, *at, "weights", "show", added["entry"]["weights"][3:11])
    assert "step-1" in shown and added["entry"]["weights"] in shown and "0 commits" in shown
    assert "removed step-1" in thaw(tmp_path, *at, "weights", "rm", "step-1")
    gone = thaw(tmp_path, *at, "weights", "show", "step-1", "--json", code=2)
    assert gone["error"]["kind"] == "not-found" and "there are: base" in gone["error"]["message"]
    assert "of tensors" in thaw(tmp_path, *at, "weights", "checkout", "base", "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow("twelve processes")
def test_only_thaw_weights_takes_a_set_away(tmp_path: Path, own_model: Make) -> None:
    """By the namespace that the sets lie in, no verb goes round the refusal of `thaw weights rm`."""
    thaw(tmp_path, "init", "repo")
    at = ("-C", "repo")
    thaw(tmp_path, *at, "weights", "add", str(own_model()))
    inside = (*at, "--namespace", "thaw.weights")
    assert "base" in thaw(tmp_path, *inside, "tag", code=0)
    for words in (
        ("tag", "-d", "base"), ("tag", "other", "base"), ("branch", "-m", "base", "other"), ("adopt", "base", "main"),
        ("undo", "base"), ("run", "some text", "--engine", "fake", "--no-generate"),
    ):  # fmt: skip
        said = thaw(tmp_path, *inside, *words, code=2)
        assert "thaw weights rm" in said and "thaw.weights" in said, words
    assert [one["name"] for one in thaw(tmp_path, *at, "weights", "list", "--json")["weights"]] == ["base"]
    thaw(tmp_path, *at, "weights", "rm", "base")
    thaw(tmp_path, *inside, "undo", "base")
    assert [one["name"] for one in thaw(tmp_path, *at, "weights", "list", "--json")["weights"]] == ["base"]
