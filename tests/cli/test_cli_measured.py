"""What a bench prints of its receipt."""

from __future__ import annotations

from pathlib import Path

import pytest

from thaw import receipt as r
from thaw.cli import measured

RECEIPT = Path(__file__).parents[2] / "receipts" / "bench-pool.json"


def test_a_goal_says_where_it_came_out(capsys: pytest.CaptureFixture[str]) -> None:
    receipt = r.verify(RECEIPT).require()
    measured.show(receipt)
    lines = capsys.readouterr().out.splitlines()
    assert receipt.goals
    for goal in receipt.goals:
        value = f"{receipt.number(goal.derived).value:.3g} ×"
        said = [line for line in lines if goal.text in line and f": {value}" in line]
        assert said, goal.name
        assert said[0].startswith("met" if goal.held else "missed")
        assert ("within the interval" in said[0]) == (goal.held and not goal.clear)


def test_a_check_that_was_not_promised_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    receipt = r.verify(RECEIPT).require()
    measured.show(receipt)
    lines = capsys.readouterr().out.splitlines()
    others = [check for check in receipt.checks if not check.promised and not check.held]
    assert others
    for check in others:
        assert any(check.text in line and line.endswith("rounds (not promised)") for line in lines)
