"""The examples run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
