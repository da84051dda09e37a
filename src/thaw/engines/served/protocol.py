"""The messages of thaw's client to thaw inside the engine, and the answers. No vLLM and no torch here.

A message travels in `kv_transfer_params["thaw"]` of a plain request (SGLang: `kv_hints`), so it passes through every
front end that vLLM has. Two kinds: `Run` goes with a request that generates; the others are commands, carried by a
request of one token that the connector holds back from scheduling, so that it never changes the shape of a batch: the
client aborts it when the answer is there (or, with `inband`, lets it run its token and finds the answer in the reply).

Messages hold names and numbers only. What is long (a hydrate plan) lies in the mail folder under the message's id; no
path is ever part of a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, TypeAlias

import msgspec

from thaw.core.cache import CacheGroup
from thaw.core.errors import InvalidRequest

VERSION = 9
KEY = "thaw"
Name: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
"""128 random bits, in hex: unguessable, and safe as a file name."""
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
PackName: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}\Z")]
AdapterName: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^b3:[0-9a-f]{64}\Z")]
"""The id of an adapter, of its content."""
MAX_RANKS = 64
SALT = "thaw:"
"""How the cache salt of a lineage begins; one that shares its prefix with everybody has the user's own or none."""
StoreName: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f-]{32,36}\Z")]


MAX_POINTS = 4096
"""Tokens in one message after which a state is to be kept."""
MAX_DROP = 4096
"""Names in one message. With `MAX_RANKS` it keeps every message below 160 KB, whoever sends it."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", forbid_unknown_fields=True):
    """`drop` names records that nobody needs any more. `inband`: answer in the reply, not only in the mail.

    `caller` is who asks: a name that its client has put among the mail's callers. Whoever leaves it out may only send
    requests: it is answered in the reply (`inband` is implied), and what it keeps in the engine counts together with
    what all others without a name keep there.

    `for_owner`: it is about everybody's sessions, so its sender must also have put its id among the mail's grants; who
    may only send requests cannot. `for_sharers`: it works through the mail, or at everybody's cost, so it
    needs a caller.
    """

    for_owner: ClassVar[bool] = False
    for_sharers: ClassVar[bool] = False
    v: int = VERSION
    id: Name
    drop: Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_DROP)] = ()
    inband: bool = False
    caller: Name | None = None

    @property
    def in_reply(self) -> bool:
        """Whether its answer goes back with the request."""
        return self.inband or self.caller is None


class Run(Message, frozen=True, kw_only=True, tag="run"):
    """Go on from the first `num_kv` tokens of `source`; what is computed is kept in `record` when `keep`.

    `group`, `group_size`: the request waits until so many of its group are there, and all start in one step;
    `group_place`: which row of the batch it is to be, from 0, because a kernel may compute rows that lie elsewhere in
    other ways. `mail`: what the scheduler says at the end goes to the mail too, for a reply may be left before its
    end. `grammar_from`: the request has structured outputs, and its tokens from this index on are of the same
    completion: the grammar is told of them before the first new one. `ends_early`: the client may end it some tokens
    before the engine does (at a stop string), and continue from there. `points`: of a model that keeps states, numbers
    of tokens at which a step of the request ends, in its answer or at its prompt's end; the states then are kept.
    `adapter`: the id of the adapter under which it runs (None: the model alone). The engine compares it with the
    request's own, and with the source's.
    """

    record: Name
    source: Name | None = None
    num_kv: Count = 0
    keep: bool = True
    group: Name | None = None
    group_size: Count = 1
    group_place: Count = 0
    mail: bool = False
    grammar_from: Count | None = None
    ends_early: bool = False
    points: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_POINTS)] = ()
    adapter: AdapterName | None = None

    def __post_init__(self) -> None:
        if self.num_kv and self.source is None:
            raise ValueError(f"num_kv={self.num_kv} without a source: name the record that has these tokens")

    def num_new(self, num_tokens: int) -> int:
        """How many of a request's tokens are to be kept anew."""
        return num_tokens - (self.num_kv if self.source is not None else 0) if self.keep else 0


class Fill(Message, frozen=True, kw_only=True, tag="fill"):
    """Read the plan that lies in the mail under this id into the new record `record`. Its first `num_kv` tokens, whole
    slices of the plan, are those that `source` has; they are not read."""

    for_sharers: ClassVar[bool] = True
    record: Name
    source: Name | None = None
    num_kv: Count = 0


class Write(Message, frozen=True, kw_only=True, tag="write"):
    """Write tokens [base, num_kv) of `record` into a pack of a store, rank r into `packs[r]`. `num_kv` None: all
    that is computed by now."""

    for_sharers: ClassVar[bool] = True
    record: Name
    store: StoreName
    packs: Annotated[tuple[PackName, ...], msgspec.Meta(min_length=1, max_length=MAX_RANKS)]
    base: Count = 0
    num_kv: Count | None = None

    def end(self, num_kv: int, num_ranks: int) -> int:
        """Where what is written ends, of a record that has `num_kv` tokens, in an engine of so many ranks. Raises
        `InvalidRequest` for what cannot be written there."""
        end = num_kv if self.num_kv is None else self.num_kv
        if end > num_kv:
            raise InvalidRequest(f"capture of {end} tokens: the session has KV for {num_kv}")
        if self.base > end:
            raise InvalidRequest(f"capture from token {self.base}: the session has KV for {end} tokens")
        if len(self.packs) != num_ranks:
            raise InvalidRequest(f"{len(self.packs)} packs for {num_ranks} ranks: give one to each")
        return end


class EndRun(Message, frozen=True, kw_only=True, tag="end"):
    """The request with the message `run` ends with its next token. So a client stops a request of a model that keeps
    states: one that it takes back may be some tokens ahead of it, and the state that it could continue from is gone."""

    for_sharers: ClassVar[bool] = True
    run: Name


class Pin(Message, frozen=True, kw_only=True, tag="pin"):
    """Hold the record's blocks in the engine for `seconds` (0: let go)."""

    for_sharers: ClassVar[bool] = True
    record: Name
    seconds: Annotated[float, msgspec.Meta(ge=0.0, le=1e6)]


class Unpin(Message, frozen=True, kw_only=True, tag="unpin"):
    """End all pins of the engine, whoever asked for them. Answered at once, also while the engine is paused."""

    for_owner: ClassVar[bool] = True


class Look(Message, frozen=True, kw_only=True, tag="look"):
    """Look at the weights now. `digest`: hash all of them."""

    digest: bool = False


class GetStats(Message, frozen=True, kw_only=True, tag="stats"):
    """Counts: records, blocks, what was captured, loaded and refused; each worker adds its arena."""


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """Who is there? Answered in the reply at once (`inband` is implied)."""


class Switch(Message, frozen=True, kw_only=True, tag="switch"):
    """Turn thaw off (every thaw request is refused, plain ones are untouched) or on again. Without `watch_weights`
    changed weights are not noticed."""

    for_owner: ClassVar[bool] = True
    on: bool
    watch_weights: bool = True


Command: TypeAlias = Fill | Write | EndRun | Pin | Unpin | Look | GetStats | Hello | Switch
_Any: TypeAlias = Run | Fill | Write | EndRun | Pin | Unpin | Look | GetStats | Hello | Switch


def params(message: Message) -> dict[str, Any]:
    """The message as `kv_transfer_params`."""
    return {KEY: msgspec.to_builtins(message)}


def parse(kv_transfer_params: dict[str, Any] | None) -> _Any | None:
    """The message in `kv_transfer_params`, None when there is none. Raises `InvalidRequest`."""
    body = (kv_transfer_params or {}).get(KEY)
    if body is None:
        return None
    if not isinstance(body, dict):
        raise InvalidRequest(f"kv_transfer_params.{KEY}: a message is an object with op and id, not {_shown(body)}")
    version = body.get("v", VERSION)
    if type(version) is not int or version != VERSION:
        raise InvalidRequest(
            f"the message says {_shown(version)} for the version of thaw's protocol; this engine speaks {VERSION}"
        )
    try:
        found: _Any = msgspec.convert(body, _Any)
    except (msgspec.ValidationError, UnicodeError) as error:
        raise InvalidRequest(f"kv_transfer_params.{KEY}: {_short(str(error))}") from None
    return found


MOST_SHOWN = 200


def _shown(value: object) -> str:
    """What a client sent, for an error: a number, or the kind of anything else."""
    if type(value) is int and abs(value) < 1 << 64:
        return str(value)
    return f"a value of type {type(value).__name__}"


def _short(text: str) -> str:
    """In ASCII, and no longer than `MOST_SHOWN`: a client may have sent anything, of any length."""
    found = text[: MOST_SHOWN + 1].encode("ascii", "backslashreplace").decode()
    return found if len(found) <= MOST_SHOWN else f"{found[: MOST_SHOWN - 3]}..."


class Blob(msgspec.Struct, frozen=True, kw_only=True):
    """One blob that a worker wrote: number `index` of cache group `group`, in the segment [start, start + length).

    It holds the segment's tokens from `first` on; a point state's is that after `point` tokens (0: it is none)."""

    group: str
    index: int
    start: int
    length: int
    first: int
    point: int = 0
    blob: str
    pack: str
    offset: int
    nbytes: int


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one process says. `kind` and `error` are set when it failed: an error's kind and its text.

    `num_tokens`, `num_kv`: where the record stands. `local`, `external`: tokens that the engine counted as cached in
    its own blocks and as loaded by the connector, when the request first got blocks. `preempted`: how often its blocks
    were taken away. `epoch` counts changes of the weights. `points`: the numbers of tokens after which the record has
    a state, of a model that keeps states.
    """

    kind: str = ""
    error: str = ""
    num_tokens: int = 0
    num_kv: int = 0
    local: int = 0
    external: int = 0
    preempted: int = 0
    kept: bool = False
    epoch: int = 0
    digest: str = ""
    nbytes: int = 0
    seconds: float = 0.0
    blobs: tuple[Blob, ...] = ()
    packs: dict[str, int] = {}
    stages_s: dict[str, float] = {}
    facts: dict[str, str] = {}
    counts: dict[str, int] = {}
    points: tuple[int, ...] = ()


class WorkerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker posts once its caches are registered. `groups` are the model's, the same for every rank; which of
    their blobs a rank holds follows from `rank` and `world_size` (`cache.held`)."""

    rank: int
    world_size: int
    pid: int
    groups: tuple[CacheGroup, ...]
    layout: dict[str, str]


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler's side posts at boot. `engine`, `version`: the server's.

    `eos_token_ids`: the ends of text that the model's files name. `more_ends`: other tokens at which this server ends a
    request that does not say `ignore_eos`. `overrides`: fields of the model's config, as resolved, that the engine was
    told to run in place of those in its folder. `interior`: its snapshots hold the windows of all tokens.
    `point_multiple`: how many tokens the model's recurrent kernel reads at a time. `sleep_levels`: those of
    `Engine.sleep` that this server, as it was started, sleeps with safely. `max_adapters`: of how many adapters
    requests may be in one step; 0 where it runs none. `takes_mail`: it looks for commands in the mail, too."""

    protocol: int
    thaw: str
    engine: str = "vLLM"
    version: str
    pid: int
    model: str
    dtype: str
    max_model_len: int
    max_logprobs: int
    block_size: int
    num_blocks: int
    world_size: int
    prefix_caching: bool
    runner: str
    data_parallel_rank: int = 0
    reasons: bool = False
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    more_ends: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    overrides: dict[str, Any] = {}
    interior: bool = False
    point_multiple: int = 1
    sleep_levels: tuple[int, ...] = ()
    max_adapters: int = 0
    takes_mail: bool = False


PER_WORKER = ("arena_nbytes", "spilled_nbytes", "state_copies", "reader_loads", "reader_waits")
"""Counts that every worker has its own of."""


def merge(answers: Sequence[Answer]) -> Answer:
    """What all ranks said as one: the first error, else the sums."""
    for answer in answers:
        if answer.kind:
            return answer
    first = answers[0]
    return Answer(
        num_tokens=first.num_tokens,
        num_kv=first.num_kv,
        epoch=max(answer.epoch for answer in answers),
        digest=" ".join(answer.digest for answer in answers if answer.digest),
        nbytes=sum(answer.nbytes for answer in answers),
        seconds=max(answer.seconds for answer in answers),
        blobs=tuple(blob for answer in answers for blob in answer.blobs),
        packs={name: nbytes for answer in answers for name, nbytes in answer.packs.items()},
        stages_s={k: max(a.stages_s.get(k, 0.0) for a in answers) for k in first.stages_s},
        counts={**first.counts, **{k: sum(a.counts[k] for a in answers) for k in first.counts if k in PER_WORKER}},
    )
