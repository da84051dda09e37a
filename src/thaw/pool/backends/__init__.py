"""The backends of a pool: which one boots its workers. What each must do is in `base`.

process     a host process for each worker: survives any death of an engine
inline      engines loaded into this process (no protection from a crash, no copy of a message)
attached    engines that somebody else runs; they stay when the pool closes
"""

from __future__ import annotations

from typing import Any

from thaw.core.errors import InvalidRequest
from thaw.pool.backends.base import WorkerBackend
from thaw.pool.shm.dirs import PoolDirs


def choose(
    dirs: PoolDirs, engine: Any, workers: int, backend: str, options: dict[str, Any], env: Any, limit_s: float
) -> tuple[WorkerBackend, int]:
    """The backend for what a pool was given, and how many workers it begins with."""
    from thaw.pool.backends.attached import AttachedBackend
    from thaw.pool.backends.inline import InlineBackend
    from thaw.pool.backends.process import ProcessBackend

    if not isinstance(engine, str) or "://" in engine:
        targets = list(engine) if isinstance(engine, (list, tuple)) else [engine]
        if not targets:
            raise InvalidRequest("no engines given to attach to")
        return AttachedBackend(targets, options), len(targets)
    if backend == "inline":
        return InlineBackend(engine, options), workers
    if backend != "process":
        raise InvalidRequest(f"backend={backend!r}: must be 'process' or 'inline'")
    return ProcessBackend(dirs, engine, options, env=env, boot_timeout_s=limit_s), workers
