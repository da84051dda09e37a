"""A node of the cluster, as a pool's client knows it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from thaw.cluster.daemon import DaemonAddress
from thaw.cluster.desk import RayNode


@dataclass(eq=False)
class ClusterNode:
    """`key`: our name for it, another one for each daemon. `seen`: since when Ray has it, as far as we were told (one
    clock for all). `away`: since when Ray does not have it any more, None while it does.
    `kept`: it has a keeper. `gpus`, `cpus`: what Ray counts there.

    `workers`: how many of each pool are there, by the pool's key. `folders`: by store, once it was told of it. `has`:
    (store, pack) that were seen there. `on_lost`: what is called once when its daemon is gone."""

    key: str
    ray_id: str
    address: str
    labels: dict[str, str]
    is_home: bool
    gpus: float = 0.0
    cpus: float = 0.0
    seen: float = 0.0
    daemon: DaemonAddress | None = None
    away: float | None = None
    kept: bool = False
    lost: bool = False
    workers: Counter[str] = field(default_factory=Counter)
    heard: float = field(default_factory=time.monotonic)
    folders: dict[str, str] = field(default_factory=dict)
    has: set[tuple[str, str]] = field(default_factory=set)
    on_lost: set[Callable[[], None]] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while its daemon is started, and while its folders are made known."""

    @property
    def listed(self) -> bool:
        """Ray has it."""
        return self.away is None

    @property
    def num_workers(self) -> int:
        """Of all pools that share its daemon."""
        return self.workers.total()

    def told(self, ray: RayNode | None, now: float) -> None:
        """What Ray says of it; None where Ray does not have it."""
        if ray is None:
            self.away = now if self.away is None else self.away
        else:
            self.seen = self.seen if ray.ray_id == self.ray_id and self.seen else now
            self.ray_id, self.labels, self.gpus, self.cpus = ray.ray_id, ray.labels, ray.gpus, ray.cpus
            self.away = None
