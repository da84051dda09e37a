"""Nodes, keepers and engines killed while rounds run, and all of Ray: nothing is lost, nothing is answered twice."""

from __future__ import annotations

import contextlib
import random
import socket
import time

import pytest
from ray_cluster import LocalCluster, cluster_of, counts, nodes_of
from ray_harm import disturb_nodes, held

import thaw
from thaw.testing.laws.pool_kit import TEXT, bits
from thaw.testing.pool_soak import undisturbed

SAMPLED = thaw.Sampling(temperature=0.9, max_tokens=24, ignore_eos=True)
BRANCHES, ROUNDS = 4, 30


@pytest.mark.slow("thirty rounds with kills")
@pytest.mark.timeout(1800)
def test_thirty_rounds_on_three_nodes_come_as_undisturbed_ones(three_nodes: LocalCluster) -> None:
    seed = random.getrandbits(30)
    with three_nodes.pool(workers=3, retries=8) as pool:
        assert len(nodes_of(pool)) == 3
        points = []
        for number in range(3):
            session = pool.session(seed=number)
            session.append(f"Document {number}. " * 30)
            points.append(pool.snapshot(session))
            session.close()
        reference = undisturbed(pool, points, BRANCHES, SAMPLED)
        soak, traffic = disturb_nodes(three_nodes, pool, points, reference, SAMPLED, rounds=ROUNDS, seed=seed)
    print(seed, dict(soak.counts), traffic.counted())
    held(soak, traffic, ROUNDS, seed)


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
