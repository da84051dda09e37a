"""Workers are spread over the nodes, and spread again once a node that was lost is back."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from ray_cluster import LocalCluster, nodes_of, pid_of

import thaw
from thaw.cluster import nodes as placing
from thaw.cluster.node import ClusterNode
from thaw.cluster.placement import MAX_TRIES, Placement, allowed, chosen
from thaw.pool import ForkPool
from thaw.store.leases import start_time
from thaw.testing.laws.pool_kit import TEXT, bits

SAMPLED = thaw.Sampling(temperature=0.9, max_tokens=16, ignore_eos=True)
Rule = Callable[..., Placement | None]


def node(name: str, *, gpus: float = 0.0, cpus: float = 1.0, home: bool = False) -> ClusterNode:
    return ClusterNode(name, name, name, {}, home, gpus=gpus, cpus=cpus)


def filled(nodes: list[ClusterNode], workers: int, pool: str = "pool") -> list[int]:
    """How many workers each node has when so many were placed one after another."""
    for _ in range(workers):
        found = chosen(nodes, pool, None, {})
        assert found is not None
        found.node.workers[pool] += 1
    return [one.workers[pool] for one in nodes]


def as_before(nodes: list[ClusterNode], pool: str, before: ClusterNode | None, tried: Counter[ClusterNode]) -> object:
    """The control: a worker stays where it was, if it can."""
    if before in nodes and before is not None and not tried[before]:
        return Placement(before, "the control")
    return chosen(nodes, pool, before, tried)


def test_workers_are_shared_out_by_what_the_nodes_have() -> None:
    assert filled([node("a", gpus=8), node("b", gpus=4), node("c", cpus=64)], 12) == [8, 4, 0]
    assert filled([node("a", cpus=32), node("b", cpus=16), node("c", cpus=0)], 9) == [6, 3, 0]
    assert filled([node("a", cpus=0), node("b", cpus=0)], 4) == [2, 2], "the control: nothing tells them apart"
    assert filled([node("a"), node("b", home=True)], 1) == [0, 1], "the client's node first"


def test_a_worker_stays_where_it_was_only_if_no_node_has_fewer() -> None:
    a, b, c = nodes = [node("a", home=True), node("b"), node("c")]
    a.workers["pool"] = b.workers["pool"] = 1
    found = chosen(nodes, "pool", b, {})
    assert found is not None and found.node is c
    assert found.reason == "c: 0 of this pool's workers on 1 CPUs, the fewest of 3 nodes. b, where it was, has 1"
    b.workers["pool"] = 0
    found = chosen(nodes, "pool", b, {})
    assert found is not None and found.node is b and "b, where it was: 0 of this pool's workers" in found.reason
    b.lost = True
    found = chosen(allowed(nodes, {}), "pool", b, {})
    assert found is not None and found.node is c and found.reason.endswith("b, where it was, is gone")


def test_workers_of_other_pools_count_where_a_pools_own_are_equal() -> None:
    nodes = [node("a", home=True), node("b"), node("c")]
    nodes[0].workers["other"] = nodes[2].workers["other"] = 1
    assert filled(nodes, 1) == [0, 1, 0]
    assert filled(nodes, 2) == [1, 1, 1], "and its own count first"


def test_a_node_that_fails_is_tried_after_the_others_and_not_for_ever() -> None:
    nodes, tried, order = [node("a", home=True), node("b")], Counter[ClusterNode](), []
    while (found := chosen(nodes, "pool", None, tried)) is not None:
        tried[found.node] += 1
        order.append(found.node.key)
    assert order == ["a", "b"] * MAX_TRIES


@pytest.mark.parametrize("rule", [chosen, as_before])
def test_workers_do_not_gather_where_nodes_come_and_go(rule: Rule) -> None:
    """Nodes go, with their workers, and come back; then every worker is booted once more. The control gathers them."""
    gathered = 0
    for seed in range(50):
        draw, nodes = random.Random(seed), [node("home", home=True), node("b"), node("c")]
        where = {worker: one for worker, one in enumerate(nodes)}
        for one in nodes:
            one.workers["pool"] = 1
        for _ in range(20):
            gone = draw.choice(nodes[1:])
            gone.away = 1.0
            for worker in [worker for worker, one in where.items() if one is gone]:
                boot(worker, where, nodes, rule)
            gone.away = None
        for worker in where:
            boot(worker, where, nodes, rule)
        gathered += max(Counter(where.values()).values()) > 1
    assert (gathered == 0) == (rule is chosen), gathered


def boot(worker: int, where: dict[int, ClusterNode], nodes: list[ClusterNode], rule: Rule) -> None:
    where[worker].workers["pool"] -= 1
    found = rule([one for one in nodes if one.listed], "pool", where[worker], Counter())
    assert found is not None
    where[worker] = found.node
    found.node.workers["pool"] += 1


# --- on a cluster


def until(true: Callable[[], bool], limit_s: float = 150.0) -> None:
    ends = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < ends, "it did not come true"
        time.sleep(0.05)


def places(pool: ForkPool) -> dict[str, ClusterNode]:
    """Of the workers that are ready."""
    lives = {name: pool._fleet.named(name).life for name in pool.workers}
    return {name: life.host.node for name, life in lives.items() if life is not None}  # type: ignore[attr-defined]


def boot_again(pool: ForkPool, worker: str) -> None:
    before = pid_of(pool, worker)
    os.kill(before, signal.SIGKILL)
    until(lambda: any(one.name == worker and one.pid not in (None, before) for one in pool.stats().workers))


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
