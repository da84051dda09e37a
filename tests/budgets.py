"""What a run of the tests costs: boots of engines, seconds of set-up and of tests. A plugin of pytest.

Every run says so at its end. One that boots more engines than `BOOTS` allows has failed, whatever its tests say: boots
are what made this suite slow. It counts the engines that a test boots warm (`warm.py`). Those that another program
boots are cold and are not counted: a pool's workers, `thaw up`, a bench, a server with an environment of its own.

Minutes of `make test` on 2 cores, installs apart: 30 in all, 12 for one engine's folder. What new parts may add to it:

    cache kinds 4      remotes 2      Ray 2      gateway 2      tree and LangGraph 2      whole engine 2      faults 1
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest

import warm

BOOTS = {"vllm": 92, "sglang": 40}
"""Engines that one run of pytest may boot: what `make test` boots (about 85 and 37), and a few more."""
PROCESS = {"vllm": "run_engine_core", "sglang": "run_detokenizer_process"}
"""By which of an engine's processes it is counted: there is one in each."""


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Costs(), "costs")


class Costs:
    def __init__(self) -> None:
        handle, name = tempfile.mkstemp(prefix="thaw-boots-")
        os.close(handle)
        self._log = Path(name)
        os.environ[warm.BOOTS] = name  # pytest's workers inherit it, and so do the processes of engines
        self.seconds: Counter[str] = Counter()
        self.boots: dict[str, int] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.when or ""] += report.duration

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        begun = Counter(self._log.read_text("utf-8").split())
        self.boots = {engine: begun[process] for engine, process in PROCESS.items() if begun[process]}
        if self.too_many() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_unconfigure(self) -> None:
        self._log.unlink(missing_ok=True)

    def too_many(self) -> dict[str, int]:
        return {} if os.environ.get("THAW_SOAK") else {e: n for e, n in self.boots.items() if n > BOOTS[e]}

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        counted = [f"{number} boots of {engine} (at most {BOOTS[engine]})" for engine, number in self.boots.items()]
        parts = [f"{self.seconds[when]:.0f} s of {word}" for when, word in WORDS.items()]
        terminalreporter.write_line(f"cost: {', '.join([*counted, *parts])}, over all processes")
        for engine, number in self.too_many().items():
            terminalreporter.write_line(
                f"FAILED: {number} boots of {engine}, the budget is {BOOTS[engine]} (tests/budgets.py). Share an "
                "engine that is there, or say there why one more is worth it.",
                red=True,
            )


WORDS = {"setup": "set-up", "call": "tests", "teardown": "tear-down"}
