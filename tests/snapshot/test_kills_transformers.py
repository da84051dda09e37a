"""transformers with checkpoints, killed again and again: no token is wrong, and few are generated again."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import snapshot_worker as worker
import whole_engine
from whole_engine import differences, killed_lives

import thaw
import warm

PROMPT = "The river is long and slow, and nobody knows its name."
LIVES, KILLS = 10, 10
EVERY, SLACK = 16, 24
IMPORTED = ("torch", "transformers", "thaw.engines.transformers.backend", "thaw.snapshot.ring", "thaw.repo.session")


def python(mode: str, plan: dict[str, Any], folder: Path, out: Any) -> Any:
    """As `test_engine_snapshot.python`, begun as a fork of a process that has imported all of it already."""
    path = folder / f"{mode}.json"
    path.write_text(json.dumps(plan))
    command = ["python", "-m", "snapshot_worker", mode, str(path)]
    return warm.popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=out)


@pytest.fixture
def processes_begin_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    if warm.wanted():
        warm.start(IMPORTED, {})
        monkeypatch.setattr(whole_engine, "python", python)


@pytest.mark.soak(
    "loads a model a hundred times",
    receipt="transformers-whole-engine-kills",
    covers=(
        "src/thaw/snapshot",
        "src/thaw/engines/transformers",
        "src/thaw/engines/embedded",
        "src/thaw/data",
        "tests/snapshot/whole_engine.py",
        "tests/snapshot/snapshot_worker.py",
    ),
)
@pytest.mark.timeout(3600)
def test_after_100_kills_of_transformers_no_token_is_wrong_and_few_were_generated_again(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    soak_receipt: Callable[..., None],
    processes_begin_warm: None,
) -> None:
    plan = {
        "engine": "transformers", "options": {"model": str(tiny_model("llama"))}, "slow": {}, "prompt": PROMPT,
        "max_num_seqs": 4, "num_requests": 4, "num_parked": 1, "max_tokens": 3900, "every": EVERY,
    }  # fmt: skip
    chance = random.Random(5)
    told: dict[str, list[int]] = {}
    num_told, lost = 0, list[tuple[int, int]]()
    for i in range(LIVES):
        folder = tmp_path / str(i)
        folder.mkdir()
        waits = [chance.uniform(0.0, 0.4) for _ in range(KILLS)]
        said, cost = killed_lives({**plan, "folder": str(folder / "r")}, folder, waits, SLACK)
        assert len(said) == 4 and min(map(len, said.values())) >= KILLS
        for id, tokens in said.items():  # the same requests each time
            shared = min(len(tokens), len(told.get(id, [])))
            assert tokens[:shared] == told.get(id, [])[:shared]
            told[id] = max(told.get(id, []), tokens, key=len)
        with thaw.open(folder / "r", create=False) as repo:
            assert repo.fsck().ok and repo.log(all=True) == []
        num_told += sum(map(len, said.values()))
        lost += cost
    longest = max(map(len, told.values()))
    with worker.engine_of(plan) as engine:
        whole = worker.undisturbed(tmp_path / "whole", {**plan, "max_tokens": longest + 1}, engine)
    tokens = {id: whole[id][: len(of)] for id, of in told.items()}
    assert differences(told, tokens) == {}
    changed = {id: [*of[:-1], of[-1] ^ 1] for id, of in tokens.items()}
    assert differences(told, changed) == {id: len(of) - 1 for id, of in told.items()}  # it would have been seen
    assert len(lost) == LIVES * (KILLS - 1) and all(of - flying <= EVERY + SLACK for of, flying in lost)
    counts = {
        "kills": LIVES * KILLS, "tokens-told": num_told, "wrong": 0, "every": EVERY,
        "most-generated-again": max(of for of, _ in lost),
        "most-generated-again-but-for-a-capture-in-flight": max(of - flying for of, flying in lost),
    }  # fmt: skip
    print(counts)
    soak_receipt(
        what=f"a small random Llama on transformers: four sessions decoding with a checkpoint every {EVERY} tokens, "
        f"{LIVES} times from the start, each killed with kill -9 {KILLS} times",
        held=f"no token differed from an undisturbed run's; of a request at most {EVERY} tokens (and {SLACK} until the "
        "checkpoint was begun) and those of one capture in flight were generated again",
        counts=counts,
    )
