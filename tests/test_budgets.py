"""A run says what it cost, and one that boots more engines than it may has failed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import budgets


@pytest.mark.parametrize(("number", "code"), [(budgets.BOOTS["vllm"], 0), (budgets.BOOTS["vllm"] + 1, 1)])
def test_boots_are_counted_and_may_not_be_more_than_the_budget(tmp_path: Path, number: int, code: int) -> None:
    told = f"run_engine_core\\nworker_main\\n' * {number}"
    (tmp_path / "test_it.py").write_text(
        f"import os\ndef test_it():\n    open(os.environ['THAW_BOOT_LOG'], 'a').write('{told})\n", encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "budgets", "-p", "no:cacheprovider", str(tmp_path / "test_it.py")],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(budgets.__file__).parent)},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert f"cost: {number} boots of vllm" in done.stdout and "s of set-up" in done.stdout
    assert ("FAILED" in done.stdout and "tests/budgets.py" in done.stdout) is bool(code)
