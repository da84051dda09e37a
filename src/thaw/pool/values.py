"""What goes into a round and what comes out: branches, results, decisions, timings, statistics. No engine here."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import msgspec

from thaw.core.errors import InvalidRequest, ThawError
from thaw.core.proof import Proof
from thaw.engines.base import Usage
from thaw.pool.history import History
from thaw.repo.trajectory import Trajectory, of_turns

if TYPE_CHECKING:
    from thaw.pool.session import PoolSession

LoadPolicy = Literal["exact", "fast"]
"""`exact`: stored KV is always loaded. `fast`: prefilled again where the planner expects that sooner; it says so."""
Action = Literal["fork", "hydrate", "prefill"]
Tier = Literal["engine", "arena", "disk", "node", "none"]
"""`node`: on another node, from where it is fetched first."""


@dataclass(frozen=True)
class Branch:
    """One way to go on. `prompt` (or `token_ids`) is appended first; with neither the branch just generates.

    `sampling`, `seed` and `timeout_s` replace the round's. `resume` continues with the completion that the point
    interrupts. Without a seed branch i gets derive(the point's seed, position, i), in whichever worker it runs.
    """

    prompt: str = ""
    token_ids: tuple[int, ...] | None = None
    sampling: object = None
    seed: int | None = None
    timeout_s: float | None = None
    resume: bool = False


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker came to have the point: `action` in `worker`, from `tier`.

    `predicted_s` and `alternatives` (action -> seconds) are the planner's before, None and absent where nothing was
    measured yet; `measured_s` is what it took. `num_prefilled_tokens`: tokens of the point run through the model here.
    `link`: the address of the node that its KV comes from, where that is another one.
    """

    action: Action
    tier: Tier
    worker: str
    policy: LoadPolicy
    reason: str
    predicted_s: float | None = None
    measured_s: float = 0.0
    alternatives: dict[str, float] = {}
    nbytes: int = 0
    num_prefilled_tokens: int = 0
    link: str = ""


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one branch's last attempt, and `total_s` from submission to result.

    `prepare_s` is getting the point into the worker (its parts are `capture_s` and `hydrate_s`), shared by the batch.
    `ttft_s` and `decode_s` are the engine's own: to the first token, and from it to the last.
    """

    queue_s: float = 0.0
    prepare_s: float = 0.0
    capture_s: float = 0.0
    hydrate_s: float = 0.0
    fork_s: float = 0.0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0


class BranchDelta(msgspec.Struct, frozen=True, kw_only=True):
    """News of one branch. `attempt` above the last one seen: the branch was begun again, forget its earlier deltas."""

    index: int
    attempt: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: Literal["stop", "length", "abort"] | None = None


@dataclass(frozen=True)
class BranchResult:
    """One branch's end. With `error` set it has what was generated before (perhaps nothing), and no session.

    `proof` is the branch's own: what it shares of its point, as the engine counted. `restore` is the point's, where
    that was hydrated into this worker (for this round or an earlier one). `session` can be committed, continued with,
    and is itself a point of this pool; it lives as long as somebody holds it, until `close`, or until its worker
    dies. `attempts` above 1: workers failed and it was begun again.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    entropies: tuple[float, ...] | None = None
    finish_reason: Literal["stop", "length", "abort"] | None = None
    stop_reason: str | int | None = None
    seed: int = 0
    usage: Usage | None = None
    proof: Proof | None = None
    restore: Proof | None = None
    decision: Decision | None = None
    timings: Timings = field(default_factory=Timings)
    worker: str = ""
    attempts: int = 0
    session: PoolSession | None = None
    error: ThawError | None = None
    history: History | None = None

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def num_cached_tokens(self) -> int:
        """As the engine counted them."""
        return 0 if self.usage is None else self.usage.num_cached_tokens

    @cached_property
    def trajectory(self) -> Trajectory:
        """Prompt ids, completion ids, logprobs, mask and policy versions, from the first token of the point on; the
        point's own tokens are inherited (`own_mask`)."""
        if self.history is None:
            raise InvalidRequest(f"branch {self.index} did not run: {self.error}")
        return of_turns(self.history.tokens, self.history.turns, len(self.history.before))

    def close(self) -> None:
        """Forget the session. Closing twice is fine."""
        if self.session is not None:
            self.session.close()


class WorkerStats(msgspec.Struct, frozen=True, kw_only=True):
    """A worker now, and what it has done since the pool began (through restarts)."""

    name: str
    state: str
    pid: int | None
    running: int
    resident_points: int
    incarnation: int
    num_branches: int
    num_failures: int
    boot_s: float


class ArenaStats(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of packs in shared memory and spilled to disk, against the limit; counts since the pool began."""

    path: str
    nbytes: int
    limit_nbytes: int
    spilled_nbytes: int
    num_points: int
    num_captures: int
    num_spills: int
    num_loads: int


class PoolStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the pool; `rates` are the planner's, by name."""

    workers: tuple[WorkerStats, ...]
    arena: ArenaStats
    waiting: int
    running: int
    num_rounds: int
    num_branches: int
    num_retries: int
    policy_version: str
    rates: dict[str, float] = {}
