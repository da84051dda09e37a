"""Nodes, keepers and engines killed while rounds run, and all of Ray: nothing is lost, nothing is answered twice."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import time

import pytest
from ray_cluster import LocalCluster, cluster_of, counts, end_node, keepers, nodes_of

import thaw
from thaw.pool import ForkPool, Snapshot
from thaw.testing.laws.pool_kit import TEXT, bits
from thaw.testing.pool_soak import Soak, undisturbed
from thaw.testing.pool_soak import bits as bits_of

SAMPLED = thaw.Sampling(temperature=0.9, max_tokens=24, ignore_eos=True)
BRANCHES, ROUNDS = 4, 30
HARMS = ("engine", "keeper", "node", "raylet", "none", "none")


@pytest.mark.slow("thirty rounds with kills")
def test_thirty_rounds_on_three_nodes_come_as_undisturbed_ones(three_nodes: LocalCluster) -> None:
    draw = random.Random(seed := random.getrandbits(30))
    with three_nodes.pool(workers=3, retries=8) as pool:
        assert len(nodes_of(pool)) == 3
        points = []
        for number in range(3):
            session = pool.session(seed=number)
            session.append(f"Document {number}. " * 30)
            points.append(pool.snapshot(session))
            session.close()
        reference = undisturbed(pool, points, BRANCHES, SAMPLED)
        soak = Soak()
        received = Received()
        for number in range(ROUNDS):
            disturbed_round(three_nodes, pool, points, reference, draw, soak, number)
            received.look(pool)
        print(seed, dict(soak.counts), received.by_daemon)
        assert soak.wrong == [], (seed, soak.wrong[:5])
        assert soak.counts["equal"] == BRANCHES * ROUNDS and soak.counts["answered twice"] == 0
        assert soak.counts["node"] + soak.counts["engine"] + soak.counts["raylet"] > 0
        assert sum(received.by_daemon.values()) > 0, "KV went from daemon to daemon, by their sockets"
        assert pool._backend.nodes.object_store_nbytes() == 0  # type: ignore[attr-defined]


class Received:
    """Bytes of KV that each daemon has received, by its pid. One that was killed takes its counts along, so they are
    looked at after every round."""

    def __init__(self) -> None:
        self.by_daemon: dict[int, int] = {}

    def look(self, pool: ForkPool) -> None:
        with contextlib.suppress(thaw.ThawError):  # a daemon that was just killed
            self.by_daemon.update({one.pid: one.received_nbytes for one in counts(pool).values()})


def disturbed_round(
    cluster: LocalCluster, pool: ForkPool, points: list[Snapshot], reference: list[list[object]], draw: random.Random,
    soak: Soak, number: int,
) -> None:  # fmt: skip
    which, harm = draw.randrange(len(points)), draw.choice(HARMS)
    round_ = pool.submit(points[which], BRANCHES, SAMPLED, spread=draw.choice((1, 2)), keep=False)
    doing = threading.Timer(draw.random() * 0.3, do_harm, (cluster, pool, harm, soak))
    doing.start()
    results = round_.result(300, errors="return")
    doing.join()
    if harm == "raylet":
        cluster.add()  # another node on the same machine: the daemon there is its own from now on
    soak.counts["answered twice"] += round_.num_dropped
    for result, expected in zip(results, reference[which], strict=True):
        if result.error is not None:
            soak.wrong.append(f"round {number}, {harm}: branch {result.index} failed: {result.error}")
        elif bits_of(result) != expected:
            soak.wrong.append(f"round {number}, {harm}: branch {result.index} differs")
        else:
            soak.counts["equal"] += 1


def do_harm(cluster: LocalCluster, pool: ForkPool, harm: str, soak: Soak) -> None:
    workers = {w.name: w.pid for w in pool.stats().workers if w.pid is not None}
    far = [node for node in nodes_of(pool) if not node.is_home]
    with contextlib.suppress(ProcessLookupError, IndexError):
        if harm == "engine" and workers:
            os.kill(next(iter(workers.values())), signal.SIGKILL)
        elif harm == "keeper":
            os.kill(keepers(cluster)[0], signal.SIGKILL)
        elif harm == "node":
            end_node(far[0], [one for key, one in pids_on(pool, far[0].key) if key in workers])
        elif harm == "raylet":
            left = [node for node in cluster.ray.list_all_nodes() if not node.head]
            cluster.ray.remove_node(left[0], allow_graceful=False)
        soak.counts[harm] += 1


def pids_on(pool: ForkPool, key: str) -> list[tuple[str, int]]:
    found = []
    for worker in list(pool._fleet.workers):
        life = worker.life
        if life is not None and life.host.node.key == key and life.host.pid is not None:  # type: ignore[attr-defined]
            found.append((worker.name, life.host.pid))
    return found


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
