"""`thaw bench vllm` with the least of everything, on real engines: every arm runs, hits are the engine's own counts.

No figure is asserted: this model is too small for one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from thaw import receipt as r
from thaw.bench import vllm as bench
from thaw.bench.vllm.options import MORE_PARTS

pytest.importorskip("vllm")

ARMS = {
    "live.300", "hydrate.300", "prefill.300", "fork.4.greedy", "native.4.greedy", "fork.4.seeded", "native.4.seeded",
    "native-logprobs.4.greedy", "native-logprobs.4.seeded", "native-own.4.seeded", "pressure.thaw.first",
    "pressure.native.first", "pressure.thaw", "pressure.native", "load.300", "save.300", "bus-in.300", "bus-out.300",
    "loaded.300.1", "load-and-there.300.1", "loaded.300.2", "load-and-there.300.2", "gap.none", "gap.admit",
    "gap.capture", "gap.hydrate",
}  # fmt: skip
PARTS = (*(bench.PARTS if "THAW_VLLM_BENCH_ALL" in os.environ else ("hydrate", "fork", "pressure")), *MORE_PARTS)
"""The idle connector needs a third vLLM: half a minute more."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def receipt(place: Path, tiny_model: Callable[..., Path]) -> r.Receipt:
    model = str(tiny_model("llama", dtype="bfloat16", head_dim=64))
    engine_options = {"model": model, "max_model_len": 1024}
    return bench.run(bench.quick(engine_options=engine_options, parts=PARTS, folder=place))


def hits(receipt: r.Receipt, name: str) -> list[r.Hits]:
    arm = receipt.arm(name)
    assert arm is not None
    return [found.hits for found in arm.rounds if found.hits is not None]


def test_every_arm_is_measured_and_the_receipt_verifies(receipt: r.Receipt) -> None:
    assert {arm.name for arm in receipt.arms} == ARMS | ({"idle", "stock"} if "idle" in PARTS else set())
    assert r.verify(r.dumps(receipt)).problems == ()


def test_promised_checks_hold(receipt: r.Receipt) -> None:
    promised = [check for check in receipt.checks if check.promised]
    assert len(promised) >= 8 and [check.name for check in promised if not check.held] == []


def test_a_session_hydrated_in_another_process_is_cached_and_one_prefilled_again_is_not(receipt: r.Receipt) -> None:
    (hydrated,), (again,) = hits(receipt, "hydrate.300"), hits(receipt, "prefill.300")
    assert hydrated.num_cached_tokens == hydrated.num_wanted_tokens == 299
    assert again.num_cached_tokens == 0 and again.num_prefilled_tokens == 304


def test_plain_requests_find_the_trunk_in_an_engine_with_room(receipt: r.Receipt) -> None:
    """So the arm that forks are compared with is vLLM's cache at its best: all of the trunk, nothing prefilled."""
    for name in (name for name in ARMS if name.startswith("native")):
        assert [found.num_cached_tokens for found in hits(receipt, name)] == [4 * 256]


def test_under_pressure_the_prefix_cache_loses_sessions_and_thaw_does_not(receipt: r.Receipt) -> None:
    """The control: at their first visits plain requests found every full block, so the pool is what takes them away."""
    assert {found.num_cached_tokens for found in hits(receipt, "pressure.native.first")} == {2 * 256}
    lost = [found.num_wanted_tokens - found.num_cached_tokens for found in hits(receipt, "pressure.native")]
    assert sum(missing > 2 * 44 for missing in lost) >= len(lost) // 2
    assert all(found.num_cached_tokens >= 2 * 299 for found in hits(receipt, "pressure.thaw"))


def test_seeded_children_are_those_of_the_plain_requests_with_their_seeds(receipt: r.Receipt) -> None:
    fork, plain = receipt.arm("fork.4.seeded"), receipt.arm("native.4.seeded")
    assert fork is not None and plain is not None
    assert fork.rounds[0].outputs["first_tokens"] == plain.rounds[0].outputs["first_tokens"]


def test_children_are_loaded_where_the_blocks_hold_nothing_of_their_session(receipt: r.Receipt) -> None:
    """The engine's own count: all of the session, or what follows its last full block where the KV is there."""
    for n in (1, 2):
        for arm, least, most in ((f"loaded.300.{n}", 299, 299 + 44), (f"load-and-there.300.{n}", 0, n * 44)):
            found = receipt.number(f"{arm}.loaded")
            assert found is not None and least <= found.value <= most


def test_nothing_is_left_and_no_path_is_told(receipt: r.Receipt, place: Path) -> None:
    assert list(place.iterdir()) == [] and "/tmp" not in r.dumps(receipt).decode()
