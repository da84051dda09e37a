"""The examples run as they stand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_best_of_n_keeps_the_likeliest_answer(tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "document.txt").write_text("The pump stands in the cellar. It is tested on Mondays. " * 8)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "best_of_n.py"), str(demo_model), "document.txt", "Where is the pump?"],
        cwd=tmp_path, env={**os.environ}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if " cached " in line]
    assert len(rows) == 4 and len({row[1] for row in rows}) == 1, done.stdout
    tip = subprocess.run(
        [sys.executable, "-m", "thaw.cli", "-C", "best-of-n", "show", "main"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert tip.returncode == 0 and "Where is the pump?" in tip.stdout, tip.stdout + tip.stderr


def test_four_reviewers_go_on_from_one_reading_after_a_restart(tmp_path: Path, demo_model: Path) -> None:
    pytest.importorskip("langgraph", reason="the extra [langgraph] is not installed")
    (tmp_path / "document.txt").write_text("The pump stands in the cellar. It is tested on Mondays. " * 20)

    def run(*words: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env={**os.environ}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    program = str(EXAMPLES / "langgraph_review.py")
    (read,) = run(program, "read", str(demo_model), "document.txt")
    num_read = int(read.split()[1]) + 32 - 1  # the last sampled token has no KV
    *reviews, adopted = run(program, "review", str(demo_model))
    assert sorted(line.split()[0] for line in reviews) == ["cost", "gaps", "language", "safety"]
    for line in reviews:
        _, prefilled, _, cached = line.split()[:4]
        assert int(prefilled) < 40 and num_read - 32 < int(cached) <= num_read, line
    assert sum(", stored:" in line for line in reviews) == 1  # loaded once, and forked
    history = json.loads("".join(run("-m", "thaw.cli", "-C", "review", "log", "--json", "main")))["commits"]
    assert adopted.split()[-1] == history[0]["commit"] and len(history) == 2
    freed = json.loads("".join(run("-m", "thaw.cli", "-C", "review", "gc", "--keep-days", "0", "--json")))
    assert freed["commits_removed"] == 3


def test_two_hosts_share_a_session_through_a_bucket(tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "document.txt").write_text("The pump stands in the cellar. It is tested on Mondays. " * 8)
    url = (tmp_path / "bucket").as_uri()
    example, said = str(EXAMPLES / "two_hosts.py"), []
    for words in (("read", str(demo_model), "document.txt", url), ("fork", str(demo_model), url, "Where is the pump?")):
        done = subprocess.run(
            [sys.executable, example, *words],
            cwd=tmp_path, env={**os.environ}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    proofs = [line.split() for line in said[1].splitlines() if " cached, " in line]
    assert len(proofs) == 4 and all(int(words[0]) > 90 and words[2] == "0" for words in proofs), said[1]
    assert said[1].count("answer/") == 4 and "sent 4 commits" in said[1]
