"""How the ranks of one SGLang decide alike.

With tensor parallel every rank is a process with a scheduler, a tree and slots of its own. SGLang gives all of them the
same requests in the same step and counts on each deciding alike: a rank whose tree holds what another's does not would
soon run another batch, and all would wait for each other for ever. What one rank alone can know is therefore agreed
before anything follows from it:

    what worked on this rank        the least of all ranks, and the first one's error (`RankConsensus`)
    what is over by the clock       by the first rank's, told with SGLang's own requests (`Due`)

A collective runs on the scheduler's thread, for a request of thaw's only, and whether one runs depends on nothing but
what all ranks know alike. With one rank there is none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from thaw.core.errors import ThawError
from thaw.engines.error_kinds import made
from thaw.engines.served.guard import described

T = TypeVar("T")


@dataclass(frozen=True)
class Due:
    """What is over: records that nobody used, pins, groups that waited long enough; and commands that were left in the
    mail. It travels pickled, and is applied by all ranks, the first one too, before the requests of the same step."""

    records: tuple[str, ...] = ()
    pins: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    commands: tuple[bytes, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.records or self.pins or self.groups or self.commands)


class RankConsensus:
    """Between the `size` ranks of `group`, a group of processes that reaches host memory."""

    def __init__(self, group: Any = None, rank: int = 0, size: int = 1) -> None:
        self._group, self._rank, self._size = group, rank, size

    def least(self, value: int) -> int:
        """The least of what all ranks say."""
        if self._size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self._group)
        return int(tensor)

    def of_first(self, value: int) -> int:
        """What the first rank says."""
        return self.least(value if self._rank == 0 else sys.maxsize)

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives on this rank, when it worked on all. Raises on all ranks what the first one raised for
        which it did not. `work` runs no collective."""
        result, own = None, None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - all ranks must come to the collective
            own = described(error)
        if not self.least(own is None):
            raise self._first(own)
        return result  # type: ignore[return-value]

    def _first(self, own: ThawError | None) -> ThawError:
        if self._size == 1:
            assert own is not None
            return own
        said: list[Any] = [None] * self._size
        dist.all_gather_object(said, None if own is None else (own.kind, str(own)), group=self._group)
        rank, (kind, text) = next((rank, words) for rank, words in enumerate(said) if words is not None)
        return own if own is not None and rank == self._rank else made(kind, text)
