"""Rounds on a Ray cluster while engines, keepers, nodes and raylets are killed, and what went over their sockets."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ray_cluster import LocalCluster, counts, end_node, keepers, nodes_of

import thaw
from thaw.cluster.messages import NodeCounts
from thaw.pool import ForkPool, Snapshot
from thaw.testing.pool_soak import LIMIT_S, Bits, Soak, bits, undisturbed

T = TypeVar("T")
HARMS = ("engine", "keeper", "node", "raylet", "none", "none")
BRANCHES = 6
HOME, MOVED = "home", "moved meanwhile"
BALANCE_S = 30.0
"""How long a fetch for a batch that was given up may still run after its round."""


@dataclass
class Traffic:
    """Bytes of packs that the daemons counted on their sockets, by the daemon's pid. One that is killed takes its
    counts along, so all are looked at after every round.

    `num_balanced`: looks between which no daemon came or went, and all bytes that were received meanwhile had been
    sent by another daemon. `wrong`: those between which they had not. One that was killed between two looks may have
    come after the first one."""

    sent: dict[int, int] = field(default_factory=dict)
    received: dict[int, int] = field(default_factory=dict)
    object_store: int = 0
    num_balanced: int = 0
    wrong: list[str] = field(default_factory=list)
    _last: frozenset[int] = frozenset()

    def look(self, pool: ForkPool, one_was_killed: bool = False) -> None:
        if one_was_killed:
            self._last = frozenset()
        ends = time.monotonic() + BALANCE_S
        while (found := looked(pool)) is not None and not self._balanced(found) and time.monotonic() < ends:
            time.sleep(0.2)
        if found is None:  # a daemon that was just killed: its node is not known to be lost yet
            self._last = frozenset()
            return
        if self._comparable(found):
            self.num_balanced += self._balanced(found)
            if not self._balanced(found):
                self.wrong.append(f"sent {self.sent} and then {found}")
        self._last = frozenset(found)
        self.sent.update({pid: one.sent_nbytes for pid, one in found.items()})
        self.received.update({pid: one.received_nbytes for pid, one in found.items()})
        self.object_store = max(self.object_store, object_store(pool))

    def _comparable(self, found: dict[int, NodeCounts]) -> bool:
        return self._last == frozenset(found)

    def _balanced(self, found: dict[int, NodeCounts]) -> bool:
        """Whether as much was sent since the last look as was received; true where they cannot be compared."""
        sent = sum(one.sent_nbytes - self.sent.get(pid, 0) for pid, one in found.items())
        received = sum(one.received_nbytes - self.received.get(pid, 0) for pid, one in found.items())
        return sent == received or not self._comparable(found)

    def counted(self) -> dict[str, int]:
        """For a receipt."""
        return {
            "daemons": len(self.received), "sent bytes": sum(self.sent.values()),
            "received bytes": sum(self.received.values()), "bytes in the object store of Ray": self.object_store,
            "looks with equal sums": self.num_balanced,
        }  # fmt: skip


class Places:
    """On which node each branch ran: "home", the client's, or the number of another. A node that takes the place of one
    whose raylet was killed has its number."""

    def __init__(self, cluster: LocalCluster) -> None:
        others = [node for node in cluster.ray.list_all_nodes() if not node.head]
        self._numbers = {node.node_id: str(number) for number, node in enumerate(others, 1)}
        self.branches: Counter[str] = Counter()
        self.workers: Counter[str] = Counter()
        """After each round, where the workers were."""

    def replace(self, gone: object, new: object) -> None:
        self._numbers[new.node_id] = self._numbers[gone.node_id]  # type: ignore[attr-defined]

    def now(self, pool: ForkPool) -> dict[str, str]:
        """For each worker that runs, its node."""
        lives = {worker.name: worker.life for worker in list(pool._fleet.workers)}
        nodes = {name: life.host.node for name, life in lives.items() if life is not None}  # type: ignore[attr-defined]
        return {name: HOME if node.is_home else self._numbers[node.ray_id] for name, node in nodes.items()}

    def note(self, results: Sequence[thaw.BranchResult], before: dict[str, str], after: dict[str, str]) -> None:
        """`before` and `after`: where workers were when the round began and when it was over."""
        for result in results:
            seen = {where for where in (before.get(result.worker), after.get(result.worker)) if where is not None}
            self.branches[seen.pop() if len(seen) == 1 else MOVED] += 1
        self.workers.update(after.values())

    def shares(self) -> dict[str, float]:
        """Of the branches that surely ran on one node, by node."""
        known = self.branches.total() - self.branches[MOVED]
        return {where: self.branches[where] / max(1, known) for where in (HOME, *sorted({*self._numbers.values()}))}


def object_store(pool: ForkPool) -> int:
    """Bytes that stay in Ray's object store. Ray's sums count the store of a node that ends just now as used up."""
    used, ends = 0, time.monotonic() + BALANCE_S
    while time.monotonic() < ends:
        with contextlib.suppress(thaw.ThawError):  # Ray itself was just harmed
            used = pool._backend.nodes.object_store_nbytes()  # type: ignore[attr-defined]
            if used == 0:
                break
        time.sleep(0.2)
    return used


def looked(pool: ForkPool) -> dict[int, NodeCounts] | None:
    with contextlib.suppress(thaw.ThawError):
        return {one.pid: one for one in counts(pool).values()}
    return None


@dataclass
class Harmed:
    """A run of `disturb_nodes`."""

    soak: Soak
    traffic: Traffic
    places: Places

    def said(self) -> dict[str, object]:
        """For a receipt."""
        shares = {f"share of node {where}": share for where, share in self.places.shares().items()}
        ran = {f"branches on node {where}": count for where, count in self.places.branches.items()}
        there = {f"workers on node {where} after rounds": count for where, count in self.places.workers.items()}
        lost = self.soak.counts["branches"] - self.soak.counts["equal"]
        return {
            "counts": {**self.soak.counts, "lost or different": lost}, "places": {**ran, **there, **shares},
            "sockets": self.traffic.counted(),
        }  # fmt: skip


def documents(pool: ForkPool, left_out: int = 0) -> list[Snapshot]:
    """Snapshots of three texts, without their last `left_out` tokens."""
    points = []
    for number in range(3):
        session = pool.session(seed=number)
        session.append(f"Document {number}. " * 30)
        points.append(pool.snapshot(session, at=session.num_tokens - left_out))
        session.close()
    return points


def disturb_nodes(
    cluster: LocalCluster, pool: ForkPool, points: Sequence[Snapshot], reference: list[list[Bits]],
    sampling: thaw.Sampling, *, rounds: int, seed: int, delay_s: float = 0.3, settled: float = 0.5,
) -> Harmed:  # fmt: skip
    """`rounds` rounds, each with one harm, as many of each, in an order drawn by `seed`, within `delay_s` of its start.
    Every branch must come once, with the bits of `reference`. A worker that the pool gives up, having failed too often,
    is replaced. `settled`: of so many of the rounds that they begin when all workers run again; others find them
    booting."""
    draw, soak, traffic, before = random.Random(seed), Soak(), Traffic(), pool.stats().num_retries
    places, workers = Places(cluster), len(pool.workers)
    harms = draw.sample(HARMS * -(-rounds // len(HARMS)), rounds)
    traffic.look(pool)
    for number, harm in enumerate(harms):
        which, victim = draw.randrange(len(points)), draw.randrange(1 << 30)
        began = places.now(pool)
        goes = where_to(pool, draw.choice((1, 2, 3)), draw.randrange(1 << 30))
        round_ = pool.submit(points[which], len(reference[which]), sampling, keep=False, **goes)
        with ThreadPoolExecutor(1) as beside:
            doing = beside.submit(do_harm, cluster, pool, harm, victim, soak, draw.random() * delay_s)
            results = round_.result(LIMIT_S, errors="return")
        if (gone := doing.result()) is not None:  # Ray starts nodes in a program's main thread alone
            places.replace(gone, cluster.add())
        soak.counts["rounds"] += 1
        soak.counts["branches"] += len(results)
        soak.counts["answered twice"] += round_.num_dropped
        compare(results, reference[which], f"round {number}, {harm}", soak)
        traffic.look(pool, harm == "node")
        while sum(worker.state != "gone" for worker in pool.stats().workers) < workers:
            pool.add_worker()
            soak.counts["workers that were given up"] += 1
        if draw.random() < settled:
            until_ready(pool, workers)
        places.note(results, began, places.now(pool))
    soak.counts["retries"] = pool.stats().num_retries - before
    return Harmed(soak, traffic, places)


def until_ready(pool: ForkPool, workers: int) -> None:
    ends = time.monotonic() + LIMIT_S
    while len(pool.workers) < workers:
        assert time.monotonic() < ends, [(worker.name, worker.last_error) for worker in pool._fleet.workers]
        time.sleep(0.2)


def harmed_rounds(cluster: LocalCluster, rounds: int, seed: int, sampling: thaw.Sampling) -> Harmed:
    """On a cluster of three nodes with a worker on each."""
    with cluster.pool(workers=3, retries=8) as pool:
        assert len(nodes_of(pool)) == 3
        points = documents(pool)
        reference = undisturbed(pool, points, BRANCHES, sampling)
        found = disturb_nodes(cluster, pool, points, reference, sampling, rounds=rounds, seed=seed)
    print(seed, found.said())
    return found


def where_to(pool: ForkPool, spread: int, any_number: int) -> dict[str, Any]:
    """Over so many workers, as the pool places them; a round for one worker alone is for a drawn one, or the client's
    own node would be taken for its links, which cost nothing."""
    steady = sorted(worker.name for worker in list(pool._fleet.workers) if worker.state == "ready")
    return {"worker": chosen(steady, any_number)} if spread == 1 and steady else {"spread": spread}


def compare(results: Sequence[thaw.BranchResult], expected: list[Bits], what: str, soak: Soak) -> None:
    for result, wanted in zip(results, expected, strict=True):
        if result.error is not None:
            soak.wrong.append(f"{what}: branch {result.index} failed: {result.error}")
        elif bits(result) != wanted:
            soak.wrong.append(f"{what}: branch {result.index} differs")
        else:
            soak.counts["equal"] += 1


def do_harm(cluster: LocalCluster, pool: ForkPool, harm: str, victim: int, soak: Soak, after_s: float) -> object:
    """Counted where there was something to harm. `victim`: any number, by which it is chosen. The Ray node whose raylet
    was killed, for another one to be started on the same machine: the daemon there is its own from then on."""
    time.sleep(after_s)
    gone = None
    workers = {w.name: w.pid for w in pool.stats().workers if w.pid is not None}
    far = [node for node in nodes_of(pool) if not node.is_home]
    with contextlib.suppress(ProcessLookupError, IndexError):
        if harm == "engine":
            os.kill(chosen(list(workers.values()), victim), signal.SIGKILL)
        elif harm == "keeper":
            os.kill(chosen(keepers(cluster), victim), signal.SIGKILL)
        elif harm == "node":
            node = chosen(far, victim)
            end_node(node, [pid for name, pid in pids_on(pool, node.key) if name in workers])
        elif harm == "raylet":
            left = [node for node in cluster.ray.list_all_nodes() if not node.head]
            gone = chosen(left, victim)
            cluster.ray.remove_node(gone, allow_graceful=False)
        soak.counts[harm] += 1
    return gone


def chosen(of: Sequence[T], victim: int) -> T:
    """Raises `IndexError` where there is none."""
    return of[victim % max(1, len(of))]


def pids_on(pool: ForkPool, key: str) -> list[tuple[str, int]]:
    """Workers of a node, with their processes."""
    found = []
    for worker in list(pool._fleet.workers):
        life = worker.life
        if life is not None and life.host.node.key == key and life.host.pid is not None:  # type: ignore[attr-defined]
            found.append((worker.name, life.host.pid))
    return found


def held(harmed: Harmed, rounds: int, what: object, least: float = 0.0) -> None:
    """What every run of `disturb_nodes` must show. `least`: of all branches, on each node."""
    soak, traffic = harmed.soak, harmed.traffic
    assert soak.wrong == [], (what, soak.wrong[:5])
    assert soak.counts["rounds"] == rounds and soak.counts["answered twice"] == 0
    assert soak.counts["equal"] == soak.counts["branches"] > 0
    assert soak.counts["node"] + soak.counts["engine"] + soak.counts["raylet"] > 0
    assert traffic.wrong == [], (what, traffic.wrong[:3])
    assert traffic.num_balanced > 0 and sum(traffic.received.values()) > 0, "KV went from daemon to daemon"
    assert traffic.object_store == 0, "and not through Ray"
    assert min(harmed.places.shares().values()) >= least, (what, harmed.places.branches)


def line_nbytes(pool: ForkPool) -> int:
    """Bytes in both directions, as the kernel counted them, of the connections between the client and the engines that
    run. Linux."""
    return sum(_carried(worker.life.host._line._connection._sock) for worker in pool._fleet.workers)  # type: ignore[union-attr,attr-defined]


def _carried(sock: socket.socket) -> int:
    """`tcpi_bytes_acked` and `tcpi_bytes_received` of `struct tcp_info`."""
    found = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
    return sum(struct.unpack_from("=QQ", found, 120))
