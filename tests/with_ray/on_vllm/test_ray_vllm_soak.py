"""Rounds of real vLLMs on three Ray nodes while engines, keepers, nodes and raylets are killed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import cluster_of, nodes_of
from ray_harm import disturb_nodes, documents, held

import thaw
from thaw.pool import ForkPool
from thaw.testing.pool_soak import undisturbed

for package in ("vllm", "ray"):
    pytest.importorskip(package)

SAMPLED = thaw.Sampling(temperature=0.9, max_tokens=24, ignore_eos=True)
BRANCHES, ROUNDS = 4, 20


@pytest.mark.soak(
    "twenty rounds of vLLM with kills", receipt="ray-kills-vllm", covers=("src/thaw/cluster", "src/thaw/pool/backends")
)
@pytest.mark.skipif(not os.environ.get("THAW_SOAK"), reason="set THAW_SOAK=1 (or `make soak`)")
@pytest.mark.timeout(2 * 3600)
def test_twenty_rounds_on_three_nodes_come_as_in_a_local_pool(
    vllm_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, soak_receipt: Callable[..., None]
) -> None:
    monkeypatch.setenv("THAW_CACHE_DIR", str(tmp_path / "cache"))
    seed = random.getrandbits(30)
    with ForkPool("vllm", workers=1, **vllm_options) as local:
        reference = undisturbed(local, documents(local), BRANCHES, SAMPLED)
        other = undisturbed(local, documents(local, left_out=1), BRANCHES, SAMPLED)
    assert all(one != two for one, two in zip(reference, other, strict=True)), "the control: a token less, other bits"
    with cluster_of(3) as cluster, cluster.pool("vllm", workers=3, **vllm_options) as pool:
        assert len(nodes_of(pool)) == 3
        found = disturb_nodes(
            cluster, pool, documents(pool), reference, SAMPLED, rounds=ROUNDS, seed=seed, delay_s=1.0, settled=1.0
        )
    print(seed, found.said())
    held(found, ROUNDS, seed, least=0.05)
    soak_receipt(
        what=f"{ROUNDS} rounds of {BRANCHES} branches of vLLM on the CPU, with a worker on each of 3 Ray nodes of one "
        "machine. In two rounds of three an engine, a keeper, a node's daemon with its engines, or a raylet was killed "
        "(another raylet was started in its place)",
        held="each branch came once, equal in every bit to a local pool's; the bytes that daemons received were those "
        "that others had sent, and none stayed in the object store of Ray; each node ran a twentieth of the branches "
        "or more",
        seed=seed, **found.said(),
    )  # fmt: skip
