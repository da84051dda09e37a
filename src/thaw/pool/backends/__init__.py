"""The backends of a pool: which one boots its workers. What each must do is in `base`.

LocalProcesses    a host process for each worker: survives any death of an engine
InProcess         engines loaded into this process (no protection from a crash, no copy of a message)
Attached          engines that somebody else runs; they stay when the pool closes
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from thaw.core.errors import InvalidRequest
from thaw.pool.backends.base import WorkerBackend
from thaw.pool.home import PoolHome


def choose(
    home: PoolHome, engine: Any, workers: int, backend: Any, options: dict[str, Any], env: Any, limit_s: float
) -> tuple[WorkerBackend, int]:
    """The backend for what a pool was given, and how many workers it begins with."""
    from thaw.pool.backends.inside import Attached, InProcess
    from thaw.pool.backends.local import LocalProcesses

    if not isinstance(engine, str) or "://" in engine:
        targets = list(engine) if isinstance(engine, (list, tuple)) else [engine]
        if not targets:
            raise InvalidRequest("no engines given to attach to")
        return Attached(targets, options), len(targets)
    if backend == "inline":
        return InProcess(engine, options), workers
    if backend == "ray":
        backend = import_module("thaw.cluster.settings").RayCluster()
    if hasattr(backend, "open"):
        found: WorkerBackend = backend.open(home, engine, options, env=env, boot_timeout_s=limit_s)
        return found, workers
    if backend != "process":
        raise InvalidRequest(f"backend={backend!r}: must be 'process', 'inline', 'ray', or a RayCluster")
    return LocalProcesses(home, engine, options, env=env, boot_timeout_s=limit_s), workers
