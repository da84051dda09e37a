"""vLLM with checkpoints, killed again and again: no token is wrong, and few are generated again.

In float32 and on one core, as in `test_whole_vllm.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import snapshot_worker as worker
from whole_engine import differences, killed_lives

import thaw

pytest.importorskip("vllm")

OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 64}
PROMPT = "The river is long and slow, and nobody knows its name."
KILLS = 10
EVERY, SLACK = 8, 4


@pytest.mark.soak(
    "boots eleven engines",
    receipt="vllm-whole-engine-kills",
    covers=(
        "src/thaw/snapshot",
        "src/thaw/engines/vllm",
        "src/thaw/engines/served",
        "src/thaw/data",
        "tests/snapshot/whole_engine.py",
        "tests/snapshot/snapshot_worker.py",
    ),
)
@pytest.mark.timeout(3600)
def test_after_kills_of_vllm_no_token_is_wrong_and_few_were_generated_again(
    demo_model: Path, tmp_path: Path, soak_receipt: Callable[..., None]
) -> None:
    plan = {
        "engine": "vllm", "options": {**OPTIONS, "model": str(demo_model)}, "slow": {}, "prompt": PROMPT,
        "max_num_seqs": 4, "num_requests": 4, "num_parked": 1, "max_tokens": 800, "every": EVERY,
    }  # fmt: skip
    chance = random.Random(5)
    waits = [chance.uniform(0.0, 3.0) for _ in range(KILLS)]
    told, lost = killed_lives({**plan, "folder": str(tmp_path / "r")}, tmp_path, waits, SLACK)
    assert len(told) == 4 and min(map(len, told.values())) >= KILLS * EVERY
    assert all(of - flying <= EVERY + SLACK for of, flying in lost)
    with thaw.open(tmp_path / "r", create=False) as repo:
        assert repo.fsck().ok and repo.log(all=True) == []
    longest = max(map(len, told.values()))
    with worker.engine_of(plan) as engine:
        whole = worker.undisturbed(tmp_path / "whole", {**plan, "max_tokens": longest + 1}, engine)
    tokens = {id: whole[id][: len(of)] for id, of in told.items()}
    assert differences(told, tokens) == {}
    changed = {id: [*of[:-1], of[-1] ^ 1] for id, of in tokens.items()}
    assert differences(told, changed) == {id: len(of) - 1 for id, of in told.items()}  # it would have been seen
    counts = {
        "kills": KILLS, "tokens-of-four-requests": sum(map(len, told.values())), "wrong": 0, "every": EVERY,
        "most-generated-again": max(of for of, _ in lost),
        "most-generated-again-but-for-a-capture-in-flight": max(of - flying for of, flying in lost),
    }  # fmt: skip
    print(counts)
    soak_receipt(
        what=f"SmolLM2-135M on vLLM, float32, one core: four sessions decoding with a checkpoint every {EVERY} tokens, "
        f"killed with kill -9 {KILLS} times",
        held=f"no token differed from an undisturbed run's; of a request at most {EVERY} tokens (and {SLACK} until the "
        "checkpoint was begun) and those of one capture in flight were generated again",
        counts=counts,
    )
