"""What the engine keeps of sessions: records by name, in order of their last use. Their bytes are in the workers."""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from thaw.core.errors import NotFound

MAX_RECORDS = 100_000
LOOKED_AT = 64
"""How many of the oldest are looked at when there is something to tidy."""


@dataclass
class Record:
    """`tokens[:num_kv]` have KV in the workers' arena; `chain[i]` is the content number of full block i. `leaving`:
    some of it may still be on its way there, out of the blocks of the request that runs."""

    tokens: list[int]
    num_kv: int
    chain: list[int]
    live: Any = None
    leaving: bool = False
    touched: float = 0.0


class Records:
    """`ttl_s`: what nobody used for so long is stale, unless a request extends it."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._kept: OrderedDict[str, Record] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, name: str) -> Record | None:
        return self._kept.get(name)

    def known(self, name: str) -> Record:
        """Raises `NotFound` for one that is gone."""
        record = self._kept.get(name)
        if record is None:
            raise NotFound("the engine has let go of this session (it restarted, or the session was idle too long)")
        return record

    def keep(self, name: str, record: Record) -> None:
        self._kept[name] = record
        self.touch(name)

    def touch(self, name: str) -> None:
        self._kept[name].touched = time.monotonic()
        self._kept.move_to_end(name)

    def drop(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of `names` that were there."""
        return tuple(name for name in names if self._kept.pop(name, None) is not None)

    def stale(self) -> Iterator[str]:
        """Names of records to let go of, the oldest first. One at a time: dropping one makes room for the next."""
        limit = time.monotonic() - self._ttl_s
        for name in list(itertools.islice(self._kept, LOOKED_AT)):
            record = self._kept[name]
            if record.touched >= limit and len(self._kept) <= MAX_RECORDS:
                return
            if record.live is not None:
                self.touch(name)
            else:
                yield name
