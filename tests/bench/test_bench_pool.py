"""`thaw bench pool`: every arm measured, hits counted by the engine, outputs compared; on fake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from thaw import receipt as r
from thaw.bench import pool
from thaw.core.errors import InvalidRequest

ARMS = {
    "same.2", "native.2", "arena.2", "prefill.2", "edge-same.2", "edge-arena.2", "cold.2", "boot-pool", "boot-engine",
    "queue",
}  # fmt: skip


@pytest.fixture(scope="module")
def receipt(tmp_path_factory: pytest.TempPathFactory) -> r.Receipt:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("THAW_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return pool.run(pool.quick(engine="fake", goals=True))


def test_every_arm_is_measured_and_the_receipt_verifies(receipt: r.Receipt) -> None:
    assert {arm.name for arm in receipt.arms} == ARMS
    assert r.verify(r.dumps(receipt)).problems == ()
    queue = receipt.arm("queue")
    assert queue is not None and len(queue.rounds) == 3, "a row for each point"
    assert {goal.name for goal in receipt.goals} == {"same-native.2.total", "arena-prefill.2.total", "boot"}


def test_the_engine_counts_and_the_outputs_are_compared(receipt: r.Receipt) -> None:
    assert all(check.held for check in receipt.checks) and len(receipt.checks) == 10
    hits = {arm.name: arm.rounds[0].hits for arm in receipt.arms}
    arena, prefill = hits["arena.2"], hits["prefill.2"]
    assert arena is not None and arena.num_cached_tokens >= arena.num_wanted_tokens > 0
    assert arena.num_prefilled_tokens == 2 * 4, "the suffixes alone"
    assert prefill is not None and prefill.num_prefilled_tokens == 300 + 2 * 4
    moved = receipt.arm("arena.2")
    assert moved is not None and moved.rounds[0].values["nbytes"] > 0 and moved.rounds[0].stages_s["hydrate"] > 0


def test_every_round_of_boots_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("THAW_CACHE_DIR", str(tmp_path))
    kept: list[r.Receipt] = []
    options = pool.quick(engine="fake", parts=("boot",), boot_rounds=2)
    whole = pool.run(options, so_far=kept.append)
    assert [len(one.arms[0].rounds) for one in kept] == [1, 2]
    assert kept[1].arms == whole.arms and all(r.verify(r.dumps(one)).problems == () for one in kept)


def test_options_that_cannot_be_are_refused() -> None:
    for wrong in ({"parts": ("round", "round")}, {"parts": ("x",)}, {"rounds": 0}, {"branches": (0,)}):
        with pytest.raises(InvalidRequest):
            pool.PoolBenchOptions(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="fake not"):
        pool.PoolBenchOptions(engine="fake", parts=("pressure",))
    with pytest.raises(InvalidRequest, match="limit"):
        pool.run(pool.quick(engine="fake", engine_options={"max_model_len": 128}))


def test_the_command_writes_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "thaw.cli", "bench", "pool", "--engine", "fake", "--quick", "--only", "round", "--out",
         "pool.json"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "THAW_CACHE_DIR": str(tmp_path)}, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = r.verify((tmp_path / "pool.json").read_bytes())
    assert found.problems == () and "promised checks held" in done.stdout


def test_under_pressure_there_is_room_for_a_third_of_the_points_or_for_one_round() -> None:
    many = pool.PoolBenchOptions(pressure_points=24, pressure_trunk=1032, engine_options={"block_size": 16})
    assert many.few_blocks() == {"block_size": 16, "max_model_len": 1044, "num_gpu_blocks_override": 24 * 65 // 3 + 1}
    few = pool.PoolBenchOptions(pressure_points=2, pressure_trunk=1032, pressure_branches=16)
    assert few.few_blocks()["num_gpu_blocks_override"] == 9 + 16 + 1, "the point, and a block of each branch's own"
