"""The backends of a pool, and the choice of one by name. What each must do is in `base`.

process     a host process for each worker: survives any death of an engine
inline      engines loaded into this process (no protection from a crash, no copy of a message)
attached    engines that somebody else runs; they stay when the pool closes
ray         engines on the nodes of a Ray cluster (`thaw.cluster`)

A further backend is a file here and a line in `OWN`. Another distribution adds one by an entry point of group
`thaw.pool_backends`: a name, and what makes a `WorkerBackend` of a `WorkerSpec`. It is imported when a pool names it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from thaw.core.errors import InvalidRequest
from thaw.pool.backends.base import WorkerBackend, WorkerSpec

GROUP = "thaw.pool_backends"
OWN = {
    "process": "thaw.pool.backends.process:ProcessBackend",
    "inline": "thaw.pool.backends.inline:InlineBackend",
    "ray": "thaw.cluster.joining:on_ray",
}
Factory = Callable[[WorkerSpec], WorkerBackend]


def choose(spec: WorkerSpec, workers: int, backend: str | Factory) -> tuple[WorkerBackend, int]:
    """The backend for what a pool was given, and how many workers it begins with. An engine's name is booted by
    `backend`, a name or what makes one; anything else is joined. Raises `InvalidRequest` for a backend that there is
    none of, and for what the chosen one would not heed."""
    if isinstance(spec.engine, str) and "://" not in spec.engine:
        make = _named(backend) if isinstance(backend, str) else backend
        return make(spec), workers
    from thaw.pool.backends.attached import AttachedBackend

    joined = AttachedBackend(spec)
    if workers not in (1, len(joined)):
        raise InvalidRequest(
            f"workers={workers}: a pool that joins engines has one worker for each, here {len(joined)}. Leave workers "
            "out, or give as many engines"
        )
    if backend != "process":
        raise InvalidRequest(
            f"backend={backend!r} boots engines, and those that this pool joins run already. Leave backend out, or "
            "give an engine's name"
        )
    return joined, len(joined)


def _named(name: str) -> Factory:
    """thaw's own come first, whatever is installed."""
    if name in OWN:
        module, _, attribute = OWN[name].partition(":")
        made: Factory = getattr(importlib.import_module(module), attribute)
        return made
    from importlib.metadata import entry_points  # 50 ms that a backend of thaw's own need not cost

    others = {point.name: point for point in entry_points(group=GROUP)}
    if name not in others:
        known = " or ".join(repr(known) for known in (*OWN, *sorted(others)))
        raise InvalidRequest(f"backend={name!r}: must be {known}")
    made = others[name].load()
    return made
