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
