"""What the engine's scheduler knows of a session's KV. Its bytes are in the workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from thaw.core.cache import list_of
from thaw.core.errors import NotKept
from thaw.engines.served.budget import GUEST, Caller
from thaw.engines.served.late_groups import LateGroup
from thaw.engines.vllm.jobs import RECENT_STATES


@dataclass
class SchedulerRecord:
    """`tokens[:num_kv]` have KV in the workers' arena; `chain[i]` is the content number of full block i. `leaving`:
    some of it may still be on its way there, out of the blocks of the request that runs. `caller`: whose it is.
    `late`: the groups of which earlier tokens are not there. `points`, `recent`: the numbers of tokens after which a
    recurrent model's states are kept, for as long as the record is, and until it goes on for some steps. `adapter`: the
    id of the one that computed the KV."""

    tokens: list[int]
    num_kv: int
    chain: list[int]
    live: Any = None
    leaving: bool = False
    touched: float = 0.0
    caller: Caller = GUEST
    late: tuple[LateGroup, ...] = ()
    points: set[int] = field(default_factory=set)
    recent: list[int] = field(default_factory=list)
    adapter: str | None = None

    @property
    def states(self) -> tuple[int, ...]:
        """The numbers of tokens after which there is a state."""
        return tuple(sorted({*self.points, *self.recent}))

    def stepped(self, num_kv: int, *, lasting: bool = False) -> None:
        """A step ends after so many tokens, and its state is kept; for as long as the record is, where that was asked
        for."""
        if lasting:
            self.points.add(num_kv)
        else:
            self.recent = [*self.recent, num_kv][-RECENT_STATES:]

    def require_state(self, num_kv: int) -> None:
        """Raise `NotKept` unless there is a state after so many tokens; after none there is nothing to keep."""
        if num_kv and num_kv not in self.points and num_kv not in self.recent:
            raise NotKept(
                f"no state is kept after {num_kv} tokens: this session has states after {list_of(self.states)}. Go on "
                f"from one of these, {NotKept.way_out}"
            )
