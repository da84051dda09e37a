"""With THAW_GPU_SUITE=name a run here leaves receipts/gpu/suite-name.json: how many tests, on which card, with which
versions, and by name which of them failed. A run may be cut short, so each test is told of when it ends as well: a line
in suite-name.progress beside the receipt, and with a failure what it said, there and on the screen."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from thaw import receipt as r
from thaw.receipt.machine import software, this_machine

WORDS = ("passed", "failed", "error", "skipped", "deselected")
NOTE_CHARACTERS = 3000
SAID_CHARACTERS = 2000
"""Of what a failure said, and of what its test printed: the ends are kept."""


SCREEN: list[pytest.TerminalReporter] = []
"""Of this run: what is printed otherwise is captured."""


def pytest_sessionstart(session: pytest.Session) -> None:
    SCREEN[:] = filter(None, [session.config.pluginmanager.get_plugin("terminalreporter")])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = os.environ.get("THAW_GPU_SUITE")
    told = report.when == "call" or report.outcome != "passed"  # a fixture that works is not worth a line
    if not name or not told:
        return
    lines = [f"{time.strftime('%H:%M:%S')} {report.outcome} {report.when} {report.duration:.1f}s {report.nodeid}"]
    printed = report.capstdout[-SAID_CHARACTERS:].splitlines()
    if report.outcome == "passed":
        printed = [line for line in printed if "noise" in line or line.startswith("said:")]
    lines += [f"    {line}" for line in (*_crash(report).splitlines(), *printed) if line.strip()]
    text = "\n".join(lines) + "\n"
    folder = receipts_folder()
    with (folder / f"suite-{name}.progress").open("a") as file:
        file.write(text)
    if report.outcome == "failed" and SCREEN:
        SCREEN[0].write_line(f"\n{text}")


def _crash(report: pytest.TestReport) -> str:
    """What a failure said: the assertion with its numbers, and where it stands."""
    if report.outcome != "failed":
        return ""
    crash = getattr(report.longrepr, "reprcrash", None)
    said = report.longreprtext if crash is None else f"{crash.path}:{crash.lineno}: {crash.message}"
    return said[:SAID_CHARACTERS] if crash is not None else said[-SAID_CHARACTERS:]


def receipts_folder() -> Path:
    folder = Path(os.environ.get("THAW_RECEIPTS_DIR", "receipts/gpu"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    name, stats = os.environ.get("THAW_GPU_SUITE"), terminalreporter.stats
    if not name or not stats:
        return
    counts = {word: float(len(stats.get(word, ()))) for word in WORDS}
    arm = r.Arm(name="tests", title="tests", text="counts over the whole run", rounds=(r.Round(pair=0, values=counts),))
    bad = [report.nodeid.partition("::")[2] for word in ("failed", "error") for report in stats.get(word, ())]
    held = "None failed." if not bad else f"Failed: {', '.join(bad)}."
    words = " ".join(config.invocation_params.args)
    receipt = r.make(
        kind="suite.gpu", command=f"THAW_GPU_SUITE={name} python -m pytest {_public(words)}",
        versions=software("torch", "triton", "vllm", "sglang", "sglang-kernel", "transformers"),
        machine=this_machine(accelerator()), model=None,
        parameters={"name": name, "seconds": round(time.time() - terminalreporter._session_start.time, 1)},
        arms=[arm], notes=("What was run: the law book on this engine.", held[:NOTE_CHARACTERS]),
    )  # fmt: skip
    (receipts_folder() / f"suite-{name}.json").write_bytes(r.dumps(receipt))


def accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _public(words: str) -> str:
    """Which tests were asked for."""
    return " ".join(word for word in words.split() if word.startswith("tests/"))
