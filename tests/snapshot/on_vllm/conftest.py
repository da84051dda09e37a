"""Engines here boot warm, as in `tests/engines/on_vllm`, and so do the processes that are killed."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import whole_engine

import warm

ENGINES = Path(__file__).resolve().parents[2] / "engines"


def of_engines(folder: str) -> ModuleType:
    """The conftest of an engine's own tests."""
    spec = importlib.util.spec_from_file_location(f"{folder}_boots", ENGINES / folder / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if not warm._begun_with:  # nor are the engine's own tests in this run
    warm_boots = of_engines("on_vllm").warm_boots
COLD = whole_engine.python


class WarmProcess:
    """A process that is a fork of one that has imported vLLM already, as a `subprocess.Popen` whose output is read."""

    def __init__(self, command: list[object], env: dict[str, str]) -> None:
        read, write = os.pipe()
        with os.fdopen(write, "wb") as out:
            self._program = warm.popen(command, env=env, stdout=out)
        self.stdout, self.pid = os.fdopen(read), self._program.pid

    def poll(self) -> int | None:
        return self._program.poll()  # type: ignore[no-any-return]

    def wait(self, timeout: float | None = None) -> int:
        return self._program.wait(timeout)  # type: ignore[no-any-return]

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What it says until it has ended, less what vLLM logs; a test has a time limit of its own."""
        with self.stdout:
            said = "".join(line for line in self.stdout if line.startswith("{"))
        self.wait(timeout)
        return said, None

    @property
    def returncode(self) -> int | None:
        return self.poll()


def python(mode: str, plan: dict[str, Any], folder: Path, *out: Any) -> Any:
    """As `test_engine_snapshot.python`, begun as a fork of a process that has imported vLLM already."""
    if not warm.wanted():
        return COLD(mode, plan, folder, *out)
    path = folder / f"{mode}.json"
    path.write_text(json.dumps(plan))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command: list[object] = ["python", "-m", "quiet_worker", mode, path, folder / "errors.log"]
    return warm.popen(command, env=env, stdout=out[0]) if out else WarmProcess(command, env)


@pytest.fixture(autouse=True)
def processes_begin_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_engine, "python", python)
