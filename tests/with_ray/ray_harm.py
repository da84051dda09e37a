"""Rounds on a Ray cluster while engines, keepers, nodes and raylets are killed, and what went over their sockets."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from ray_cluster import LocalCluster, counts, end_node, keepers, nodes_of

import thaw
from thaw.cluster.messages import NodeCounts
from thaw.pool import ForkPool, Snapshot
from thaw.testing.pool_soak import LIMIT_S, Bits, Soak, bits

T = TypeVar("T")
HARMS = ("engine", "keeper", "node", "raylet", "none", "none")
BALANCE_S = 30.0
"""How long a fetch for a batch that was given up may still run after its round."""


@dataclass
class Traffic:
    """Bytes of packs that the daemons counted on their sockets, by the daemon's pid. One that is killed takes its
    counts along, so all are looked at after every round.

    `num_balanced`: looks between which no daemon came or went, and all bytes that were received meanwhile had been
    sent by another daemon. `wrong`: those between which they had not."""

    sent: dict[int, int] = field(default_factory=dict)
    received: dict[int, int] = field(default_factory=dict)
    object_store: int = 0
    num_balanced: int = 0
    wrong: list[str] = field(default_factory=list)
    _last: frozenset[int] = frozenset()

    def look(self, pool: ForkPool) -> None:
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


def disturb_nodes(
    cluster: LocalCluster, pool: ForkPool, points: Sequence[Snapshot], reference: list[list[Bits]],
    sampling: thaw.Sampling, *, rounds: int, seed: int, delay_s: float = 0.3,
) -> tuple[Soak, Traffic]:  # fmt: skip
    """`rounds` rounds, each with one harm drawn by `seed`, within `delay_s` of its start. Every branch must come once,
    with the bits of `reference`."""
    draw, soak, traffic, before = random.Random(seed), Soak(), Traffic(), pool.stats().num_retries
    traffic.look(pool)
    for number in range(rounds):
        which, harm, victim = draw.randrange(len(points)), draw.choice(HARMS), draw.randrange(1 << 30)
        round_ = pool.submit(points[which], len(reference[which]), sampling, spread=draw.choice((1, 2, 3)), keep=False)
        doing = threading.Timer(draw.random() * delay_s, do_harm, (cluster, pool, harm, victim, soak))
        doing.start()
        results = round_.result(LIMIT_S, errors="return")
        doing.join()
        if harm == "raylet":
            cluster.add()  # another node on the same machine: the daemon there is its own from now on
        soak.counts["rounds"] += 1
        soak.counts["branches"] += len(results)
        soak.counts["answered twice"] += round_.num_dropped
        compare(results, reference[which], f"round {number}, {harm}", soak)
        traffic.look(pool)
    soak.counts["retries"] = pool.stats().num_retries - before
    return soak, traffic


def compare(results: Sequence[thaw.BranchResult], expected: list[Bits], what: str, soak: Soak) -> None:
    for result, wanted in zip(results, expected, strict=True):
        if result.error is not None:
            soak.wrong.append(f"{what}: branch {result.index} failed: {result.error}")
        elif bits(result) != wanted:
            soak.wrong.append(f"{what}: branch {result.index} differs")
        else:
            soak.counts["equal"] += 1


def do_harm(cluster: LocalCluster, pool: ForkPool, harm: str, victim: int, soak: Soak) -> None:
    """Counted where there was something to harm. `victim`: any number, by which it is chosen."""
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
            cluster.ray.remove_node(chosen(left, victim), allow_graceful=False)
        soak.counts[harm] += 1


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


def held(soak: Soak, traffic: Traffic, rounds: int, what: object) -> None:
    """What every run of `disturb_nodes` must show."""
    assert soak.wrong == [], (what, soak.wrong[:5])
    assert soak.counts["rounds"] == rounds and soak.counts["answered twice"] == 0
    assert soak.counts["equal"] == soak.counts["branches"] > 0
    assert soak.counts["node"] + soak.counts["engine"] + soak.counts["raylet"] > 0
    assert traffic.wrong == [], (what, traffic.wrong[:3])
    assert traffic.num_balanced > 0 and sum(traffic.received.values()) > 0, "KV went from daemon to daemon"
    assert traffic.object_store == 0, "and not through Ray"


def line_nbytes(pool: ForkPool) -> int:
    """Bytes in both directions, as the kernel counted them, of the connections between the client and the engines that
    run. Linux."""
    return sum(_carried(worker.life.host._line._connection._sock) for worker in pool._fleet.workers)  # type: ignore[union-attr,attr-defined]


def _carried(sock: socket.socket) -> int:
    """`tcpi_bytes_acked` and `tcpi_bytes_received` of `struct tcp_info`."""
    found = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
    return sum(struct.unpack_from("=QQ", found, 120))
