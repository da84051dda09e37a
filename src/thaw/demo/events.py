"""What happens in the demo, as small values: a worker writes them to its stdout, one JSON line each, and whoever tells
the story draws them as they come. Times are seconds, measured where they are named.
"""

from __future__ import annotations

import msgspec

from thaw.core.proof import Proof


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", forbid_unknown_fields=True):
    """Common settings: immutable, `event` says which."""


class WorkerStarted(_Event, frozen=True, kw_only=True, tag="started"):
    """A process of its own is there and loads the engine."""

    role: str
    pid: int


class ModelLoaded(_Event, frozen=True, kw_only=True, tag="loaded"):
    model: str
    engine: str
    device: str
    seconds: float


class Reading(_Event, frozen=True, kw_only=True, tag="reading"):
    done: int
    total: int


class DocumentRead(_Event, frozen=True, kw_only=True, tag="read"):
    """The document has KV: `seconds` of prefill, nothing else."""

    num_tokens: int
    seconds: float


class Committed(_Event, frozen=True, kw_only=True, tag="committed"):
    commit: str
    branch: str
    num_tokens: int
    nbytes: int
    seconds: float


class Answered(_Event, frozen=True, kw_only=True, tag="answered"):
    """The parent's own answer: uninterrupted in the first process, resumed in the second."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    ttft_s: float
    total_s: float


class ChildrenHydrated(_Event, frozen=True, kw_only=True, tag="hydrated"):
    """`seconds`: from the call to sessions that are ready, identity checked, bytes read and hashed."""

    num_children: int
    num_kv: int
    seconds: float
    proof: Proof


class ChildSaid(_Event, frozen=True, kw_only=True, tag="said"):
    """News of child `index`."""

    index: int
    text: str


class ChildAnswered(_Event, frozen=True, kw_only=True, tag="child"):
    """A child's whole answer, what the engine counted for it, and where it was committed.

    `num_suffix_tokens`: its question. `ttft_s`: from the start of the batch, in which all children answer at once.
    """

    index: int
    question: str
    text: str
    token_ids: tuple[int, ...]
    num_suffix_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_prefilled_tokens: int
    ttft_s: float
    commit: str
    branch: str


class Described(_Event, frozen=True, kw_only=True, tag="described"):
    """Which model ran, for the receipt."""

    architecture: str
    dtype: str
    identity: str
    kv_token_nbytes: int


class WorkerFailed(_Event, frozen=True, kw_only=True, tag="failed"):
    """An error of thaw's own ended the worker."""

    kind: str
    message: str


class Ended(_Event, frozen=True, kw_only=True, tag="ended"):
    """The process is gone, and with it everything that it had in memory."""

    role: str
    pid: int
    seconds: float


Event = (
    WorkerStarted
    | ModelLoaded
    | Reading
    | DocumentRead
    | Committed
    | Answered
    | ChildrenHydrated
    | ChildSaid
    | ChildAnswered
    | Described
    | WorkerFailed
    | Ended
)
