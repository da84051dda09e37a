"""What a fork's children may be told, of any engine."""

from __future__ import annotations

from collections.abc import Sequence

from thaw.core.errors import InvalidRequest
from thaw.core.sampling import check_seed
from thaw.engines.base import MAX_CHILDREN


def check_children(n: int, replay: bool, seeds: Sequence[int] | None) -> None:
    """Raises `InvalidRequest` for a number of children that cannot be, and for seeds that are not one for each or go
    with `replay`; `BadSampling` for a seed that is none."""
    if not 1 <= n <= MAX_CHILDREN or (seeds is not None and len(seeds) != n):
        raise InvalidRequest(
            f"fork: n={n}, seeds={seeds!r}; n is 1 to {MAX_CHILDREN} and seeds, if given, are n integers"
        )
    if replay and seeds is not None:
        raise replay_beside(f"seeds={list(seeds)[:8]!r} gives each its own")
    for seed in seeds or ():
        check_seed(seed)


def replay_beside(other: str) -> InvalidRequest:
    """The error for `replay` beside what gives children other seeds. `other`: what that is, and what it does."""
    return InvalidRequest(
        f"fork: replay=True gives every child its parent's seed, and {other}; leave one of the two out"
    )
