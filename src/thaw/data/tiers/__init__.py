"""Tiers: the places where a store's packs lie.

`base.py` says what a tier is, `mounted.py` reads a store's tiers in their order, and every other file is one kind. (One
more, a pack that is still being downloaded, is in `thaw.remote.arriving`.) An address is a URL whose scheme names the
kind: one of `OWN`, or an entry point of the group `thaw.tiers` in another package. What is named is a function
(TierAddress) -> tier; its heavy imports stand inside it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib import import_module

from thaw.core.errors import InvalidRequest, NotFound
from thaw.data.locations import TierAddress
from thaw.data.tiers.base import ReadExtents

GROUP = "thaw.tiers"
OWN = {"file": "thaw.data.tiers.folder:open_folder"}
MAX_OPEN = 256


def open_tier(address: TierAddress) -> ReadExtents:
    """The tier at `address`, opened once in this process. Raises `NotFound` where no package has that kind of tier, and
    what opening it raises."""
    return _opened(os.getpid(), address.url, tuple(sorted(address.options.items())))


@functools.lru_cache(maxsize=MAX_OPEN)
def _opened(pid: int, url: str, options: tuple[tuple[str, str | int | bool], ...]) -> ReadExtents:
    """`pid`: what a process inherits by a fork (a connection) is not its own."""
    return _kind(url.partition(":")[0])(TierAddress(url=url, options=dict(options)))


def _kind(scheme: str) -> Callable[[TierAddress], ReadExtents]:
    module, _, name = _named(scheme).partition(":")
    try:
        found: Callable[[TierAddress], ReadExtents] = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise NotFound(f"the tier {scheme}:// ({module}:{name}) cannot be imported: {error}") from error
    return found


def _named(scheme: str) -> str:
    if scheme in OWN:
        return OWN[scheme]
    from importlib.metadata import entry_points  # 50 ms that a folder need not cost

    found = {point.value: point for point in entry_points(group=GROUP, name=scheme)}
    if not found:
        others = sorted({*OWN, *(point.name for point in entry_points(group=GROUP))})
        raise NotFound(f"no tier is called {scheme}:// here; there are: {', '.join(others)}. Install its package.")
    if len(found) > 1:
        raise InvalidRequest(f"two packages provide a tier {scheme}://: {' and '.join(sorted(found))}")
    return next(iter(found))
