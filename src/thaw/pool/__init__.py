"""The fork pool: engines booted once (or joined), and rounds of N branches from a point, batched in them.

    pool = thaw.ForkPool("vllm", model="path/to/model", workers=2, repo=repo)
    results = pool.fork("main", ["Why?", "How?"], thaw.Sampling(max_tokens=64))
    round = pool.submit(results[0], 16)                        # a result is a point to continue from
    for result in round.as_completed(): ...

A worker is one engine, in a process of its own or attached. Rounds live in the *arena*, a repository in shared memory
that vanishes with the pool; bytes go straight between engines and its packs. Names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thaw.pool.pool import ForkPool
    from thaw.pool.round import Round
    from thaw.pool.session import PoolSession
    from thaw.pool.snapshot import Snapshot
    from thaw.pool.values import Branch, BranchDelta, BranchResult, Decision, PoolStats, Timings, WorkerStats

_HOME = {
    "Branch": "values",
    "BranchDelta": "values",
    "BranchResult": "values",
    "Decision": "values",
    "ForkPool": "pool",
    "PoolSession": "session",
    "PoolStats": "values",
    "Round": "round",
    "Snapshot": "snapshot",
    "Timings": "values",
    "WorkerStats": "values",
}
__all__ = [
    "Branch",
    "BranchDelta",
    "BranchResult",
    "Decision",
    "ForkPool",
    "PoolSession",
    "PoolStats",
    "Round",
    "Snapshot",
    "Timings",
    "WorkerStats",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'thaw.pool' has no attribute {name!r}")
    return getattr(importlib.import_module(f"thaw.pool.{home}"), name)
