"""What the README shows is run: its Python as it stands, its commands one after the other."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def _block(heading: str, language: str) -> str:
    found = re.search(rf"## {heading}\n.*?```{language}\n(.*?)```", README, re.S)
    assert found, heading
    return found[1]


def test_the_python_of_the_readme_runs(tmp_path: Path, demo_model: Path) -> None:
    source = _block("In Python", "python").replace("path/to/model", str(demo_model))
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\d+ ", done.stdout, re.M)) == 4, done.stdout


def test_the_commands_of_the_readme_run(tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "document.txt").write_text("The pump stands in the cellar. It is tested on Mondays. " * 8)
    for line in _block("On the command line", "console").splitlines():
        words = [word.replace("path/to/model", str(demo_model)) for word in shlex.split(line, comments=True)]
        assert words[0] == "thaw"
        env = {**os.environ, "NO_COLOR": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "thaw.cli", *words[1:]],
            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
