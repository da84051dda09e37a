"""The client's view of the cluster: its nodes, each with a daemon once it is needed.

A daemon is asked through Ray, by its node's keeper; where Ray or the keeper is away, straight. So what runs goes on
without Ray, and nothing waits for it but a node that is new. One thread renews the leases; another makes keepers again
that have ended, and joins Ray again when it is back: daemons that run are found by their machine's address, and none is
booted.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from thaw.cluster.daemon import DaemonAddress, DaemonSettings
from thaw.cluster.desk import RayNode
from thaw.cluster.desk_line import DaemonGone, DeskLine, KeeperGone, RayAway
from thaw.cluster.keeper import KEEPER_LIMIT_S, SMALL_BYTES
from thaw.cluster.messages import ENCODE, EndNode, Question, RenewLease, value_of
from thaw.cluster.node import ClusterNode
from thaw.cluster.peer import ANSWER_S, Peer
from thaw.cluster.placement import Placement, allowed, chosen
from thaw.cluster.secret import new_secret
from thaw.cluster.settings import ClusterSettings
from thaw.cluster.shares import GroupShares
from thaw.cluster.tls import PoolTls, given_by
from thaw.core.errors import EngineDied, NotFound, ThawError

MAX_THREADS = 32
JOIN_S = 90.0
LOOK_S = 15.0
AGAIN_S = 2.0
"""Between two looks at Ray: whether it is there, has the same nodes, and a keeper on each that needs one."""
SLOWED = (
    "engines on the node {} run at niceness {}, as Ray's workers do, and this user may not change that: they get "
    "little time beside other programs. Start Ray there with RAY_worker_niceness=0 in its environment"
)
NO_NIXL = "KV to and from the node {} goes over TCP: {}"


class ClusterNodes:
    """Safe from any thread. `num_calls`: questions that went through Ray; `num_direct`: those that did not."""

    def __init__(self, cluster: ClusterSettings, log: Path | None) -> None:
        if find_spec("ray") is None:
            raise NotFound("backend='ray' needs Ray, which is not installed: pip install 'thaw-vllm[ray]'")
        self._cluster, self._log, self._secret = cluster, log, new_secret()
        self._tls_given = given_by(cluster.tls)
        self._tls = None if self._tls_given is None else PoolTls(self._tls_given)
        self._lock = threading.Lock()
        self._nodes: list[ClusterNode] = []
        self._closing = threading.Event()
        self.num_calls = self.num_direct = self.num_joins = 0
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="thaw-nodes")
        self._desk = DeskLine(log)
        self.shares: GroupShares | None = None
        try:
            self._join()
            if (named := cluster.group_named()) is not None:
                self.shares = GroupShares(self._ask_desk, named, cluster.gpus_per_worker)
        except BaseException:
            self._desk.close()
            raise
        works = {"thaw-leases": self._renew_all, "thaw-ray": self._mend_often}
        self._running = [threading.Thread(target=work, name=name, daemon=True) for name, work in works.items()]
        for thread in self._running:
            thread.start()

    # -- which

    def all(self) -> list[ClusterNode]:
        with self._lock:
            return list(self._nodes)

    def home(self) -> ClusterNode:
        """The client's own node, with its daemon. Raises `EngineDied`."""
        for _ in range(2):
            for node in self.all():
                if node.is_home:
                    self.start(node)
                    return node
            self.refresh()
        raise EngineDied("the node that this program runs on is not in the Ray cluster; start Ray on it, or run there")

    def place(self, pool: str, before: ClusterNode | None) -> Placement:
        """A node for one more worker of that pool, counted there (`left` takes it back), and why that one. `before`:
        where the worker ran until now. Raises `EngineDied`."""
        tried: Counter[ClusterNode] = Counter()
        errors: list[str] = []
        while True:
            with contextlib.suppress(RayAway):
                self.refresh()  # each time: a node that was just lost is there again as another one
            with self._lock:
                found = chosen(allowed(self._nodes, self._cluster.labels), pool, before, tried)
                if found is None or len(errors) > 2 * len(self._nodes):
                    break
                found.node.workers[pool] += 1
            try:
                self.start(found.node)
            except EngineDied as error:
                self.left(found.node, pool)
                tried[found.node] += 1
                errors.append(f"{found.node.address}: {error}")
            else:
                return found
        labels = f" with the labels {dict(self._cluster.labels)}" if self._cluster.labels else ""
        raise EngineDied(f"no node of the Ray cluster{labels} can take a worker. " + "; ".join(errors))

    def place_on(self, ray_id: str, pool: str) -> ClusterNode:
        """That node of Ray's, for one more worker, as `place`. Raises `EngineDied`."""
        with contextlib.suppress(RayAway):
            self.refresh()
        with self._lock:
            node = next((node for node in self._nodes if node.ray_id == ray_id and not node.lost), None)
            if node is None:
                raise EngineDied(f"the node {ray_id} is not in the Ray cluster")
            node.workers[pool] += 1
        try:
            self.start(node)
        except BaseException:
            self.left(node, pool)
            raise
        return node

    def left(self, node: ClusterNode, pool: str) -> None:
        """A worker of that pool is no more on the node."""
        with self._lock:
            node.workers[pool] -= 1

    def refresh(self) -> None:
        """The nodes that Ray has now. Raises `RayAway`."""
        found = [msgspec.convert(one, RayNode) for one in self._desk.ask("nodes", limit_s=LOOK_S)]
        by_id, now = {one.ray_id: one for one in found}, time.monotonic()
        with self._lock:
            for node in self._nodes:
                node.told(by_id.get(node.ray_id), now)
            self._adopt(found, now)
            for node in self._nodes:
                by_id.pop(node.ray_id, None)
            for one in by_id.values():
                node = ClusterNode(secrets.token_hex(8), one.ray_id, one.address, one.labels, one.here)
                node.told(one, now)
                self._nodes.append(node)

    def _adopt(self, found: list[RayNode], now: float) -> None:
        """Daemons whose node went, and whose machine is back as another node: it is that node's from now on. Ray may
        have told of the new node before it noticed that the old one was gone."""
        seen = {node.ray_id: node.seen for node in self._nodes}
        used = {node.ray_id for node in self._nodes if node.daemon is not None or node.num_workers}
        free = [one for one in found if one.ray_id not in used]
        for node in sorted(self._nodes, key=lambda node: -node.num_workers):
            same = [one for one in free if one.address == node.address and one.here == node.is_home]
            same = [one for one in same if seen.get(one.ray_id, now) > node.seen]
            if not node.listed and node.daemon is not None and same:
                free.remove(same[0])
                self._nodes = [other for other in self._nodes if other.ray_id != same[0].ray_id]
                node.told(same[0], now)
                node.kept = False
        gone = [node for node in self._nodes if not node.listed and node.daemon is None]
        self._nodes = [node for node in self._nodes if node not in gone]

    # -- their daemons

    def start(self, node: ClusterNode) -> None:
        """Its daemon, if it has none. Raises `EngineDied`."""
        with node.lock:
            if node.lost:
                raise EngineDied(f"the node {node.address} is gone")
            if node.daemon is None:
                node.daemon = self._keep(node)
                if node.daemon.slowed:
                    warnings.warn(SLOWED.format(node.address, node.daemon.niceness), RuntimeWarning, stacklevel=2)
                if node.daemon.no_nixl:
                    warnings.warn(NO_NIXL.format(node.address, node.daemon.no_nixl), RuntimeWarning, stacklevel=2)
                node.heard = time.monotonic()

    def _keep(self, node: ClusterNode) -> DaemonAddress:
        """A keeper, which starts the daemon, or finds the one that runs."""
        settings = DaemonSettings(
            key=node.key, host=node.address, secret=self._secret.hex(), lease_s=self._cluster.lease_s,
            node_nbytes=self._cluster.node_nbytes, folder=self._cluster.folder, tls=self._tls_given,
            nixl=self._cluster.transport == "nixl",
        )  # fmt: skip
        given = (node.key, msgspec.json.encode(settings), self._cluster.interface)
        running = None if node.daemon is None else msgspec.json.encode(node.daemon)
        found = self._desk.ask("keep", node.ray_id, msgspec.msgpack.encode(given), running, KEEPER_LIMIT_S)
        node.kept = True
        return msgspec.json.decode(found, type=DaemonAddress)

    def peer(self, node: ClusterNode) -> Peer:
        if node.daemon is None:
            raise EngineDied(f"the node {node.address} has no daemon")
        return Peer(node.daemon.host, node.daemon.port, self._secret, self._tls)

    def ask(self, node: ClusterNode, question: Question, limit_s: float = ANSWER_S) -> Any:
        """The answer. Raises what it was answered with, and `EngineDied` where the daemon is gone."""
        if node.lost:
            raise EngineDied(f"the node {node.address} is gone")
        try:
            return value_of(self._ask(node, ENCODE(question), limit_s))
        except (OSError, DaemonGone) as error:
            self._lose(node)
            raise EngineDied(f"the node {node.address} is gone: {error}") from error

    def _ask(self, node: ClusterNode, data: bytes, limit_s: float) -> bytes:
        if node.kept and self._desk.alive and len(data) <= SMALL_BYTES:
            try:
                answer: bytes = self._desk.ask("ask", node.key, data, limit_s=limit_s)
            except (RayAway, KeeperGone):
                node.kept = False  # another one is made soon; questions may be asked twice
            else:
                self.num_calls += 1
                return answer
        self.num_direct += 1
        return self.peer(node).ask_raw(data, limit_s)

    def _ask_desk(self, *given: Any, **how: Any) -> Any:
        """Of the desk that there is now."""
        return self._desk.ask(*given, **how)

    def _lose(self, node: ClusterNode, *, only_idle: bool = False) -> bool:
        """Its daemon is gone, and with it what ran there. Another daemon may be started on the same node, as another
        `ClusterNode`. False where it was lost before, or has workers and was to be `only_idle`."""
        with self._lock:
            if node.lost or (only_idle and node.num_workers):
                return False
            node.lost = True
            self._nodes = [other for other in self._nodes if other is not node]
            told, node.on_lost = node.on_lost, set()
        for tell in told:
            tell()
        return True

    # -- the threads

    def _renew_all(self) -> None:
        while not self._closing.wait(min(1.0, self._cluster.lease_s / 5)):
            for node in self.all():
                if node.daemon is not None:
                    self._threads.submit(self._renew, node)

    def _mend_often(self) -> None:
        """Apart from the leases, for Ray may keep it waiting for longer than they last."""
        while not self._closing.wait(AGAIN_S):
            with contextlib.suppress(ThawError):
                self._mend()

    def _renew(self, node: ClusterNode) -> None:
        """A refusal is its end; silence is, after the lease."""
        try:
            self.peer(node).ask(RenewLease(), self._cluster.lease_s)
            node.heard = time.monotonic()
        except ConnectionRefusedError:
            self._lose(node)
        except (OSError, ThawError):
            if time.monotonic() - node.heard > self._cluster.lease_s:
                self._lose(node)

    def _mend(self) -> None:
        """Join Ray again where it was away, and give every daemon its keeper. Raises `EngineDied` where that cannot be
        done yet."""
        if not self._desk.alive:
            self._desk = DeskLine(self._log)
            if self._closing.is_set():
                return
            try:
                self._join()
            except BaseException:
                self._desk.close()
                raise
        try:
            self.refresh()
        except RayAway:  # this process of Ray's would end by itself, a minute later
            self._desk.close()
            raise
        for node in self.all():
            if node.daemon is not None and node.listed and not self._has_keeper(node):
                self._keep(node)
            self._let_go(node)
        if self.shares is not None:
            self.shares.mend()

    def _let_go(self, node: ClusterNode) -> None:
        """A machine that has left Ray and did not come back within the lease: its daemon ends once no worker runs
        there. Its packs are the client's too."""
        left = node.away is not None and time.monotonic() - node.away > self._cluster.lease_s
        if left and node.daemon is not None and not node.is_home and self._lose(node, only_idle=True):
            with contextlib.suppress(OSError, ThawError):
                self.peer(node).ask(EndNode(), 5.0)

    def _has_keeper(self, node: ClusterNode) -> bool:
        """Asked, for a keeper that ended is noticed by nobody while there is nothing to pass on."""
        if node.kept:
            try:
                self._desk.ask("look", node.key, limit_s=LOOK_S)
            except KeeperGone:
                node.kept = False
        return node.kept

    def _join(self) -> None:
        again = b"again" if self.num_joins else None
        where = self._cluster.address or ""
        try:
            self._desk.ask("join", where, extra=again, limit_s=JOIN_S)
        except RayAway as error:
            named = f"the Ray cluster at {where}" if where else "a Ray cluster"
            raise RayAway(f"{named} could not be joined: {error}. Does `ray status` work on this machine?") from None
        self.num_joins += 1
        self.refresh()
        with self._lock:
            for node in self._nodes:
                node.kept = False

    # -- looking and the end

    def object_store_nbytes(self) -> int:
        """Bytes in Ray's object stores, of all that run in the cluster. Raises `RayAway`."""
        return int(self._desk.ask("object_store"))

    def end(self) -> None:
        """End the daemons, and leave Ray. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        while any(thread.is_alive() for thread in self._running):
            self._desk.close()  # one of them may just be joining Ray again: whatever waits for a desk is let go
            for thread in self._running:
                thread.join(0.1)
        for node in self.all():
            if node.daemon is not None:
                with contextlib.suppress(OSError, ThawError):
                    self.peer(node).ask(EndNode(), 5.0)
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._desk.close()
