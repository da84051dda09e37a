"""The objects: what a snapshot is made of, before any file.

A *segment* is a run of at most 256 tokens with the blobs of its KV: those of each cache group (`thaw.core.cache`), for
full ones one a KV head. A *node* lists up to 64 entries; a *state* lists nodes, so that a commit writes what is new and
not what is long. A *state* is a session at a point, content-addressed: nothing in it names a machine or a time. A
*commit* puts it into history, that of one namespace. A *turn* is one prompt or one completion, with its text; a prompt
that was rendered from messages has them with it.

    commit ──> state ──> model identity
                 ├─────> node (64 segments) ──> segment ──> blobs
                 ├─────> node (64 turns) ─────> turn
                 └─────> boundary (blob of the last hidden state)

Tokens [0, num_kv) have KV and stand in the segments; tokens [num_kv, num_tokens) stand in `tail_tokens` (the last
sampled token has no KV yet). Every object is canonical JSON with a `type` of name and version.
"""

from __future__ import annotations

import contextlib
from typing import Annotated, Literal

import msgspec

from thaw.core import canonical, kv_ranges, namespaces
from thaw.core.canonical import U64
from thaw.core.errors import CorruptBlob, InvalidRequest
from thaw.core.identity import GroupedIdentity, ModelIdentity
from thaw.core.ids import BlobId, CommitId, ObjectId, StateId, digest
from thaw.core.kv_ranges import KVRange
from thaw.core.prefix import WINDOW
from thaw.core.sampling import Sampling

NODE_ENTRIES = 64
MAX_TOKENS = 1 << 24
Id = Annotated[str, msgspec.Meta(pattern=r"^b3:[0-9a-f]{64}$", max_length=67)]
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class _Object(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    """Common settings: immutable, no unknown fields, `type` first."""


class Segment(_Object, frozen=True, kw_only=True, tag="thaw.segment/1"):
    """Tokens [start, start + len(tokens)) and their KV; never crosses a multiple of 256, never re-cut.

    `window`: the chained hash of all tokens before this segment's window; `prefix`: of all tokens through its end.
    `blobs[group][i]` names the group's i-th blob of exactly these tokens; for full groups the i-th KV head's
    [layer][K|V][token][head_dim]. A group with a window has none where the segment lies before it.
    """

    start: Count
    tokens: Annotated[tuple[TokenId, ...], msgspec.Meta(min_length=1, max_length=WINDOW)]
    window: Id
    prefix: Id
    blobs: dict[str, tuple[Id, ...]]

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def first_of(self, group: str) -> int:
        """The token that the group's blobs begin with."""
        return self.start

    @property
    def states(self) -> tuple[StatesAtToken, ...]:
        """The point states that are kept in it."""
        return ()


class StatesAtToken(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The point states after exactly `token` tokens: `blobs[group]` are all blobs of the group's."""

    token: Count
    blobs: dict[str, tuple[Id, ...]]


class GroupedSegment(Segment, frozen=True, kw_only=True, tag="thaw.segment/2"):
    """A segment that says more than its tokens' blobs.

    `first`: group -> the token that its blobs begin with, where that is after `start`. `points`: the states that were
    kept at tokens in (start, end], in order.
    """

    first: dict[str, Count] = {}
    points: tuple[StatesAtToken, ...] = ()

    def __post_init__(self) -> None:
        if not self.first and not self.points:
            raise ValueError("a segment without `first` and `points` is a thaw.segment/1")
        for group, token in self.first.items():
            if group not in self.blobs or not self.start < token < self.end:
                raise ValueError(f"{group}: blobs from token {token} on in a segment of [{self.start}, {self.end})")
        tokens = [point.token for point in self.points]
        if tokens != sorted(set(tokens)) or any(not self.start < token <= self.end for token in tokens):
            raise ValueError(f"point states at {tokens[:8]} in a segment of [{self.start}, {self.end})")

    def first_of(self, group: str) -> int:
        return self.first.get(group, self.start)

    @property
    def states(self) -> tuple[StatesAtToken, ...]:
        return self.points


def with_points(segment: Segment, first: dict[str, int], points: tuple[StatesAtToken, ...]) -> GroupedSegment:
    """The same tokens and blobs, with where windows begin and the states that were kept."""
    fields = {name: getattr(segment, name) for name in Segment.__struct_fields__}
    return GroupedSegment(**fields, first=first, points=points)


class SegmentEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first `length` tokens of `segment`, standing at `start`."""

    segment: Id
    start: Count
    length: Annotated[int, msgspec.Meta(ge=1, le=WINDOW)]


class SegmentNode(_Object, frozen=True, kw_only=True, tag="thaw.segments/1"):
    entries: Annotated[tuple[SegmentEntry, ...], msgspec.Meta(min_length=1, max_length=NODE_ENTRIES)]


class TurnNode(_Object, frozen=True, kw_only=True, tag="thaw.turns/1"):
    entries: Annotated[tuple[Id, ...], msgspec.Meta(min_length=1, max_length=NODE_ENTRIES)]


class Turn(_Object, frozen=True, kw_only=True, tag="thaw.turn/1"):
    """Tokens [start, end): a prompt that was appended, or a completion that was generated.

    `text` of a completion is what the caller saw (a stop string is cut off). `finish_reason` None with kind
    "completion": captured in the middle; going on continues it under `sampling` with `seed`. `logprobs[i]` is the raw
    log probability of token start+i; `top_logprobs[i]` its alternatives as (token, logprob).
    `policy` is the policy version that sampled it. `entropies[i]`, where they were asked for: of the distribution that
    the log probability is of, in nats; else left out of the object, so that turns without keep their ids.
    """

    kind: Literal["prompt", "completion"]
    start: Count
    end: Count
    role: str | None = None
    text: str = ""
    sampling: Sampling | None = None
    seed: U64 | None = None
    finish_reason: Literal["stop", "length", "abort"] | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[tuple[TokenId, float], ...], ...] | None = None
    policy: str = "0"
    entropies: tuple[float, ...] | msgspec.UnsetType = msgspec.UNSET


class ChatSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a conversation is rendered with, besides its messages: `tools` (JSON texts), `variables` (the template's
    own, name -> JSON text) and `moment`, the local time that the template reads (ISO 8601; None where it reads none).
    """

    tools: tuple[str, ...] = ()
    variables: dict[str, str] = {}
    moment: str | None = None


class Chat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the tokens [begin, end of the turn) of a conversation were rendered from, so that it can be rendered again.

    `messages` are JSON texts, as the caller gave them (the order of their keys is kept). Before `begin` the
    conversation is what earlier turns say; turns from `begin` on are told anew here. With `continue_final_message` the
    completion that follows is the rest of the last message. `settings` hold from here on; None: those before `begin`.
    """

    begin: Count
    messages: tuple[str, ...]
    continue_final_message: bool = False
    settings: ChatSettings | None = None


class ChatTurn(Turn, frozen=True, kw_only=True, tag="thaw.turn/2"):
    """A prompt that was rendered from messages."""

    chat: Chat

    def __post_init__(self) -> None:
        if self.kind != "prompt" or self.chat.begin > self.start:
            raise ValueError(
                f"messages belong to a prompt and begin at or before it; this {self.kind} at token {self.start} has "
                f"some from token {self.chat.begin} on"
            )


AnyTurn = Turn | ChatTurn


def with_chat(turn: Turn, chat: Chat) -> ChatTurn:
    """The same prompt, with the messages that it was rendered from."""
    return ChatTurn(**{name: getattr(turn, name) for name in Turn.__struct_fields__}, chat=chat)


def without_chat(turn: Turn) -> Turn:
    """The turn as tokens and text alone: what is left when it is cut through, with part of its messages gone."""
    if not isinstance(turn, ChatTurn):
        return turn
    return Turn(**{name: getattr(turn, name) for name in Turn.__struct_fields__})


class Boundary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The last logits the session computed: those that predict the token at `position`.

    `digest`: of the float32 logits; `top`: the largest raw log probabilities; `batch`: how many sequences the step
    held (bit equality is promised at equal batch shape). With position == num_tokens the hidden state behind them is
    kept too (`hidden`, a blob), so that the next token needs no forward pass and is exact.
    """

    position: Count
    digest: Id
    top: tuple[tuple[TokenId, float], ...]
    batch: Annotated[int, msgspec.Meta(ge=1)]
    hidden: Id | None = None
    hidden_dtype: str | None = None
    hidden_shape: tuple[int, ...] = ()


class State(_Object, frozen=True, kw_only=True, tag="thaw.state/1"):
    """A session at a point. Equal sessions have equal ids, wherever and whenever they were captured."""

    model: Id
    num_tokens: Count
    num_kv: Count
    nodes: tuple[Id, ...]
    tail_tokens: Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=WINDOW)]
    turn_nodes: tuple[Id, ...]
    num_turns: Count
    seed: U64
    salt: str
    share_prefix: bool = False
    boundary: Boundary | None = None

    def __post_init__(self) -> None:
        if self.num_kv + len(self.tail_tokens) != self.num_tokens:
            raise ValueError(
                f"num_kv {self.num_kv} and {len(self.tail_tokens)} tail tokens do not make num_tokens {self.num_tokens}"
            )

    @property
    def ranges(self) -> tuple[KVRange, ...]:
        """Which weights computed the KV; () where those of `model` computed all of it."""
        return ()


class StaleState(State, frozen=True, kw_only=True, tag="thaw.state/2"):
    """A state with KV of other weights than `model`'s, kept because somebody asked for it (`stale_kv`).

    `kv_ranges` cover exactly [0, num_kv). `model` is what ran when it was captured. Its segments' prefix hashes begin
    at the lineage's own root (`prefix.stale_root`), so `match` never meets them.
    """

    kv_ranges: tuple[KVRange, ...]

    def __post_init__(self) -> None:
        State.__post_init__(self)
        kv_ranges.check(self.kv_ranges, self.num_kv)

    @property
    def ranges(self) -> tuple[KVRange, ...]:
        return self.kv_ranges


def with_ranges(state: State, ranges: tuple[KVRange, ...]) -> State:
    """The same state, with which weights computed its KV, where that is not `model`'s alone."""
    fields = {name: getattr(state, name) for name in State.__struct_fields__}
    return StaleState(**fields, kv_ranges=ranges) if ranges else state


class Commit(_Object, frozen=True, kw_only=True, tag="thaw.commit/1"):
    """A state in history. `origin` records engine, version, device and numerics; it is not part of compatibility."""

    state: Id
    parents: Annotated[tuple[Id, ...], msgspec.Meta(max_length=16)]
    message: str
    time_ns: U64
    branch: str | None = None
    meta: dict[str, str] = {}
    origin: dict[str, str] = {}

    @property
    def of_namespace(self) -> str:
        """Whose it is; the default namespace is "" (`thaw.core.namespaces`)."""
        return ""


class NamespacedCommit(Commit, frozen=True, kw_only=True, tag="thaw.commit/2"):
    """A commit of another namespace than the default one. Nobody else can name it, by whatever id."""

    namespace: str

    def __post_init__(self) -> None:
        try:
            namespaces.check(self.namespace)
        except InvalidRequest as error:
            raise ValueError(str(error)) from None

    @property
    def of_namespace(self) -> str:
        return self.namespace


def in_namespace(commit: Commit, namespace: str) -> Commit:
    """The same commit of the default namespace, as one of `namespace`."""
    fields = {name: getattr(commit, name) for name in Commit.__struct_fields__}
    return NamespacedCommit(**fields, namespace=namespace) if namespace else commit


canonical.declare_plain(Segment, GroupedSegment, SegmentNode, TurnNode)
AnyModel = ModelIdentity | GroupedIdentity
AnySegment = Segment | GroupedSegment
AnyObject = (
    AnyModel | AnySegment | SegmentNode | TurnNode | Turn | ChatTurn | State | StaleState | Commit | NamespacedCommit
)


def encode(value: AnyObject) -> tuple[ObjectId, bytes]:
    """(id, canonical bytes) of an object."""
    data = canonical.encode(value)
    return ObjectId(digest(data)), data


def decode(data: bytes | memoryview, expected_id: str) -> AnyObject:
    """The object in `data`, whose hash must be `expected_id`. Raises `CorruptBlob` or `NewerFormat`."""
    found = digest(data)
    if found != expected_id:
        raise CorruptBlob(f"object {expected_id}: its bytes hash to {found}; they were changed after they were written")
    return canonical.decode(data, AnyObject, f"object {expected_id}")  # type: ignore[arg-type]


def decode_as(data: bytes | memoryview, expected_id: str, kind: type[AnyObject]) -> AnyObject:
    """As `decode`, where `kind` is expected: in a process that reads little, what the others are made of is not worked
    out. An object of another kind is returned as what it is."""
    if digest(data) == expected_id:
        with contextlib.suppress(CorruptBlob):
            return canonical.decode(data, kind, f"object {expected_id}")
    return decode(data, expected_id)


def state_id(state: State) -> StateId:
    return StateId(encode(state)[0])


def commit_id(commit: Commit) -> CommitId:
    return CommitId(encode(commit)[0])


def segment_blobs(segment: Segment) -> list[BlobId]:
    """All blobs that a segment names: of its tokens, then of its point states."""
    named = [segment.blobs, *(point.blobs for point in segment.states)]
    return [BlobId(blob) for blobs in named for group in sorted(blobs) for blob in blobs[group]]
