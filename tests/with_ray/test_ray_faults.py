"""Nodes, keepers and engines killed while rounds run, and all of Ray: nothing is lost, nothing is answered twice."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections.abc import Callable

import pytest
from ray_cluster import LocalCluster, cluster_of, counts, nodes_of
from ray_harm import Harmed, disturb_nodes, documents, held

import thaw
from thaw.testing.laws.pool_kit import TEXT, bits
from thaw.testing.pool_soak import undisturbed

SAMPLED = thaw.Sampling(temperature=0.9, max_tokens=24, ignore_eos=True)
BRANCHES = 6
LEAST = 0.2
"""Of the soak's branches, on each of three nodes; a third would be even."""


def harmed_rounds(cluster: LocalCluster, rounds: int, seed: int) -> Harmed:
    with cluster.pool(workers=3, retries=8) as pool:
        assert len(nodes_of(pool)) == 3
        points = documents(pool)
        reference = undisturbed(pool, points, BRANCHES, SAMPLED)
        found = disturb_nodes(cluster, pool, points, reference, SAMPLED, rounds=rounds, seed=seed)
    print(seed, found.said())
    return found


@pytest.mark.slow("thirty rounds with kills")
@pytest.mark.timeout(1800)
def test_thirty_rounds_on_three_nodes_come_as_undisturbed_ones(three_nodes: LocalCluster) -> None:
    seed = random.getrandbits(30)
    held(harmed_rounds(three_nodes, 30, seed), 30, seed)


@pytest.mark.soak(
    "five hundred rounds with kills", receipt="ray-kills", covers=("src/thaw/cluster", "src/thaw/pool/backends")
)
@pytest.mark.skipif(not os.environ.get("THAW_SOAK"), reason="set THAW_SOAK=1 (or `make soak`)")
@pytest.mark.timeout(2 * 3600)
def test_five_hundred_rounds_on_three_nodes(three_nodes: LocalCluster, soak_receipt: Callable[..., None]) -> None:
    seed = random.getrandbits(30)
    found = harmed_rounds(three_nodes, 500, seed)
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


@pytest.mark.slow("all of Ray is ended and started again")
def test_rays_end_costs_no_result_and_no_boot() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    with contextlib.ExitStack() as stack:
        with cluster_of(2, port) as cluster:
            pool = stack.enter_context(cluster.pool(workers=2))
            session = pool.session(seed=7)
            session.append(TEXT)
            done = pool.fork(session, 4, SAMPLED, snapshot="before")
            workers = [(w.name, w.pid, w.incarnation) for w in pool.stats().workers]
        nodes = pool._backend.nodes  # type: ignore[attr-defined]
        assert all(result.ok and result.text for result in done), "what was received stays"
        for worker in pool.workers:
            assert bits(pool.fork(session, 4, SAMPLED, worker=worker)) == bits(done), "and rounds go on"
        with cluster_of(2, port):
            ends = time.monotonic() + 150
            while nodes.num_joins < 2 or not all(node.kept for node in nodes_of(pool)):
                assert time.monotonic() < ends
                time.sleep(0.2)
            asked = nodes.num_calls
            assert len(counts(pool)) == 2 and nodes.num_calls == asked + 2, "the keepers found the daemons that run"
            assert bits(pool.fork(session, 4, SAMPLED)) == bits(done)
            assert [(w.name, w.pid, w.incarnation) for w in pool.stats().workers] == workers, "0 boots"
