"""Three vLLMs on three Ray nodes, and what runs there killed: no branch lost, none answered twice, equal bits."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from ray_cluster import LocalCluster, nodes_of
from ray_harm import HELD, disturb_nodes, held

import thaw
from thaw.testing.pool_soak import undisturbed

pytest.importorskip("vllm")

SAMPLED = thaw.Sampling(temperature=0.9, max_tokens=24, ignore_eos=True)
ROUNDS, BRANCHES = 20, 4


@pytest.mark.soak(
    "twenty rounds of three vLLMs with kills",
    receipt="ray-soak-vllm",
    covers=("src/thaw/cluster", "src/thaw/pool", "src/thaw/engines/vllm", "src/thaw/engines/served", "src/thaw/data"),
)
@pytest.mark.skipif(not os.environ.get("THAW_SOAK"), reason="set THAW_SOAK=1 (or `make soak`)")
@pytest.mark.timeout(3 * 3600)
def test_twenty_rounds_on_three_nodes_come_as_undisturbed_ones(
    three_nodes: LocalCluster, vllm_options: dict[str, Any], soak_receipt: Callable[..., None]
) -> None:
    seed = random.getrandbits(30)
    with three_nodes.pool("vllm", workers=3, **vllm_options) as pool:
        assert len(nodes_of(pool)) == 3
        points = []
        for number in range(3):
            session = pool.session(seed=number)
            session.append(f"Document {number} of the soak. " * 40)
            points.append(pool.snapshot(session))
            session.close()
        reference = undisturbed(pool, points, BRANCHES, SAMPLED)
        soak, traffic = disturb_nodes(
            three_nodes, pool, points, reference, SAMPLED, rounds=ROUNDS, seed=seed, delay_s=1.0
        )  # fmt: skip
    print(seed, dict(soak.counts), traffic.counted())
    held(soak, traffic, ROUNDS, seed)
    soak_receipt(
        what=f"{ROUNDS} rounds of {BRANCHES} branches of vLLM on three Ray nodes of one machine, an engine on each, "
        "under random kill -9 of engines, keepers, raylets, and nodes with all that ran there",
        held=HELD,
        seed=seed, counts=soak.counts, sockets=traffic.counted(),
    )  # fmt: skip
