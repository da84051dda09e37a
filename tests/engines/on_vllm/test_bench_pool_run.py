"""`thaw bench pool`'s part that is of vLLM alone: more points than the KV pool holds. No figure is asserted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from thaw import receipt as r
from thaw.bench import pool as bench

pytest.importorskip("vllm")
pytestmark = pytest.mark.soak(
    "two engines and six rounds on each",
    receipt="vllm-bench-pool-pressure",
    covers=("src/thaw/bench/pool", "src/thaw/pool", "src/thaw/engines/vllm", "src/thaw/engines/served"),
)


@pytest.fixture(scope="module")
def receipt(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> r.Receipt:
    model = str(tiny_model("llama", dtype="bfloat16", head_dim=64))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("THAW_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        options = {"model": model, "enforce_eager": True}
        return bench.run(bench.quick(engine="vllm", engine_options=options, parts=("pressure",)))


def test_a_pool_prefills_nothing_again_where_vllms_cache_has_lost_it(receipt: r.Receipt) -> None:
    (ours,), (native,) = (receipt.arm(name).rounds for name in ("pressure", "pressure-native"))  # type: ignore[union-attr]
    assert ours.hits is not None and ours.hits.num_cached_tokens == ours.hits.num_wanted_tokens == 5 * 2 * 259
    assert ours.values["recomputed"] == 0 < native.values["recomputed"], "else nothing was under pressure"


def test_returns_have_the_bits_of_the_first_rounds(receipt: r.Receipt) -> None:
    assert r.verify(r.dumps(receipt)).problems == ()
    promised = [check for check in receipt.checks if check.promised]
    assert len(promised) == 5 and [check.name for check in promised if not check.held] == []
