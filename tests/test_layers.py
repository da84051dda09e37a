"""Imports only point down, engines know nothing of one another, heavy packages have one home: see pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONTRACTS = (
    "imports only point down",
    "engines know nothing of one another",
    "nothing of the library needs thaw.testing",
    "engines' and web frameworks' packages are imported at one place each",
    "served engines know nothing of embedded ones, and what both need knows neither",
    "what runs in vLLM's scheduler needs no torch",
    "what runs in different processes does not import one another: served engines",
    "what runs in different processes does not import one another: vLLM",
    "what runs in different processes does not import one another: SGLang",
    "the pool's rooms know only those below",
)
PROGRAM = """
import sys
sys.path.insert(0, "src")
from importlinter.cli import lint_imports
sys.exit(lint_imports(no_cache=True))
"""


def lint(root: Path) -> tuple[int, str]:
    """(exit status, report) of import-linter over the source tree at `root`, in an interpreter of its own."""
    pytest.importorskip("importlinter")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_the_contracts_are_kept() -> None:
    status, report = lint(ROOT)
    assert status == 0, report[-4000:]
    for contract in CONTRACTS:
        assert f"{contract} KEPT" in " ".join(report.split())


def test_a_breach_is_found(tmp_path: Path) -> None:
    """The check on the check: core importing the store, and torch in the repository layer, are two broken contracts."""
    import shutil

    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for module, line in (("core/ids.py", "import thaw.store"), ("repo/session.py", "import torch")):
        path = tmp_path / "src" / "thaw" / module
        path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    status, report = lint(tmp_path)
    flat = " ".join(report.split())
    assert status != 0
    assert f"{CONTRACTS[0]} BROKEN" in flat and f"{CONTRACTS[3]} BROKEN" in flat
