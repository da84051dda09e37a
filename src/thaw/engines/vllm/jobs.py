"""What the scheduler's side tells the workers' side to do before a step's forward pass, in order.

Every worker gets the same list and works through it on its own blobs. `tables` are block ids of the engine's cache, for
each of its KV cache groups that keep tokens, in token order from token 0. `state_blocks`: for each of its groups that
keep states, the block in which one state lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

RECENT_STATES = 8
"""Of a request that its client may end early, the states after so many of its last steps are kept: whoever looks for a
stop string finds it a few of them late."""
Tables: TypeAlias = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ForkRecord:
    """Record `record` becomes the first `num_kv` tokens of `source` (which may be itself, or None: empty), and
    `caller`'s."""

    record: str
    source: str | None
    num_kv: int
    caller: str


@dataclass(frozen=True)
class SaveBlocks:
    """Copy tokens up to `num_kv` that the record lacks out of the engine's blocks. `finished`: a request whose blocks
    are held until that is done, and what was begun for the record before. `now`: vLLM gives the blocks away in this
    very step, so all of that is done when the job is. `over`: nobody continues from an earlier step of the request, so
    the states of its last steps are released. `state_blocks`: where the state after `num_kv` tokens lies, where the
    model keeps states."""

    record: str
    tables: Tables
    num_kv: int
    finished: str | None = None
    now: bool = False
    over: bool = False
    state_blocks: tuple[int, ...] = ()

    @property
    def before_forward(self) -> bool:
        """Whether the step's forward pass may write over what this reads: blocks that vLLM has given away, or the state
        of a request that goes on."""
        return self.now or (bool(self.state_blocks) and self.finished is None)


@dataclass(frozen=True)
class Load:
    """Bring tokens [start, stop) of the record into the request's blocks, and the state after `stop` tokens where the
    model keeps states. `name` is the message's id, for errors."""

    request: str
    name: str
    record: str
    tables: Tables
    start: int
    stop: int
    background: bool
    state_blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class KeepState:
    """The record's request has computed `num_kv` tokens once this step is over: keep the state of then. `lasting`: for
    as long as the record has these tokens, for it was asked for; else beside those of the last few steps, because the
    client may end the request early."""

    record: str
    state_blocks: tuple[int, ...]
    num_kv: int
    lasting: bool = False


@dataclass(frozen=True)
class CheckRecord:
    """Nothing to load (all is in the engine's blocks), but the record must still be of the weights that run, and have
    what goes on after `num_kv` tokens needs."""

    request: str
    name: str
    record: str
    tables: Tables
    num_kv: int


@dataclass(frozen=True)
class Fail:
    """Report the request's load as failed: vLLM then ends that request alone. `background`: the load is not part of
    this step, and the request ends before anything is computed."""

    request: str
    tables: Tables
    background: bool = True


@dataclass(frozen=True)
class ReadPlan:
    """Fill `record` of `caller` from the plan `name` in the mail; the first `shared` tokens are those of `source`."""

    name: str
    record: str
    caller: str
    source: str | None = None
    shared: int = 0


@dataclass(frozen=True)
class WriteRecord:
    """Write tokens [base, num_kv) of the record, rank r into `packs[r]`. `num_tokens` goes back with the answer."""

    name: str
    record: str
    store: str
    packs: tuple[str, ...]
    base: int
    num_kv: int
    num_tokens: int


@dataclass(frozen=True)
class LookAtWeights:
    name: str
    digest: bool


@dataclass(frozen=True)
class Count:
    """Answer with what the arena holds, and `counts` of the scheduler's side."""

    name: str
    counts: dict[str, int]


@dataclass(frozen=True)
class Watch:
    """Look at the weights where KV is used, or leave that."""

    name: str
    on: bool


@dataclass(frozen=True)
class Forget:
    records: tuple[str, ...]


Job: TypeAlias = (
    ForkRecord
    | SaveBlocks
    | Load
    | CheckRecord
    | Fail
    | ReadPlan
    | WriteRecord
    | LookAtWeights
    | Count
    | Watch
    | Forget
)
