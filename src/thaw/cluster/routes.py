"""Where packs are, and how they come to where they are needed.

The client's node has every pack of the pool's stores: what is captured on another node is fetched from there before the
capture is over. Other nodes have what was captured or needed there, in folders of their own. A pack is fetched from the
node that captured it, else from the client's.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from thaw.cluster.messages import DropPacks, ForgetStore, PackSource, PulledPacks, PullPacks, ServeStore
from thaw.cluster.node import ClusterNode
from thaw.cluster.nodes import ClusterNodes
from thaw.core.errors import EngineDied, ThawError
from thaw.data.locations import StoreMount, TierAddress
from thaw.data.tiers.folder import SCHEME, folder_of
from thaw.engines.base import HydratePlan

PULL_S = 3600.0
SWEEP_S = 5.0
DROP_AT_ONCE = 256
MAX_POINTS = 4096


class PackRoutes:
    """Safe from any thread."""

    def __init__(self, nodes: ClusterNodes) -> None:
        self._nodes = nodes
        self._lock = threading.Lock()
        self._homes: dict[str, Path] = {}
        self._captured: dict[tuple[str, str], ClusterNode] = {}
        self._points: dict[str, list[ClusterNode]] = {}
        self._swept = time.monotonic()

    # -- which link

    def link(self, node: ClusterNode, state: str) -> str:
        """The address that a stored point would come from to `node`; "" where it is there, as everything is at home."""
        with self._lock:
            there = self._points.get(state, [])
            if node.is_home or node in there:
                return ""
            good = [other for other in there if not other.lost]
        homes = [other for other in self._nodes.all() if other.is_home]
        return next((other.address for other in (*good, *homes)), "")

    def holds(self, node: ClusterNode, state: str) -> None:
        with self._lock:
            there = self._points.pop(state, [])
            self._points[state] = [*(other for other in there if other is not node), node]
            while len(self._points) > MAX_POINTS:
                del self._points[next(iter(self._points))]

    def link_of(self, pulled: PulledPacks) -> str:
        """The address that most of it came from."""
        if not pulled.by_source:
            return ""
        key = max(pulled.by_source, key=lambda key: pulled.by_source[key])
        return next((node.address for node in self._nodes.all() if node.key == key), key)

    # -- packs

    def mount(self, node: ClusterNode, mount: StoreMount) -> StoreMount:
        """The store as processes on `node` reach it: its own folder in place of the client's, further tiers stay."""
        first = mount.tiers[0]
        if node.is_home or not first.url.startswith(SCHEME):
            return mount
        self._homes.setdefault(mount.uuid, folder_of(first))
        with node.lock:
            known = node.folders.get(mount.uuid)
        if known is None:
            known = str(self._nodes.ask(node, ServeStore(uuid=mount.uuid)))
            with node.lock:
                node.folders[mount.uuid] = known
        return msgspec.structs.replace(mount, tiers=(TierAddress(url=Path(known).as_uri()), *mount.tiers[1:]))

    def bring(self, node: ClusterNode, mount: StoreMount, names: Iterable[str]) -> PulledPacks:
        """Have the packs on `node`; those that the client's node has not are left to the mount's further tiers.

        Raises `MissingPack`, `CorruptBlob`, `StorageFailed`, `EngineDied`."""
        self._sweep()
        wanted = [name for name in dict.fromkeys(names) if (mount.uuid, name) not in node.has]
        if len(mount.tiers) > 1:
            wanted = [name for name in wanted if self._exists(mount.uuid, name)]
        done = PulledPacks()
        for source, some in self._by_source(node, mount.uuid, wanted):
            sources = (self._source(source),) if source is not None else ()
            done = _sum(done, self._pull(node, mount.uuid, some, (*sources, self._home_source(mount.uuid))))
        with self._lock:
            node.has.update((mount.uuid, name) for name in wanted)
        return done

    def forget(self, node: ClusterNode, uuid: str, names: Iterable[str]) -> None:
        """They are to be looked for again: the node has dropped some."""
        with self._lock:
            node.has.difference_update((uuid, name) for name in names)

    def captured(self, node: ClusterNode, mount: StoreMount, names: Iterable[str]) -> PulledPacks:
        """New packs of `node` have to be on the client's node too, on disk. Raises as `bring`."""
        found = tuple(names)
        done = PulledPacks()
        if found and not node.is_home:
            self._homes.setdefault(mount.uuid, folder_of(mount.tiers[0]))
            done = self._pull(self._home(mount.uuid), mount.uuid, found, (self._source(node),))
            with self._lock:
                self._captured.update(((mount.uuid, name), node) for name in found)
                node.has.update((mount.uuid, name) for name in found)
        return done

    def close(self) -> None:
        """The pool is closed: the nodes keep nothing of its stores."""
        for node in self._nodes.all():
            with node.lock:
                known = [uuid for uuid in self._homes if node.folders.pop(uuid, None) is not None]
            for uuid in known:
                with contextlib.suppress(ThawError):
                    self._nodes.ask(node, ForgetStore(uuid=uuid))
            with self._lock:
                node.has = {pair for pair in node.has if pair[0] not in self._homes}

    def _pull(self, node: ClusterNode, uuid: str, names: Iterable[str], sources: tuple[PackSource, ...]) -> PulledPacks:
        found = self._nodes.ask(node, PullPacks(uuid=uuid, names=tuple(names), sources=sources), PULL_S)
        return msgspec.convert(found, PulledPacks)

    def _by_source(self, node: ClusterNode, uuid: str, names: list[str]) -> list[tuple[ClusterNode | None, list[str]]]:
        """`names` by the node that captured them, None where only the client's has them."""
        found: dict[ClusterNode | None, list[str]] = {}
        with self._lock:
            for name in names:
                source = self._captured.get((uuid, name))
                good = source is not None and source is not node and not source.lost
                found.setdefault(source if good else None, []).append(name)
        return list(found.items())

    def _source(self, node: ClusterNode) -> PackSource:
        daemon = node.daemon
        if daemon is None:
            raise EngineDied(f"the node {node.address} has no daemon")
        return PackSource(key=node.key, host=daemon.host, port=daemon.port)

    def _home_source(self, uuid: str) -> PackSource:
        return self._source(self._home(uuid))

    def _home(self, uuid: str) -> ClusterNode:
        """The client's node, which knows the store's folder."""
        node = self._nodes.home()
        with node.lock:
            known = uuid in node.folders
        if not known:
            folder = str(self._homes[uuid])
            self._nodes.ask(node, ServeStore(uuid=uuid, folder=folder))
            with node.lock:
                node.folders[uuid] = folder
        return node

    def _exists(self, uuid: str, name: str) -> bool:
        """Whether the client's node has it. Other pools' stores are none of ours."""
        return uuid not in self._homes or (self._homes[uuid] / name).exists()

    def _sweep(self) -> None:
        """What the stores themselves have dropped, the nodes drop too: now and then, and never for long."""
        with self._lock:
            if time.monotonic() - self._swept < SWEEP_S:
                return
            self._swept = time.monotonic()
            known = [(node, set(node.has)) for node in self._nodes.all() if not node.is_home]
        for node, packs in known:
            gone = [(uuid, name) for uuid, name in packs if not self._exists(uuid, name)][:DROP_AT_ONCE]
            for uuid in {uuid for uuid, _ in gone}:
                names = tuple(name for other, name in gone if other == uuid)
                with contextlib.suppress(ThawError):
                    self._nodes.ask(node, DropPacks(uuid=uuid, names=names))
            with self._lock:
                node.has.difference_update(gone)
                for pair in gone:
                    self._captured.pop(pair, None)


def packs_of(plan: HydratePlan) -> list[str]:
    """The packs that a plan reads, in order."""
    named = [*(piece.blobs for piece in plan.slices), *(point.blobs for point in plan.points)]
    found = [place.pack for one in named for places in one.values() for place in places]
    return list(dict.fromkeys([*found, *([plan.hidden.pack] if plan.hidden else [])]))


def _sum(one: PulledPacks, other: PulledPacks) -> PulledPacks:
    keys = {**one.by_source, **other.by_source}
    return PulledPacks(
        num_packs=one.num_packs + other.num_packs, nbytes=one.nbytes + other.nbytes,
        seconds=one.seconds + other.seconds,
        by_source={key: one.by_source.get(key, 0) + other.by_source.get(key, 0) for key in keys},
    )  # fmt: skip
