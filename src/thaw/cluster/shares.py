"""Which worker has which share of a placement group's bundles: the client's side.

A share is a bundle, or so many of its GPUs; one worker runs in each. While a worker has it, an actor of Ray's holds it
in Ray's books (`bundles.py`), and the worker's process sees these devices and no others.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from thaw.cluster.bundles import CREATED, PENDING, REMOVED, BundleShare, FoundGroups, RayGroup, TakenShare
from thaw.cluster.desk_line import KeeperGone, RayAway
from thaw.core.errors import Busy, EngineDied, InvalidRequest, NotFound, ThawError
from thaw.pool.backends.base import WorkerSpec

VISIBLE = "CUDA_VISIBLE_DEVICES"
LOOK_S = 15.0
TAKE_S = 120.0
"""For the actor that takes a share to begin; a bundle whose node was lost may first be placed elsewhere."""
AGAIN_S = 15.0
"""For one that takes it again; what waits for it is to look after other nodes too, and tries it again anyway."""
FREE_S = 2.0
GONE = "{}. Workers that run in it go on, on devices that Ray may give to others: close the pool"
AskDesk = Callable[..., Any]


@dataclass(eq=False)
class WorkerShare:
    """`taken`: by a worker. `ray_id`, `devices`: where it is, as Ray has said; "" until it has, for each worker again.
    `lock` is held while Ray is asked for it."""

    wanted: BundleShare
    taken: bool = False
    ray_id: str = ""
    devices: tuple[str, ...] = ()
    lock: threading.Lock = field(default_factory=threading.Lock)

    def env(self) -> dict[str, str]:
        """Of the worker's process. A bundle without GPUs gives none, and the node's are not seen either."""
        return {VISIBLE: ",".join(self.devices)}


class GroupShares:
    """Safe from any thread."""

    def __init__(self, ask: AskDesk, named: str, gpus_per_worker: float | None) -> None:
        """`ask`: a desk's. `named`: the group's name or id, as it was given. Raises `NotFound`, `InvalidRequest` and
        `Busy` for a group that is not there, is not one, or is not ready."""
        self._ask, self._named = ask, named
        self._lock = threading.Lock()
        self._id, self._warned = "", False
        group = self._look()
        if group.state in PENDING:
            raise Busy(
                f"the placement group {named!r} is not ready ({group.state}): the cluster does not have what it "
                "reserves yet. Wait for it (`ray.get(group.ready())`), then make the pool"
            )
        self._id = group.id
        self._shares = [WorkerShare(one) for one in shares_of(group, gpus_per_worker)]
        if not self._shares:
            raise InvalidRequest(
                f"gpus_per_worker={gpus_per_worker}: no bundle of the placement group {named!r} has as many "
                f"GPUs; they have {[bundle.get('GPU', 0) for bundle in group.bundles]}"
            )

    def take(self, before: WorkerShare | None) -> WorkerShare:
        """`before` if it is free, else any. Raises `InvalidRequest` where all are taken, `EngineDied` where Ray does
        not give it, `NotFound` where the group was removed."""
        with self._lock:
            free = [share for share in self._shares if not share.taken]
            if not free:
                raise InvalidRequest(self._full())
            share = before if before in free else free[0]
            assert share is not None
            share.taken = True
        try:
            self._look()
            self._hold(share, TAKE_S)
        except BaseException:
            self.free(share)
            raise
        return share

    def free(self, share: WorkerShare) -> None:
        """Its worker is no more."""
        with contextlib.suppress(ThawError):
            self._ask("free_share", share.wanted.key, limit_s=FREE_S)
        with self._lock:
            share.taken, share.ray_id = False, ""

    def mend(self) -> None:
        """Shares that workers have and that Ray's books have lost, an actor having ended, are taken again: where the
        bundle is by now, which its worker learns when it is booted again. Raises `RayAway`."""
        with self._lock:
            taken = [share for share in self._shares if share.taken and share.ray_id]
        for share in taken:
            try:
                self._ask("look_share", share.wanted.key, limit_s=LOOK_S)
            except KeeperGone:
                self._hold_again(share)

    def _hold_again(self, share: WorkerShare) -> None:
        try:
            if self._look().state == CREATED:
                self._hold(share, AGAIN_S)
        except NotFound as error:
            if not self._warned:
                self._warned = True
                warnings.warn(GONE.format(error), RuntimeWarning, stacklevel=2)
        except RayAway:
            raise
        except EngineDied:
            pass  # it is moved just now, or something else was sooner: the next look comes soon
        if not share.taken:  # its worker ended meanwhile
            self.free(share)

    def _hold(self, share: WorkerShare, limit_s: float) -> None:
        with share.lock:
            given = self._ask("take_share", data=msgspec.msgpack.encode(share.wanted), limit_s=limit_s)
            if given is None:
                raise EngineDied(
                    f"bundle {share.wanted.bundle} of the placement group {self._named!r} did not give {_said(share)} "
                    f"within {limit_s:.0f} s: something else in the bundle holds it, or its node is gone"
                )
            found = msgspec.convert(given, TakenShare)
            share.ray_id, share.devices = found.ray_id, tuple(found.devices)

    def _look(self) -> RayGroup:
        """The group as it is now, in any state but removed."""
        told = msgspec.convert(self._ask("groups", self._id or self._named, limit_s=LOOK_S), FoundGroups)
        there = [group for group in told.found if group.state != REMOVED]
        if len(there) > 1:
            ids = ", ".join(group.id for group in there)
            raise InvalidRequest(f"{len(there)} placement groups are called {self._named!r}; give the id of one: {ids}")
        if there:
            return there[0]
        if told.found:
            raise NotFound(f"the placement group {self._named!r} was removed")
        others = ", ".join(told.others) or "none"
        raise NotFound(f"no placement group {self._named!r} is in the Ray cluster; there are: {others}")

    def _full(self) -> str:
        bundles = len({share.wanted.bundle for share in self._shares})
        return (
            f"the placement group {self._named!r} has room for {len(self._shares)} workers (in {bundles} bundles), and "
            f"all of it is taken. Ask for at most {len(self._shares)} workers, or for a larger group"
        )


def check_devices(spec: WorkerSpec) -> None:
    """Raises `InvalidRequest` for workers to which the caller gives devices by hand."""
    envs = (spec.env,) if isinstance(spec.env, Mapping) else spec.env
    if any(VISIBLE in env for env in envs):
        raise InvalidRequest(
            f"env sets {VISIBLE}, and the workers' devices are those of the placement group. Leave it out"
        )


def shares_of(group: RayGroup, gpus_per_worker: float | None) -> list[BundleShare]:
    """A share for each worker that the group has room for, in the order of its bundles. A part of a GPU is for one
    worker of a bundle: Ray gives two such parts of one device, though the bundle has another."""
    found = []
    for index, bundle in enumerate(group.bundles):
        gpus, cpus = bundle.get("GPU", 0.0), bundle.get("CPU", 0.0)
        each = gpus if gpus_per_worker is None else gpus_per_worker
        count = int(gpus // each) if each >= 1 and gpus_per_worker is not None else int(each <= gpus)
        for _ in range(count):
            key = secrets.token_hex(8)
            found.append(
                BundleShare(key=key, group=group.id, bundle=index, num_gpus=each, num_cpus=0.0 if each else cpus)
            )
    return found


def _said(share: WorkerShare) -> str:
    if share.wanted.num_gpus:
        return f"{share.wanted.num_gpus:g} GPUs"
    return f"{share.wanted.num_cpus:g} CPUs"
