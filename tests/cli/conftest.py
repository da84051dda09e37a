"""The command line as people meet it: a real process, the fake engine, a repository in a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"


@dataclass(frozen=True)
class Result:
    """What one command did."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class Shell:
    """Runs `thaw` in `cwd`. Every call is a process of its own."""

    cwd: Path

    def __call__(self, *words: str, stdin: str | bytes | None = None, **environment: str) -> Result:
        ours = ("THAW_REPO", "THAW_NAMESPACE", "NO_COLOR", "THAW_DEBUG", "COLUMNS")
        env = {k: v for k, v in os.environ.items() if k not in ours}
        env |= {"PYTHONPATH": str(SOURCE), "PYTHONUTF8": "1", **environment}
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            [sys.executable, "-m", "thaw.cli", *words],
            cwd=self.cwd,
            env=env,
            capture_output=True,
            input=data,
            stdin=subprocess.DEVNULL if data is None else None,
            timeout=300,
        )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    def ok(self, *words: str, **more: Any) -> Result:
        result = self(*words, **more)
        assert result.code == 0, f"thaw {' '.join(words)} ended with {result.code}\n{result.out}\n{result.err}"
        return result

    def commit(self, point: str = "HEAD") -> str:
        """The full id of a point's commit."""
        return str(self.ok("show", point, "--json").json()["commit"])


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A folder without a repository."""
    return Shell(tmp_path)


@pytest.fixture
def repo(shell: Shell) -> Shell:
    """A repository for the fake engine, with nothing in it."""
    shell.ok("init", "--engine", "fake")
    return shell


@pytest.fixture(scope="session")
def tree_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """main (a text that was read), fork/0 and fork/1 behind it, tag read: made once, copied for every test."""
    shell = Shell(tmp_path_factory.mktemp("tree"))
    shell.ok("init", "--engine", "fake")
    shell.ok("run", "a document that is long enough to share. " * 20, "--no-generate", "-m", "read it")
    shell.ok("fork", "main", "Why?", "How?", "--max-tokens", "12")
    shell.ok("tag", "read", "main")
    return shell.cwd


@pytest.fixture
def tree(tree_source: Path, shell: Shell) -> Shell:
    import shutil

    shutil.copytree(tree_source / ".thaw", shell.cwd / ".thaw")
    return shell


Run = Callable[..., Result]
