"""Progress where no terminal is: a line now and then, and one at the end."""

from __future__ import annotations

import time

import pytest

from thaw.cli import progress
from thaw.cli.progress import Progress


def test_off_a_terminal_a_line_comes_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_AFTER_S", 0.01)
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.01)
    said = ""

    def wait_for(text: str) -> None:
        nonlocal said
        ends = time.monotonic() + 60
        while text not in said and time.monotonic() < ends:
            time.sleep(0.01)
            said += capsys.readouterr().err
        assert text in said

    with Progress("reading", lambda: "3 of 4 tokens") as shown:
        wait_for("· reading …\n")
        wait_for("· reading 3 of 4 tokens … ")
        shown.say("writing")
        wait_for("· writing 3 of 4 tokens … ")
    assert capsys.readouterr().err.splitlines()[-1].startswith("· writing: ")


def test_quick_work_leaves_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("reading"):
        pass
    assert capsys.readouterr().err == ""
