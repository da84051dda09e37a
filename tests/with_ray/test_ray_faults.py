"""Nodes, keepers and engines killed while rounds run, and all of Ray: nothing is lost, nothing is answered twice."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import time
from collections import Counter
from pathlib import Path

import pytest
from ray_cluster import LocalCluster, cluster_of, counts, devices, in_group, keepers, lives, nodes_of, pid_of, until
from ray_driver import RayDriver
from ray_harm import harmed_rounds, held
from ray_placing import as_before

import thaw
from thaw.cluster import nodes as placing
from thaw.cluster.node import ClusterNode
from thaw.pool import ForkPool
from thaw.store.leases import start_time
from thaw.testing.laws.pool_kit import TEXT, bits

SAMPLED = thaw.Sampling(temperature=0.9, max_tokens=24, ignore_eos=True)


@pytest.mark.slow("thirty rounds with kills")
@pytest.mark.timeout(1800)
def test_thirty_rounds_on_three_nodes_come_as_undisturbed_ones(three_nodes: LocalCluster) -> None:
    seed = random.getrandbits(30)
    held(harmed_rounds(three_nodes, 30, seed, SAMPLED), 30, seed)


def places(pool: ForkPool) -> dict[str, ClusterNode]:
    """Of the workers that are ready."""
    found = {name: pool._fleet.named(name).life for name in pool.workers}
    return {name: life.host.node for name, life in found.items() if life is not None}  # type: ignore[attr-defined]


def boot_again(pool: ForkPool, worker: str) -> None:
    before = pid_of(pool, worker)
    os.kill(before, signal.SIGKILL)
    until(lambda: lives(pool, worker, before))


def crowd(pool: ForkPool) -> list[str]:
    """The workers of the node that has most of them."""
    found = places(pool)
    most = Counter(found.values()).most_common(1)[0][0]
    return sorted(name for name, one in found.items() if one is most)


@pytest.mark.slow("a Ray cluster of three nodes, one of which leaves and comes back")
def test_a_node_that_joins_again_takes_workers_at_their_next_boot(
    three_nodes: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    with three_nodes.pool(workers=3, retries=8, cluster={"lease_s": 3.0}) as pool:
        assert len(set(places(pool).values())) == 3
        session = pool.session(seed=7)
        session.append(TEXT)
        snapshot = pool.snapshot(session)
        expected = bits(pool.fork(snapshot, 3, SAMPLED, keep=False))
        machine = next(one for one in three_nodes.ray.list_all_nodes() if not one.head)
        worker, left = next((name, one) for name, one in places(pool).items() if one.ray_id == machine.node_id)
        three_nodes.ray.remove_node(machine, allow_graceful=False)
        until(lambda: not left.listed)
        assert bits(pool.fork(snapshot, 3, SAMPLED, worker=worker, keep=False)) == expected, "what runs there goes on"
        assert left in nodes_of(pool)
        boot_again(pool, worker)
        assert len(crowd(pool)) == 2, "two workers share a node while there are only two nodes"
        assert left.daemon is not None
        until(lambda pid=left.daemon.pid: start_time(pid) is None)  # type: ignore[misc]
        assert left not in nodes_of(pool), "and what no worker runs on ends with its lease"
        assert not Path(left.daemon.folder).exists()

        joined = three_nodes.add().node_id  # type: ignore[attr-defined]
        nodes = pool._backend.nodes  # type: ignore[attr-defined]
        until(lambda: any(one.ray_id == joined for one in nodes.all()))
        with monkeypatch.context() as patch:
            patch.setattr(placing, "chosen", as_before)
            boot_again(pool, crowd(pool)[0])
            assert len(crowd(pool)) == 2, "the control: booted where it was, it leaves the new node empty"
        moved = crowd(pool)[0]
        boot_again(pool, moved)
        found = places(pool)
        assert found[moved].ray_id == joined and len(set(found.values())) == 3
        name, why = pool._backend.placed[-1]  # type: ignore[attr-defined]
        assert name == moved and why.node is found[moved] and "where it was, has 1" in why.reason
        for one in pool.workers:
            assert bits(pool.fork(snapshot, 3, SAMPLED, worker=one, keep=False)) == expected

        pids = {one: pid_of(pool, one) for one in pool.workers}
        again = next(one for one in three_nodes.ray.list_all_nodes() if one.node_id == joined)
        three_nodes.ray.remove_node(again, allow_graceful=False)
        other = three_nodes.add().node_id  # type: ignore[attr-defined]
        until(lambda: all(one.ray_id != joined for one in nodes.all()))
        assert found[moved].ray_id == other, "a raylet that is started again at once finds its machine's daemon"
        assert len(nodes_of(pool)) == len(nodes.all()) == 3
        assert {one: pid_of(pool, one) for one in pool.workers} == pids


@pytest.mark.slow("a Ray cluster of three nodes, one of which is lost")
def test_a_bundle_that_ray_moves_takes_its_worker_along_when_that_is_booted_again(three_nodes: LocalCluster) -> None:
    """A raylet dies: its engine goes on where it is, and the bundle is placed on another node."""
    driver = RayDriver(three_nodes.address)
    try:
        driver.group("moved", {"GPU": 1}, {"GPU": 1}, strategy="STRICT_SPREAD")
        with in_group(three_nodes, "moved", 2) as pool:
            session = pool.session(seed=7)
            session.append(TEXT)
            expected, before = bits(pool.fork(session, 2, SAMPLED, snapshot="before")), devices(pool)
            pids = {worker: pid_of(pool, worker) for worker in pool.workers}
            ids = [pool._fleet.named(one).life.host.node.ray_id for one in pool.workers]  # type: ignore[union-attr]
            left = [one for one in three_nodes.ray.list_all_nodes() if not one.head and one.node_id in ids]
            three_nodes.ray.remove_node(left[0], allow_graceful=False)
            for worker in pool.workers:
                assert bits(pool.fork(session, 2, SAMPLED, worker=worker)) == expected
            assert {worker: pid_of(pool, worker) for worker in pool.workers} == pids, "nothing was booted"
            worker = pool.workers[ids.index(left[0].node_id)]
            until(lambda: len(keepers(three_nodes, "BundleKeeper")) == 2)
            os.kill(pids[worker], signal.SIGKILL)
            until(lambda: lives(pool, worker, pids[worker]))
            found = devices(pool)
            assert found[worker][0] != before[worker][0] and len(set(found.values())) == 2, (before, found)
            assert bits(pool.fork(session, 2, SAMPLED, worker=worker)) == expected
    finally:
        driver.close()
        three_nodes.add()


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
