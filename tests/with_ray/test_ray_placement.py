"""Which node boots a worker. What comes of it on a cluster is in `test_ray_faults.py`."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from ray_placing import as_before

from thaw.cluster.node import ClusterNode
from thaw.cluster.placement import MAX_TRIES, Placement, allowed, chosen

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
