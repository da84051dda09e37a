"""The pool's backend on a cluster: which node boots a worker, and the handle of one worker there."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable

from thaw.cluster.engine import NodeEngine
from thaw.cluster.messages import ENCODE, AttachEngine, EngineLog, KillEngine, PulledPacks, SpawnEngine, value_of
from thaw.cluster.node import ClusterNode
from thaw.cluster.nodes import ClusterNodes
from thaw.cluster.peer import exchange
from thaw.cluster.placement import Placement
from thaw.cluster.routes import PackRoutes
from thaw.cluster.shares import WorkerShare
from thaw.cluster.tls import plain_end
from thaw.core.errors import EngineDied, InvalidRequest, ThawError
from thaw.engines.base import Engine, HydratePlan
from thaw.pool.backends.base import WorkerHandle, WorkerSpec
from thaw.pool.backends.line import FAREWELL_S, LineHandle, named
from thaw.pool.rpc import protocol
from thaw.pool.rpc.client import RpcClient
from thaw.pool.rpc.connection import Connection
from thaw.pool.rpc.protocol import Booted

log = logging.getLogger("thaw.cluster")
REMEMBERED = 256
MAX_NODES_LOST = 8
"""While one worker boots, until that is given up."""


class ClusterBackend:
    """Each worker is an engine's process on some node, booted again there or elsewhere when it ends."""

    restarts = True

    def __init__(self, spec: WorkerSpec, nodes: ClusterNodes, *, own: bool) -> None:
        """`own`: the nodes are let go with this pool."""
        self._spec, self.nodes, self._own = spec, nodes, own
        self._key = secrets.token_hex(4)
        self._lock = threading.Lock()
        self._workers: set[NodeWorker] = set()
        self._places: dict[int, tuple[ClusterNode, WorkerShare | None]] = {}
        self._closed = self._ran = False
        self._refused: InvalidRequest | None = None
        """More workers were asked for than the placement group has room for, before the first one ran."""
        self.placed: deque[tuple[str, Placement]] = deque(maxlen=REMEMBERED)
        """Workers that were booted last, by name, and where. Logged too."""
        self.routes = PackRoutes(self.nodes)

    def boot(self, index: int, name: str, policy_version: str | None) -> WorkerHandle:
        """Where a node is lost while a worker boots there, the worker has not failed: it boots on another one."""
        for _ in range(MAX_NODES_LOST):
            node, share = self._places[index] = self._place(name, *self._places.get(index, (None, None)))
            try:
                return self._boot_on(node, share, index, name, policy_version)
            except EngineDied:
                if not node.lost or self._closed:
                    raise
        raise EngineDied(f"{MAX_NODES_LOST} nodes were lost one after another while {name} booted there")

    def _boot_on(
        self, node: ClusterNode, share: WorkerShare | None, index: int, name: str, policy_version: str | None
    ) -> NodeWorker:
        worker = None
        try:
            env = {**self._spec.env_of(index), **({} if share is None else share.env())}
            worker = self._attach(node, share, name, env)
            with self._lock:
                if self._closed:
                    raise EngineDied("the pool was closed while a worker booted")
                self._workers.add(worker)
            worker.start(self._spec.engine, self._spec.options_for(policy_version), self._spec.boot_timeout_s)
            self._may_run()
        except BaseException:
            if worker is not None:
                worker.kill()
            else:
                self._leave(node, share)
            raise
        return worker

    def _place(
        self, name: str, before: ClusterNode | None, share_before: WorkerShare | None
    ) -> tuple[ClusterNode, WorkerShare | None]:
        """Where to boot; with a placement group, on whose devices."""
        shares = self.nodes.shares
        if shares is None:
            found = self.nodes.place(self._key, before)
            self.placed.append((name, found))
            log.info("%s boots on %s", name, found.reason)
            return found.node, None
        try:
            share = shares.take(share_before)
        except InvalidRequest as error:
            with self._lock:
                if not self._ran:
                    self._refused = error
            raise
        try:
            return self.nodes.place_on(share.ray_id, self._key), share
        except BaseException:
            shares.free(share)
            raise

    def _may_run(self) -> None:
        """A pool of which one worker was refused as it began has none at all: it is not to run with fewer than it was
        asked for."""
        with self._lock:
            if self._refused is not None and not self._ran:
                raise self._refused
            self._ran = True

    def _leave(self, node: ClusterNode, share: WorkerShare | None) -> None:
        self.nodes.left(node, self._key)
        if share is not None and self.nodes.shares is not None:
            self.nodes.shares.free(share)

    def _attach(self, node: ClusterNode, share: WorkerShare | None, name: str, env: dict[str, str]) -> NodeWorker:
        """A process on the node, and the line to it. Raises `EngineDied`."""
        ticket = secrets.token_hex(16)
        self.nodes.ask(node, SpawnEngine(ticket=ticket, name=name, env=env))
        try:
            sock = self.nodes.peer(node).connect()
            pid = value_of(exchange(sock, ENCODE(AttachEngine(ticket=ticket))))
        except OSError as error:
            raise EngineDied(f"the node {node.address} took no worker: {error}") from error
        return NodeWorker(self, node, share, ticket, name, pid, RpcClient(Connection(plain_end(sock)), name))

    def check_update(self, update: str | Callable[[Engine], object] | None) -> None:
        if update is not None:
            named(update)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            booting = [worker for worker in self._workers if not worker.boot_s]
            empty = not self._workers
        for worker in booting:
            worker.kill()
        if empty:
            self._end()

    def ended(self, worker: NodeWorker) -> None:
        """Once for each. After the last one of a closed pool its nodes are let go."""
        with self._lock:
            if worker not in self._workers:
                return
            self._workers.discard(worker)
            last = self._closed and not self._workers
        self._leave(worker.node, worker.share)
        if last:
            self._end()

    def _end(self) -> None:
        if self._own:
            self.nodes.end()
        else:
            self.routes.close()


class NodeWorker(LineHandle):
    """A process on a node, and the line to it."""

    def __init__(
        self, backend: ClusterBackend, node: ClusterNode, share: WorkerShare | None, ticket: str, name: str, pid: int,
        line: RpcClient,
    ) -> None:  # fmt: skip
        super().__init__(line, pid)
        self._backend, self.node, self.share, self._ticket, self._name = backend, node, share, ticket, name
        self._over = threading.Event()
        self._told: Callable[[], None] | None = None
        line.on_end = self._ended
        node.on_lost.add(self._node_lost)

    def alive(self) -> bool:
        return not self._over.is_set()

    def on_end(self, callback: Callable[[], None]) -> None:
        self._told = callback

    def link(self, state: str) -> str:
        return self._backend.routes.link(self.node, state)

    def holds(self, state: str) -> None:
        self._backend.routes.holds(self.node, state)

    def came_over(self, plan: HydratePlan) -> str:
        assert isinstance(self.engine, NodeEngine)
        return self._backend.routes.link_of(self.engine.pulled(plan) or PulledPacks())

    def kill(self) -> None:
        """By its node's daemon; where that is gone the process ends by itself, for its line does."""
        with contextlib.suppress(ThawError):
            self._backend.nodes.ask(self.node, KillEngine(ticket=self._ticket))
        self._line.end("the worker was killed by its pool")
        self._over.set()
        self.node.on_lost.discard(self._node_lost)
        self._backend.ended(self)

    def close(self) -> None:
        self._line.tell(protocol.Bye(id=0))
        self._over.wait(FAREWELL_S)
        self.kill()

    def _ended(self) -> None:
        self._over.set()
        if self._told is not None:
            self._told()

    def _node_lost(self) -> None:
        self._line.end(f"the node {self.node.address} is gone, and worker {self._name} with it")

    def _proxy(self, booted: Booted) -> NodeEngine:
        return NodeEngine(self._line, booted, self.node, self._backend.routes)

    def _log(self) -> str:
        with contextlib.suppress(ThawError):
            return str(self._backend.nodes.ask(self.node, EngineLog(ticket=self._ticket)))
        return ""
