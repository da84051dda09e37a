"""The engine contract: what thaw asks of anything that runs a model. No torch here, and no repository.

Client and engine exchange small values: which session, which state, which extents of which pack. The bytes go
straight between the engine and the tiers of a store (`StoreMount`), never through these values.

Every verb that takes time returns a `Handle`. `capture`, `fork` and `cancel` take effect at step boundaries; a session
that is decoding may be captured and forked, and neither stops the others. What holds for every engine is written as
tests in `thaw.testing.EngineTests`.

Lifetimes: a `SessionRef` is valid from `open`, `hydrate` or `fork` until `close`. Token ids and KV of a session only
grow. All methods may be called from any thread.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, Literal, NewType, TypeVar

import msgspec

from thaw.core.cache import CacheGroup
from thaw.core.errors import EngineDied, InvalidRequest, Unsupported
from thaw.core.identity import ModelIdentity
from thaw.core.kv_ranges import KVRange
from thaw.core.objects import AnyModel, AnyTurn, Boundary, Chat, StatesAtToken
from thaw.core.proof import Continuation, Proof
from thaw.core.sampling import Sampling
from thaw.data.locations import BlobLocation, StoreMount

CONTRACT_VERSION = 2
MAX_CHILDREN = 1 << 16
"""Of one fork."""
SessionRef = NewType("SessionRef", str)
"""An unguessable name of a session in one engine."""
T = TypeVar("T")
Message = dict[str, object]
"""A chat message, a tool or one of its parts: what JSON can hold, in OpenAI's shape."""
Policy = Literal["exact", "recompute"]
"""`exact`: load or fail. `recompute`: load where identity allows it, else prefill again; reported and counted."""


class Slice(msgspec.Struct, frozen=True, kw_only=True):
    """The first `length` tokens of a stored segment of `stored` tokens, to stand at `start`.

    `blobs[group][i]` locates the group's i-th blob (of a full group the i-th head's [layer][K|V][stored][head_dim]):
    the whole segment is read and verified, `length` tokens of it are used. A group that needs none of these tokens may
    be left out. Blobs of a group in `first` begin with that token, not with `start`.
    """

    start: int
    length: int
    stored: int
    blobs: dict[str, tuple[BlobLocation, ...]]
    first: dict[str, int] = {}


class PointSlice(msgspec.Struct, frozen=True, kw_only=True):
    """The point states after exactly `token` tokens: `blobs[group]` locates all blobs of the group's."""

    token: int
    blobs: dict[str, tuple[BlobLocation, ...]]


class HydratePlan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an engine needs to continue from a state.

    `tokens` are all token ids; slices cover exactly [0, num_kv). `boundary.hidden` is located by `hidden`. A model with
    point states needs those at `num_kv` among `points`; earlier ones are for forks of earlier tokens.
    `turns` end at len(tokens). An unfinished completion (finish_reason None) may be resumed. `not_kept`: why the point
    cannot be gone on from as it is stored; the plan is then refused with `NotKept`, or, where `policy` allows it, what
    comes after `num_kv` is read again: from the nearest earlier point, or from the start (num_kv 0). `beside`: a live
    session with which an engine with "beside" shares what both have of the same blobs at their start, as with a fork.
    `stale_kv`: take KV of another policy and other weights as it is; `kv_ranges` say which computed [0, num_kv), where
    that is not `identity`'s alone. The session is as after `keep_stale_kv`. An engine without "stale-kv" refuses such a
    plan with `Unsupported`. `adapter`: the name or id of the adapter to continue under ("": none), which must be the
    identity's; None: the identity's.
    """

    identity: AnyModel
    mount: StoreMount
    tokens: tuple[int, ...]
    num_kv: int
    slices: tuple[Slice, ...]
    points: tuple[PointSlice, ...] = ()
    turns: tuple[AnyTurn, ...]
    seed: int
    salt: str
    share_prefix: bool = False
    boundary: Boundary | None = None
    hidden: BlobLocation | None = None
    policy: Policy = "exact"
    not_kept: str = ""
    stale_kv: bool = False
    kv_ranges: tuple[KVRange, ...] = ()
    beside: SessionRef | None = None
    adapter: str | None = None


class Hydrated(msgspec.Struct, frozen=True, kw_only=True):
    session: SessionRef
    proof: Proof


class CapturePlan(msgspec.Struct, frozen=True, kw_only=True):
    """Write a session's KV from token `base` on into `packs` of `mount`; [0, base) is stored already.

    `packs` are file names without folder that the store has leased to this capture: `EngineInfo.num_packs` of them.
    """

    mount: StoreMount
    packs: tuple[str, ...]
    base: int = 0


class CapturedSegment(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens [start, start + length) now in the packs; `blobs[group][i]` are blob ids. `first` and `points` as in a
    stored segment (`objects.GroupedSegment`)."""

    start: int
    length: int
    blobs: dict[str, tuple[str, ...]]
    first: dict[str, int] = {}
    points: tuple[StatesAtToken, ...] = ()


class WrittenPack(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    nbytes: int


class Captured(msgspec.Struct, frozen=True, kw_only=True):
    """A consistent cut of one session, on disk and synced when this value exists.

    `blobs` locates all that was written, in `packs` (none when nothing new had to be written).
    `stages_s`: seconds of `cut` (the engine was held), `write`, `sync`.
    """

    identity: ModelIdentity
    tokens: tuple[int, ...]
    num_kv: int
    segments: tuple[CapturedSegment, ...]
    blobs: tuple[BlobLocation, ...]
    packs: tuple[WrittenPack, ...]
    turns: tuple[AnyTurn, ...]
    seed: int
    salt: str
    share_prefix: bool
    boundary: Boundary | None
    stages_s: dict[str, float]
    kv_ranges: tuple[KVRange, ...] = ()
    """Which weights computed [0, num_kv), where that is not `identity`'s alone."""

    @property
    def nbytes(self) -> int:
        """Of the packs' files."""
        return sum(pack.nbytes for pack in self.packs)


class SessionView(msgspec.Struct, frozen=True, kw_only=True):
    """A live session as of the last step boundary."""

    tokens: tuple[int, ...]
    num_kv: int
    turns: tuple[AnyTurn, ...]
    seed: int
    salt: str
    running: bool
    parked: bool
    proof: Proof | None
    kv_ranges: tuple[KVRange, ...] = ()
    """Which weights computed its KV, where it was asked to keep that of others than run (`keep_stale_kv`)."""
    adapter: str | None = None
    """The id of the adapter under which it is computed."""


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One session's part of a batch. `prompt` is appended first; `resume` continues with an unfinished completion
    instead (then `prompt` is empty and `sampling` None: the turn has its own). `chat`: the messages that the prompt was
    rendered from, kept with its turn."""

    session: SessionRef
    prompt: tuple[int, ...] = ()
    prompt_text: str = ""
    role: str | None = None
    chat: Chat | None = None
    sampling: Sampling | None = None
    resume: bool = False


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of one completion. `num_prefilled_tokens`: tokens run through the model before the first sampled."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_prefilled_tokens: int
    num_completion_tokens: int


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """One finished (or stopped) completion, in vLLM's words. On `resume` it holds the whole turn."""

    session: SessionRef
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None
    finish_reason: Literal["stop", "length", "abort"] | None
    stop_reason: str | int | None
    seed: int
    usage: Usage
    proof: Proof | None
    ttft_s: float
    total_s: float
    entropies: tuple[float, ...] | None = None
    """One for each token, where `Sampling.entropy` asked for them."""

    @property
    def num_cached_tokens(self) -> int:
        return self.usage.num_cached_tokens


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """One step's news of one session in a batch: `index` in the batch, the new tokens and the new text."""

    index: int
    session: SessionRef
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: Literal["stop", "length", "abort"] | None = None


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is. `numerics`: what bit equality may depend on (threads, library versions, cpu capability)."""

    name: str
    version: str
    model: str
    device: str
    continuation: Continuation
    groups: tuple[CacheGroup, ...]
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    capabilities: frozenset[str]
    """Every engine that passes the law book has:
    `capture-running`   a session may be captured while it runs, without stopping
    `fork-running`      a session may be forked while it runs, without stopping
    `park`              `park` releases the engine's memory; the next use brings the session back
    `resume`            an interrupted completion goes on where it was, bit for bit
    `policy`            `set_policy` and `policy`: KV of another policy version is refused
    `logprobs`          log probabilities of sampled tokens, and of the likeliest where asked for
    and may have:
    `interior-points`   any earlier token of a session may be forked from; only where a model has windows or point
                        states may an engine lack it, and `NotKept` then names the tokens at which it can
    `boundary`          captures carry a `Boundary`, the digest of the next logits; else `Captured.boundary` is None
    `boundary-hidden`   the last hidden state is kept: going on at a prompt's end prefills nothing; else everyone who
                        continues from there, the parent too, runs the last token again (1 prefilled) and all are equal
    `own-batch`         a call's batch is never mixed with another's: its bits do not depend on what else runs; else
                        they are promised at equal batch shape, which a call that runs alone has
    `prefill-progress`  tokens of a running append are seen by `view` and `fork` as they are read, as they are by
                        `capture` in every engine; else all of them at its end
    `points`            `keep_points`: states of earlier tokens are kept where they were asked for; and `reread`
    `structured`        `Sampling.structured_outputs`, and a completion that goes on in the middle of one; else refused
    `entropy`           `Sampling.entropy`; else refused
    `stale-kv`          `keep_stale_kv`, and plans that ask for it; else refused
    `beside`            `HydratePlan.beside`: what both sessions have of the same blobs is shared, and not read again
    `sleep`             `sleep` and `wake`; else refused
    `adapters`          sessions under LoRA adapters (`open`, `adapters`, `load_adapter`); else refused
    `pin`               also `pin(session, seconds)`: its blocks are held in the engine; not of the contract, no law
    """
    numerics: dict[str, str]
    num_packs: int = 1
    """How many packs a capture may write at most: one for each process that holds KV."""


class Handle(abc.ABC, Generic[T]):
    """Work under way. Iterate for `Delta`s as they come (work that has none yields none); `result` waits for the end.

    Iterating or waiting again after the end gives the same again. Safe from any thread.
    """

    @abc.abstractmethod
    def result(self, timeout: float | None = None) -> T:
        """The outcome. Raises what the work raised, `TimedOut` after `timeout` seconds, `Cancelled` after `cancel`."""

    @abc.abstractmethod
    def cancel(self) -> None:
        """Stop at the next step boundary. A generation keeps the tokens it has; its turn ends with "abort"."""

    @abc.abstractmethod
    def done(self) -> bool: ...

    @abc.abstractmethod
    def __iter__(self) -> Iterator[Delta]: ...

    @abc.abstractmethod
    def add_done_callback(self, callback: object) -> None:
        """Call `callback(handle)` once when done (at once if it is), from the engine's thread."""


class Codec(abc.ABC):
    """Text to token ids and back, as the model's own tokenizer does it."""

    @abc.abstractmethod
    def encode(self, text: str, *, first: bool) -> list[int]:
        """Token ids of `text`. With `first` they begin a session, as the tokenizer begins a text: its own start tokens
        (BOS), and a space before the first word where it puts one there. Otherwise the text goes on where another
        ended, and nothing is added. No token is added at the end."""

    @abc.abstractmethod
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of these tokens alone; U+FFFD stands for bytes that are no UTF-8, as with Python's "replace".

        `skip_special_tokens` leaves out the special tokens that frame a text: its start, its ends, padding. Others are
        part of what is said (that a tool is called, for one) and stay."""

    def decode_settled(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """As `decode`, without a character at the end that has only begun: whatever follows, its text starts with this.

        Here a U+FFFD at the end is taken for such a character. A codec that sees bytes can tell it from bytes that are
        no UTF-8, and from a U+FFFD that was said."""
        return self.decode(token_ids, skip_special_tokens=skip_special_tokens).removesuffix("\ufffd")

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes | None:
        """The bytes that this token adds to a text's UTF-8, wherever it stands; None where that depends on its
        neighbours, or is not known. A codec gives bytes for every token or for none."""
        return None

    @abc.abstractmethod
    def chat_text(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Message] | None = None,
        variables: Mapping[str, object] | None = None,
        moment: datetime | None = None,
    ) -> str:
        """A conversation as the model's chat template renders it: a pure function of these, where `moment` is given (it
        is the time that a template reads; else now). Content may be a list of text parts; a message that only calls
        tools needs none. Raises `Unsupported` without a template or for parts that are no text, `InvalidRequest` where
        the template refuses."""

    @abc.abstractmethod
    def encode_chat(self, text: str, *, inside: bool = False) -> list[int]:
        """Token ids of what `chat_text` gave, or, with `inside`, of a piece that stands behind other text in it:
        special tokens are read as such, and none is added."""

    def tool_schema(self, function: Callable[..., object]) -> Message:
        """A function as a tool's JSON schema, from its signature and docstring. Raises `Unsupported` where the engine
        cannot read one, `InvalidRequest` where it is not documented."""
        raise Unsupported(f"{_name_of(function)}: this engine takes tools as JSON schemas (dicts), not as functions")

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Message] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> list[int]:
        """Token ids of a conversation by the model's chat template; raises as `chat_text`."""
        return self.encode_chat(
            self.chat_text(messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables)
        )


def _name_of(function: object) -> str:
    return str(getattr(function, "__name__", function))


ADAPTERS_ABSENT = (
    "engine {name} runs no LoRA adapters here: a vLLM 0.32 that was started with enable_lora does; or merge the adapter"
    " into the model"
)


def require_no_adapter(engine: Engine, *wanted: str | None) -> None:
    """Raise `Unsupported` where an adapter is wanted of an engine that runs none."""
    for one in filter(None, wanted):
        raise Unsupported(f"adapter {one!r}: {ADAPTERS_ABSENT.format(name=engine.info.name)}")


def adapter_there(engine: Engine, wanted: str | None) -> str | None:
    """`wanted`, the id of an adapter, where the engine has it; else None, as which it computes then."""
    return wanted if wanted is not None and wanted in engine.adapters().values() else None


class Engine(abc.ABC):
    """See the module's text. Engines are context managers: leaving closes them."""

    info: EngineInfo
    codec: Codec
    options: dict[str, Any]
    """What `load_engine` was given (plain values only), so that the same engine can be booted again elsewhere."""

    @abc.abstractmethod
    def identity(self, adapter: str | None = None) -> ModelIdentity:
        """The running model's identity, hashed on first use and again when the weights are seen to have changed.
        `adapter`: of a session under this adapter, by its name or id. Raises `NotFound` for a name that is not there.
        """

    def adapters(self) -> dict[str, str]:
        """The adapters that the engine has: name -> id. Two names of the same content have one id."""
        return {}

    def load_adapter(self, name: str, folder: str | Path) -> str:
        """Have the engine run a copy of the LoRA adapter in `folder` as `name`, and return its id. Raises `Unsupported`
        without "adapters"."""
        raise Unsupported(f"{ADAPTERS_ABSENT.format(name=self.info.name)}, so {name!r} was not loaded")

    @abc.abstractmethod
    def open(
        self,
        *,
        seed: int | None = None,
        salt: str | None = None,
        share_prefix: bool = False,
        adapter: str | None = None,
    ) -> SessionRef:
        """A new empty session. `salt` None draws an unguessable one (the lineage salt). `adapter`: the name or the id
        of one of `adapters()`, under which all of the session is computed, and that of its children; None: the model
        alone. What the name stands for now stays the session's, whatever the engine calls so later. Raises `NotFound`,
        `Unsupported` without "adapters"."""

    @abc.abstractmethod
    def append(
        self,
        session: SessionRef,
        token_ids: Sequence[int],
        *,
        text: str = "",
        role: str | None = None,
        chat: Chat | None = None,
    ) -> Handle[SessionView]:
        """Prefill `token_ids` at the end of the session as one prompt turn. `chat`: the messages that they were
        rendered from, kept with the turn; a prompt that is stopped half way keeps none."""

    def keep_points(self, session: SessionRef, tokens: Sequence[int], *, unaligned: bool = False) -> None:
        """Keep the point states after these numbers of tokens, so that the session can later be forked and hydrated
        there. Asked for before the tokens are read: a prefill stops there, a decode passes by. Each must be a multiple
        of what the model's recurrent kernel reads at a time, for a prefill that is cut elsewhere computes other bits,
        unless `unaligned`. Without effect on models that keep every token. Raises `InvalidRequest`, `NotKept` for one
        that was read already, and `Unsupported` without "points"."""
        raise Unsupported(f"engine {self.info.name} keeps no states at tokens that are asked for")

    @abc.abstractmethod
    def generate(self, requests: Sequence[GenerateRequest]) -> Handle[list[Completion]]:
        """Run all requests as ONE batch, started in one step; results in order. With `own-batch` it is never mixed
        with other calls' batches, so its shape, and with it the bits, do not depend on what else runs."""

    @abc.abstractmethod
    def capture(self, session: SessionRef, plan: CapturePlan) -> Handle[Captured]:
        """Cut the session at the next step boundary and write what `plan` lacks. Others go on meanwhile."""

    @abc.abstractmethod
    def hydrate(self, plan: HydratePlan) -> Handle[Hydrated]:
        """A new session at the plan's state. Raises `Refused` (identity), `CorruptBlob` (bytes), `NotHit`."""

    @abc.abstractmethod
    def fork(
        self,
        session: SessionRef,
        n: int,
        *,
        at: int | None = None,
        replay: bool = False,
        seeds: Sequence[int] | None = None,
    ) -> Handle[list[SessionRef]]:
        """N sessions that start where `session` stands (or stood after `at` tokens), sharing its full blocks.

        Child i gets derive(seed, position, i), or the parent's own seed with `replay`, or `seeds[i]`. A fork inside
        a completion with `replay` leaves that turn unfinished, so `resume` repeats the parent. Raises `NotKept` for a
        token that cannot be continued from, `InvalidRequest` for `replay` and `seeds` together."""

    def reread(self, session: SessionRef, at: int) -> Handle[SessionRef]:
        """A session of the first `at` tokens with the parent's seed, where `fork` raises `NotKept`: it begins at the
        nearest earlier point and reads the rest again, which its proof counts as recomputed. Raises `Unsupported`
        without "points"."""
        raise Unsupported(f"engine {self.info.name} does not read tokens again; append them to a new session")

    def keep_stale_kv(self, session: SessionRef) -> None:
        """From here on the session keeps its KV when the policy or the weights change: it goes on with it as it is, and
        says which weights computed which tokens (`SessionView.kv_ranges`, proofs, `Captured`). What decides its next
        token by the old weights is let go of: its last token runs again. Until it is asked for, such KV is refused,
        also in a fork's children, each of which is to be asked for itself. Raises `Unsupported` without "stale-kv".
        """
        raise Unsupported(
            f"engine {self.info.name} does not keep KV over a policy step (stale_kv). Recompute it: commit before the "
            "step, and go on from the commit with policy='recompute'"
        )

    @abc.abstractmethod
    def view(self, session: SessionRef) -> SessionView: ...

    @abc.abstractmethod
    def park(self, session: SessionRef) -> Handle[SessionView]:
        """Let go of the engine's memory for this session, keeping it restorable. The next use brings it back."""

    @abc.abstractmethod
    def set_policy(self, version: str) -> None:
        """From here on KV of another policy version is refused (or recomputed where the caller allowed it)."""

    @property
    @abc.abstractmethod
    def policy_version(self) -> str:
        """The version that runs now: `load_engine`'s `policy`, or what `set_policy` said last."""

    @contextlib.contextmanager
    def policy(self, version: str) -> Iterator[None]:
        """`with engine.policy(version="7"):` runs that policy inside, and the former one again afterwards, whatever
        happened; may be nested.

        A session belongs to the version under which it got its first KV. One from inside is stale outside, and one
        from outside is stale inside (`StaleSession`, "policy" in the message) and good again afterwards; a session
        that is still empty belongs to neither, and with `version` equal to the one that runs nothing is stale. The
        version is the engine's, not the calling thread's: two threads with versions of their own need two engines.
        """
        former = self.policy_version
        try:
            self.set_policy(version)
            yield
        finally:
            if self.policy_version != former:
                with contextlib.suppress(EngineDied):  # then nothing runs
                    self.set_policy(former)

    def update_weights(self, source: str) -> None:
        """Run the weights of `source`, a model's folder as the engine's process sees it, in place of those that run.

        Takes effect at a step boundary. KV of the former weights is refused from then on, sessions and plans alike
        (`StaleSession`, `IdentityMismatch`), and the engine's own cache of it is emptied; a generation that runs
        meanwhile is refused at its end. The policy version stays what it is: `set_policy` says the new one. Raises
        `Unsupported` where this engine, or this way to it, cannot; `ThawError` for files that are not of this model,
        and what ran before runs on.
        """
        raise Unsupported(f"engine {self.info.name} does not change its weights while it runs; load another one")

    def require_sleep(self, *, level: int = 1) -> None:
        """Raise what `sleep` would, whatever runs: `InvalidRequest`, `Unsupported`, `Busy` where it sleeps already."""
        raise Unsupported(f"engine {self.info.name} has no sleep mode; close it, and load it again")

    def sleep(self, *, level: int = 1) -> tuple[SessionRef, ...]:
        """Free the accelerator until `wake`: of the KV of all sessions, of the engine's own cache of it, and of the
        weights. Level 1 keeps the weights in host memory; level 2 drops them too, and `wake` reads them again.

        Returns the sessions whose KV was dropped: hydrate their commits after `wake`. Until then, and afterwards, they
        can be viewed, and everything else raises `StaleSession`. What the engine keeps in host memory (what is parked)
        comes back by itself. Waits for captures and hydrates under way; raises `Busy`, and sleeps not, while something
        is prefilled or generated, and where it sleeps already. Asleep, only `view`, `close_session`, `wake` and `close`
        work; the rest raises `Busy`. Raises `Unsupported` where this engine, or this way to it, cannot.
        """
        self.require_sleep(level=level)
        raise NotImplementedError("an engine that may sleep says how")

    def wake(self) -> None:
        """Take the accelerator back. The weights are those that ran before, or it raises what loading them raises and
        sleeps on. Nothing of the former KV is used. Raises `Conflict` where it does not sleep."""
        raise Unsupported(f"engine {self.info.name} has no sleep mode, so it does not sleep")

    def stalled(self) -> str:
        """Why the engine captures nothing until its owner lets it go on; "" where it does, or cannot say."""
        return ""

    @abc.abstractmethod
    def close_session(self, session: SessionRef) -> None:
        """Forget the session; running work on it is cancelled. Closing twice is fine."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the engine: running work raises `EngineDied`, all sessions are gone. Closing twice is fine."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


SLEEP_LEVELS = (1, 2)


def check_sleep_level(level: int) -> None:
    if level not in SLEEP_LEVELS:
        raise InvalidRequest(f"sleep level {level!r}: 1 (weights in host memory) or 2 (weights dropped)")


def update_weights(engine: Engine, source: str) -> None:
    """`engine.update_weights`, by name: `pool.set_policy("7", update="thaw.engines.base:update_weights",
    arguments={"source": folder})` changes the weights in every worker's own process."""
    engine.update_weights(source)
