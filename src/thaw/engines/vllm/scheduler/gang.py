"""Groups: requests that are to start in one step, so that their batch has one shape from its first token on.

A batch's rows are in the order in which requests come: the client sends them in order, and here it is only counted
when they come otherwise."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field

GROUP_LIMIT_S = 10.0
"""Members of a group wait for each other no longer than this: one of them may never come."""
REMEMBERED = 1000
SPLIT = -1


@dataclass
class RequestGroup:
    """`since`: when the first of them came. `shuffled`: somebody did not come in turn."""

    since: float
    shuffled: bool = False
    members: set[str] = field(default_factory=set)


class Groups:
    """Names of requests by their group's name. `num_split`: groups that began, but not in one step. `num_shuffled`:
    groups whose members came in another order than that of their places."""

    def __init__(self) -> None:
        self._open: dict[str, RequestGroup] = {}
        self._waiting: set[str] = set()
        self._started: OrderedDict[str, None] = OrderedDict()
        self._began: OrderedDict[str, int] = OrderedDict()
        self._step = 0
        self.num_split = 0
        self.num_shuffled = 0

    def join(self, name: str, size: int, place: int, member: str) -> None:
        """Members wait until all are there. One that comes after the start waits for nobody."""
        if name in self._started:
            return
        group = self._open.setdefault(name, RequestGroup(time.monotonic()))
        if place != len(group.members) and not group.shuffled:
            group.shuffled = True
            self.num_shuffled += 1
        group.members.add(member)
        self._waiting.add(member)
        if len(group.members) >= size:
            self.start(name)

    def waits(self, name: str | None, member: str) -> bool:
        """Whether the member is to wait on. A group that misses somebody for too long starts without."""
        if member not in self._waiting or name is None:
            return False
        group = self._open.get(name)
        if group is not None and time.monotonic() - group.since > GROUP_LIMIT_S:
            self.start(name)
        return member in self._waiting

    def start(self, name: str) -> None:
        """All are there, or one is gone, or did not come: nobody waits for it any more."""
        group = self._open.pop(name, None)
        if group is not None:
            self._waiting -= group.members
        self._started[name] = None
        while len(self._started) > REMEMBERED:
            self._started.popitem(last=False)

    def step_begins(self) -> None:
        self._step += 1

    def begins(self, name: str | None) -> None:
        """A member has its first step. Groups that begin in one step are equal batches; others count."""
        if name is None:
            return
        first = self._began.setdefault(name, self._step)
        if first not in (self._step, SPLIT):
            self._began[name] = SPLIT
            self.num_split += 1
        while len(self._began) > REMEMBERED:
            self._began.popitem(last=False)
