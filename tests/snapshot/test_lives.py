"""Kills with checkpoints, counted: what each one cost, beside a run to which nothing happened."""

from __future__ import annotations

from pathlib import Path

import pytest
import snapshot_worker as worker
from test_checkpoints import EVERY, PLAN, SLACK
from whole_engine import differences, killed_lives

import thaw
from thaw.engines.base import Engine


@pytest.mark.slow("starts five processes and kills them")
def test_a_kill_costs_few_tokens_but_for_a_capture_in_flight_and_all_are_those_of_an_undisturbed_run(
    tmp_path: Path, engine: Engine
) -> None:
    plan = {**PLAN, "num_requests": 4, "folder": str(tmp_path / "r")}
    told, lost = killed_lives(plan, tmp_path, [0.0, 0.02, 0.05, 0.1, 0.15], SLACK)
    assert len(lost) == 4 and all(of - flying <= EVERY + SLACK for of, flying in lost)
    with thaw.open(tmp_path / "r", create=False) as repo:
        assert repo.fsck().ok and repo.log(all=True) == []
    longest = max(map(len, told.values()))
    whole = worker.undisturbed(tmp_path / "whole", {**plan, "max_tokens": longest + 1}, engine)
    tokens = {id: whole[id][: len(of)] for id, of in told.items()}
    assert len(told) == 4 and differences(told, tokens) == {}
    changed = {id: [*of[:-1], of[-1] ^ 1] for id, of in tokens.items()}
    assert differences(told, changed) == {id: len(of) - 1 for id, of in told.items()}  # it would have been seen
