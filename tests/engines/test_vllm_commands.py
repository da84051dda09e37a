"""Commands that vLLM's scheduler holds back, without a vLLM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from thaw.core.errors import Busy
from thaw.engines.served import protocol
from thaw.engines.served.budget import MAX_COMMANDS, Shares
from thaw.engines.served.mailbox import SCHEDULER, Mailbox
from thaw.engines.served.protocol import Answer
from thaw.engines.vllm.scheduler import commands
from thaw.engines.vllm.scheduler.commands import SchedulerCommands

ONE, TWO = "1" * 32, "2" * 32


@pytest.fixture
def side(tmp_path: Path) -> Any:
    """What commands need of the scheduler's side."""
    return SimpleNamespace(mail=Mailbox(tmp_path / "mail"), queue=[], facts=SimpleNamespace(world_size=2))


def look(name: int, caller: str | None = ONE, **more: Any) -> protocol.Look:
    return protocol.Look(id=f"{name:032x}", caller=caller, **more)


def test_a_caller_holds_no_more_than_its_share(side: Any) -> None:
    held = SchedulerCommands(side, Shares(caller=3 / MAX_COMMANDS))
    for i in range(3):
        held.begin(f"r{i}", look(i))
    with pytest.raises(Busy, match="held commands: this caller has 3 of 3"):
        held.begin("r3", look(3))
    assert "r3" not in held and len(side.queue) == 3
    held.begin("r4", look(4, TWO))
    held.begin("r5", protocol.Hello(id="5" * 32))
    held.end("r0")
    held.begin("r6", look(6))


def test_what_is_held_for_ever_goes_on_after_a_while(side: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held = SchedulerCommands(side, Shares())
    held.begin("r", look(0))
    for sender in (0, 1):
        side.mail.answer(look(0).id, sender, Answer(epoch=3))
    assert not held.may_pass("r"), "its client reads the mail and ends it"
    monkeypatch.setattr(commands, "HELD_LIMIT_S", 0.0)
    assert held.may_pass("r")


@pytest.mark.parametrize("answered", [0, 1, 2])
def test_a_request_that_ends_before_its_command_is_answered_costs_nothing(side: Any, answered: int) -> None:
    """Its sender has hung up; the workers have heard of it, and may not have answered."""
    held = SchedulerCommands(side, Shares())
    held.begin("r", look(0, None))
    side.queue.clear()
    for sender in range(answered):
        side.mail.answer(look(0).id, sender, Answer(epoch=3))
    assert held.may_pass("r") is (answered == 2)
    said = held.end("r")
    assert said is not None and said[protocol.KEY].get("kind", "") == ("" if answered == 2 else "timed-out")
    assert side.mail.peek(look(0).id, SCHEDULER) is None
