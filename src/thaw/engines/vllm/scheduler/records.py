"""What the engine's scheduler knows of a session's KV. Its bytes are in the workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thaw.engines.served.budget import GUEST, Caller
from thaw.engines.served.late_groups import LateGroup


@dataclass
class SchedulerRecord:
    """`tokens[:num_kv]` have KV in the workers' arena; `chain[i]` is the content number of full block i. `leaving`:
    some of it may still be on its way there, out of the blocks of the request that runs. `caller`: whose it is.
    `late`: the groups of which earlier tokens are not there."""

    tokens: list[int]
    num_kv: int
    chain: list[int]
    live: Any = None
    leaving: bool = False
    touched: float = 0.0
    caller: Caller = GUEST
    late: tuple[LateGroup, ...] = ()
