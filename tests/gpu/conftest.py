"""With THAW_GPU_SUITE=name a run here leaves receipts/gpu/suite-name.json: how many tests, on which card, with which
versions, and by name which of them failed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from thaw import receipt as r
from thaw.receipt.machine import software, this_machine

WORDS = ("passed", "failed", "error", "skipped", "deselected")
NOTE_CHARACTERS = 3000


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    name, stats = os.environ.get("THAW_GPU_SUITE"), terminalreporter.stats
    if not name or not stats:
        return
    counts = {word: float(len(stats.get(word, ()))) for word in WORDS}
    arm = r.Arm(name="tests", title="tests", text="counts over the whole run", rounds=(r.Round(pair=0, values=counts),))
    bad = [report.nodeid.rpartition("::")[2] for word in ("failed", "error") for report in stats.get(word, ())]
    held = "None failed." if not bad else f"Failed: {', '.join(bad)}."
    words = " ".join(config.invocation_params.args)
    receipt = r.make(
        kind="suite.gpu", command=f"THAW_GPU_SUITE={name} python -m pytest {_public(words)}",
        versions=software("torch", "triton", "vllm", "sglang", "sglang-kernel", "transformers"),
        machine=this_machine(accelerator()), model=None,
        parameters={"name": name, "seconds": round(time.time() - terminalreporter._session_start.time, 1)},
        arms=[arm], notes=("What was run: the law book on this engine.", held[:NOTE_CHARACTERS]),
    )  # fmt: skip
    folder = Path(os.environ.get("THAW_RECEIPTS_DIR", "receipts/gpu"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"suite-{name}.json").write_bytes(r.dumps(receipt))


def accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _public(words: str) -> str:
    """Which tests were asked for."""
    return " ".join(word for word in words.split() if word.startswith("tests/"))
