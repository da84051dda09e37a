"""thaw's verbs as the tests of `thaw up` call them: in a process of their own, or in this one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from thaw import cli

SOURCE = Path(__file__).resolve().parents[1] / "src"


def thaw(folder: Path, *words: str, **environment: str) -> Any:
    """What a command prints as JSON, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "thaw.cli", *_as_json(words)],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(SOURCE), **environment},
        capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return json.loads(done.stdout)


def here(folder: Path, *words: str, code: int = 0) -> Any:
    """What a command prints as JSON, run in this process, which has imported all that it needs."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as out:
        ended = cli.main(_as_json(words))
    assert ended == code, f"{words}: {ended}\n{out.getvalue()[-2000:]}"
    return json.loads(out.getvalue())


def _as_json(words: tuple[str, ...]) -> list[str]:
    """What stands after `--` is the server's."""
    verb = 2 if words[0] == "engine" else 1
    return [*words[:verb], "--json", *words[verb:]]
