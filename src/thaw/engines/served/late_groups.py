"""Groups with a window of which a session has the last tokens alone: it came from a snapshot, which holds no more.

The client and the engine ask this in the same words. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from thaw.core.cache import CacheGroup, TokenGroup, keeps_all, token_groups
from thaw.core.errors import NotKept
from thaw.engines import restoring
from thaw.engines.base import HydratePlan


class LateGroup(NamedTuple):
    """`first`: the first of the group's tokens that are there, up to the session's end and beyond. Before it the
    engine's blocks hold what others left there."""

    group: TokenGroup
    first: int

    def next_kept(self) -> int:
        """The least number of tokens from which on any can be gone on after."""
        at = self.first
        while self.group.covers(at).start < self.first:
            at += self.first - self.group.covers(at).start
        return at


def late_groups(plan: HydratePlan, groups: Sequence[CacheGroup]) -> tuple[LateGroup, ...]:
    """Those of a session that is hydrated from the plan. Raises `CorruptBlob` where it is not of these groups."""
    windows = [group for group in token_groups(groups) if not keeps_all([group])] if plan.num_kv else []
    found = [(group, restoring.kept_from(restoring.runs(plan, group), plan.num_kv)) for group in windows]
    return tuple(LateGroup(group, first) for group, first in found if first)


def require_kept(late: Sequence[LateGroup], num_kv: int) -> None:
    """Raise `NotKept` where a session with these groups cannot go on after `num_kv` tokens."""
    for one in late:
        covered = one.group.covers(num_kv)
        if covered and covered.start < one.first:
            point = max(other.next_kept() for other in late) + 1
            raise NotKept(
                f"after {num_kv} tokens the group {one.group.name} needs tokens {covered.start} to "
                f"{covered.stop - 1}; this session came from a snapshot, which has them from {one.first} on. Continue "
                f"from token {point} or a later one, or hydrate a commit that ends here"
            )
