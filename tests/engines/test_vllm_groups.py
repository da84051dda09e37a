"""Requests of one batch wait for each other; what did not go as it should is counted."""

from __future__ import annotations

import pytest

from thaw.engines.vllm.scheduler import gang
from thaw.engines.vllm.scheduler.gang import Groups


def test_members_wait_until_all_are_there() -> None:
    seen = Groups()
    for place, name in enumerate("abc"):
        assert place == 0 or seen.waits("g", "a")
        seen.join("g", 3, place, name)
    assert not any(seen.waits("g", name) for name in "abc")
    assert (seen.num_shuffled, seen.num_split) == (0, 0)


def test_members_that_come_in_another_order_count_once() -> None:
    seen = Groups()
    for place, name in ((1, "b"), (0, "a"), (2, "c")):
        seen.join("g", 3, place, name)
    assert seen.num_shuffled == 1


def test_a_batch_that_begins_over_several_steps_counts_once() -> None:
    seen = Groups()
    for place, name in enumerate("abc"):
        seen.join("g", 3, place, name)
    seen.step_begins()
    seen.begins("g")
    seen.begins("g")
    assert seen.num_split == 0
    seen.step_begins()
    seen.begins("g")
    assert seen.num_split == 1


def test_nobody_waits_for_one_that_is_gone_or_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Groups()
    seen.join("gone", 2, 0, "a")
    seen.start("gone")
    assert not seen.waits("gone", "a")
    seen.join("gone", 2, 1, "late")
    assert not seen.waits("gone", "late")
    seen.join("slow", 2, 0, "b")
    assert seen.waits("slow", "b")
    monkeypatch.setattr(gang, "GROUP_LIMIT_S", -1.0)
    assert not seen.waits("slow", "b")
