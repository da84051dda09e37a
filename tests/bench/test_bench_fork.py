"""`thaw bench fork`: every arm measured, hits counted by the engine, outputs compared; on fake, and once for real."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from thaw import receipt as r
from thaw.bench import fork, text
from thaw.bench.fork import fresh
from thaw.bench.fork.fresh import FreshJob
from thaw.core.errors import EngineDied, InvalidRequest

ARMS = {
    "live.1", "live.4", "hydrate-warm.1", "hydrate-warm.4", "hydrate-cold.1", "hydrate-fresh.1", "hydrate-fresh.4",
    "prefill-warm.1", "prefill-warm.4", "prefill-fresh.1", "prefill-fresh.4", "hydrate-read", "plain-read",
    "commit-write", "plain-write", "pack-write", "file-write", "pack-read", "file-read", "disk", "memory",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def receipt(place: Path) -> r.Receipt:
    said: list[str] = []
    made = fork.run(fork.quick(folder=place), said.append)
    assert any("round 2 of 2" in line for line in said)
    return made


def test_every_arm_is_measured_and_the_receipt_verifies(receipt: r.Receipt) -> None:
    assert {arm.name for arm in receipt.arms} == ARMS
    assert r.verify(r.dumps(receipt)).problems == ()


def test_restored_sessions_hit_and_prefilled_ones_do_not(receipt: r.Receipt) -> None:
    for name in ("live.4", "hydrate-warm.4", "hydrate-fresh.4"):
        arm = receipt.arm(name)
        assert arm is not None
        for measured in arm.rounds:
            assert measured.hits is not None
            assert measured.hits.num_cached_tokens == measured.hits.num_wanted_tokens == 4 * 600
            assert measured.hits.num_prefilled_tokens <= 4 * 4
    again = receipt.arm("prefill-warm.1")
    assert again is not None and again.rounds[0].hits is not None
    assert again.rounds[0].hits.num_prefilled_tokens >= 600


def test_outputs_equal_the_live_forks_in_every_arm(receipt: r.Receipt) -> None:
    promised = [check for check in receipt.checks if check.promised]
    assert len(promised) > 15 and all(check.held for check in promised)
    outputs = {a.name: a.rounds[0].outputs["logprobs"] for a in receipt.arms if a.rounds[0].outputs}
    assert len({digest for name, digest in outputs.items() if name.endswith(".4")}) == 1


def test_ratios_are_of_paired_rounds(receipt: r.Receipt) -> None:
    gain = receipt.number("gain.hydrate")
    assert gain is not None and gain.num_rounds == 2 and gain.low <= gain.value <= gain.high
    fresh_gain = receipt.number("gain.fresh")
    assert fresh_gain is not None and fresh_gain.num_rounds == 1


def test_fresh_processes_report_their_stages(receipt: r.Receipt) -> None:
    arm = receipt.arm("hydrate-fresh.1")
    assert arm is not None
    stages = arm.rounds[0].stages_s
    assert {"start", "boot", "open", "identity", "hydrate", "fork", "first_token"} <= set(stages)
    assert sum(stages.values()) == pytest.approx(arm.rounds[0].values["total_s"], rel=0.05)


def test_the_receipt_says_no_path_and_the_folder_is_left_empty(receipt: r.Receipt, place: Path) -> None:
    written = r.dumps(receipt).decode()
    assert str(place) not in written and str(Path.home()) not in written and "/tmp" not in written
    assert list(place.iterdir()) == []


def test_the_same_command_gives_the_same_outputs(receipt: r.Receipt) -> None:
    again = fork.run(fork.quick(rounds=1, fresh_rounds=0, disk_children=0))
    one, other = again.arm("live.4"), receipt.arm("live.4")
    assert one is not None and other is not None
    assert one.rounds[0].outputs["tokens"] == other.rounds[0].outputs["tokens"]


def test_options_out_of_range_and_documents_too_long_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="rounds=0"):
        fork.quick(rounds=0, fresh_rounds=0)
    with pytest.raises(InvalidRequest, match="fresh_rounds=3"):
        fork.quick(fresh_rounds=3)
    with pytest.raises(InvalidRequest, match="room for"):
        fork.run(fork.quick(engine_options={"max_model_len": 500}))


def test_a_fresh_process_that_fails_says_what_it_met(tmp_path: Path) -> None:
    job = FreshJob(what="hydrate", engine="fake", engine_options={}, repository=str(tmp_path), commit="b3:" + "0" * 64)
    with pytest.raises(EngineDied, match="NotFound"):
        fresh.run(job, 60.0)


def test_the_built_in_document_does_not_repeat() -> None:
    sentences = re.split(r" (?=\d+\. )", text.document(2000))
    assert len(set(sentences)) == len(sentences) == 2000
    assert text.document(50) == text.document(50)


def test_importing_the_bench_loads_no_torch() -> None:
    code = "import sys, thaw.bench.fork, thaw.bench.plot, thaw.doctor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_real_model_restores_bit_for_bit(demo_model: Path, tmp_path: Path) -> None:
    """No timing is asserted here beyond the plainest: a load is sooner than a prefill."""
    options = fork.quick("transformers", engine_options={"model": str(demo_model)}, folder=tmp_path, num_tokens=1200)
    receipt = fork.run(options)
    assert r.verify(r.dumps(receipt)).problems == ()
    assert all(check.held for check in receipt.checks if check.promised)
    assert {"prefill-stock.1", "memory", "disk"} <= {arm.name for arm in receipt.arms}
    gain, memory = receipt.number("gain.hydrate"), receipt.arm("memory")
    assert gain is not None and gain.value > 2
    assert memory is not None and memory.rounds[0].values["extra_long_nbytes"] < 8 << 20
    assert str(demo_model.parent) not in r.dumps(receipt).decode()
