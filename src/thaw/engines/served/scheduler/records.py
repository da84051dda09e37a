"""What an engine keeps of sessions: records by name, in the order of their last use. What a record has is its own."""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from typing import Any, Generic, Protocol, TypeVar

from thaw.core.errors import NotFound
from thaw.engines.served.budget import MAX_RECORDS, Budget, Caller, Shares

LOOKED_AT = 64
"""How many of the oldest are looked at when there is something to tidy."""


class KeptRecord(Protocol):
    """`live`: the request that extends it, if one does. `touched`: when it was last used, by the monotonic clock.
    `caller`: whose it is."""

    live: Any
    touched: float
    caller: Caller


R = TypeVar("R", bound=KeptRecord)


class Records(Generic[R]):
    """`ttl_s`: what nobody used for so long is overdue. `shares`: of `MAX_RECORDS`."""

    def __init__(self, ttl_s: float, shares: Shares) -> None:
        self._ttl_s = ttl_s
        self._budget = Budget("records", MAX_RECORDS, shares)
        self._kept: OrderedDict[str, R] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, name: str) -> R | None:
        return self._kept.get(name)

    def known(self, name: str) -> R:
        """Raises `NotFound` for one that is gone."""
        record = self._kept.get(name)
        if record is None:
            raise NotFound("the engine has let go of this session (it restarted, or the session was idle too long)")
        return record

    def require_room(self, name: str, caller: Caller) -> None:
        """Raises `Busy` where the caller may not have one more, of this name."""
        if name not in self._kept:
            self._budget.require(caller)

    def keep(self, name: str, record: R) -> None:
        self.drop(name)
        self._budget.take(record.caller)
        self._kept[name] = record
        self.touch(name)

    def touch(self, name: str) -> None:
        self._kept[name].touched = time.monotonic()
        self._kept.move_to_end(name)

    def drop(self, name: str) -> bool:
        """Whether it was there."""
        record = self._kept.pop(name, None)
        if record is None:
            return False
        self._budget.give_back(record.caller)
        return True

    def overdue(self) -> tuple[str, ...]:
        """The names of those that have had their time, the oldest first; at most `LOOKED_AT` at once."""
        limit = time.monotonic() - self._ttl_s
        oldest = itertools.islice(self._kept.items(), LOOKED_AT)
        found = itertools.takewhile(lambda item: item[1].touched < limit, oldest)
        return tuple(name for name, _ in found)

    def unused(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `names` that no request extends; the others count as used now."""
        idle = []
        for name in names:
            record = self._kept.get(name)
            if record is not None and record.live is not None:
                self.touch(name)
            else:
                idle.append(name)
        return tuple(idle)
