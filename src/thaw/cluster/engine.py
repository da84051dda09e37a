"""The engine of one worker on a node: packs are there before it reads them, and at home once it has written them."""

from __future__ import annotations

import threading
from collections import OrderedDict

import msgspec

from thaw.cluster.messages import PulledPacks
from thaw.cluster.node import ClusterNode
from thaw.cluster.routes import PackRoutes, packs_of
from thaw.data.tiers.base import MissingPack
from thaw.engines.base import Captured, CapturePlan, Handle, Hydrated, HydratePlan, SessionRef
from thaw.engines.promise import Promise
from thaw.pool.rpc.client import EngineProxy, RpcClient
from thaw.pool.rpc.protocol import Booted

REMEMBERED = 64


class NodeEngine(EngineProxy):
    """An engine on `node`. Its plans name folders of the client's; those of the node take their place."""

    def __init__(self, line: RpcClient, booted: Booted, node: ClusterNode, routes: PackRoutes) -> None:
        super().__init__(line, booted)
        self.node, self._routes = node, routes
        self._lock = threading.Lock()
        self._pulled: OrderedDict[int, PulledPacks] = OrderedDict()

    def capture(self, session: SessionRef, plan: CapturePlan) -> Handle[Captured]:
        mount = self._routes.mount(self.node, plan.mount)
        if mount is plan.mount:
            return super().capture(session, plan)
        there = super().capture(session, msgspec.structs.replace(plan, mount=mount))
        done: Promise[Captured] = Promise(on_cancel=there.cancel)
        threading.Thread(target=self._bring_home, args=(there, plan, done), name="thaw-home", daemon=True).start()
        return done

    def _bring_home(self, there: Handle[Captured], plan: CapturePlan, done: Promise[Captured]) -> None:
        try:
            captured = there.result()
            self._routes.captured(self.node, plan.mount, [pack.name for pack in captured.packs])
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            done.settle(error=error)
        else:
            done.settle(captured)

    def hydrate(self, plan: HydratePlan) -> Handle[Hydrated]:
        mount = self._routes.mount(self.node, plan.mount)
        if mount is plan.mount:
            return super().hydrate(plan)
        names = packs_of(plan)
        pulled = self._routes.bring(self.node, plan.mount, names)
        with self._lock:
            self._pulled[id(plan)] = pulled
            while len(self._pulled) > REMEMBERED:
                self._pulled.popitem(last=False)
        handle = super().hydrate(msgspec.structs.replace(plan, mount=mount))
        handle.add_done_callback(lambda done: self._looked(done, plan, names))
        return handle

    def _looked(self, done: Handle[Hydrated], plan: HydratePlan, names: list[str]) -> None:
        """The node may have dropped a pack between the look and the read: the next attempt brings it again."""
        try:
            done.result(0)
        except MissingPack:
            self._routes.forget(self.node, plan.mount.uuid, names)
        except Exception:  # noqa: BLE001 - whoever waits for it gets it
            pass

    def pulled(self, plan: HydratePlan) -> PulledPacks | None:
        """What was fetched for a plan of late, None for one that needed nothing of other nodes."""
        with self._lock:
            return self._pulled.get(id(plan))
