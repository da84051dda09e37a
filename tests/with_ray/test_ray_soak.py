"""Five hundred rounds on three Ray nodes while engines, keepers, nodes and raylets are killed. Twenty minutes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
from ray_cluster import LocalCluster
from ray_harm import BRANCHES, harmed_rounds, held

import thaw

SAMPLED = thaw.Sampling(temperature=0.9, max_tokens=24, ignore_eos=True)
LEAST = 0.2
"""Of the branches, on each of the three nodes; a third would be even."""


@pytest.mark.soak(
    "five hundred rounds with kills", receipt="ray-kills", covers=("src/thaw/cluster", "src/thaw/pool/backends")
)
@pytest.mark.skipif(not os.environ.get("THAW_SOAK"), reason="set THAW_SOAK=1 (or `make soak`)")
@pytest.mark.timeout(2 * 3600)
def test_five_hundred_rounds_on_three_nodes(three_nodes: LocalCluster, soak_receipt: Callable[..., None]) -> None:
    seed = random.getrandbits(30)
    found = harmed_rounds(three_nodes, 500, seed, SAMPLED)
    held(found, 500, seed, LEAST)
    soak_receipt(
        what=f"500 rounds of {BRANCHES} branches of the fake engine, with 3 workers on 3 Ray nodes of one machine. In "
        "two rounds of three an engine, a keeper, a node's daemon with its engines, or a raylet was killed (another "
        "raylet was started in its place)",
        held="each branch came once, equal in every bit to the undisturbed run; the bytes that daemons received were "
        "those that others had sent, and none stayed in Ray's object store; every node ran at least "
        f"{LEAST:.0%} of the branches",
        seed=seed, **found.said(),
    )  # fmt: skip
