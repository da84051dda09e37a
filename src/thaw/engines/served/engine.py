"""thaw's contract over the requests of an engine that serves them from processes of its own: vLLM, SGLang.

Everything that the client knows is owned by one event loop on a thread of its own; every verb is a coroutine there.
KV stays in the engine's processes: a session names a record in the workers' arena, a fork names its parent's. What one
server says otherwise than another is in its subclass.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import secrets
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ClassVar, TypeVar

import msgspec

from thaw.core import errors
from thaw.core.errors import (
    Busy,
    Cancelled,
    EngineDied,
    InvalidRequest,
    NotFound,
    NotHit,
    PolicyMismatch,
    Refused,
    StaleSession,
    ThawError,
    TimedOut,
    TooLong,
)
from thaw.core.identity import CacheGroup, ModelIdentity, compare
from thaw.core.ids import digest
from thaw.core.objects import Turn
from thaw.core.proof import Continuation, Proof
from thaw.core.sampling import Sampling, check_seed, derive, fresh_seed
from thaw.data.locations import BlobLocation
from thaw.engines.base import (
    Captured,
    CapturedSegment,
    CapturePlan,
    Codec,
    Completion,
    Delta,
    Engine,
    EngineInfo,
    GenerateRequest,
    Handle,
    Hydrated,
    HydratePlan,
    SessionRef,
    SessionView,
    WrittenPack,
)
from thaw.engines.embedded.bad_words import bad_ids
from thaw.engines.embedded.bad_words import check as check_sampling
from thaw.engines.embedded.driver import Promise
from thaw.engines.embedded.session import OpenTurn, cut_turns, reopen, require_same_policy, reseed
from thaw.engines.embedded.text import TextStream
from thaw.engines.served import protocol
from thaw.engines.served.kinds import made
from thaw.engines.served.lane import Lane, prompt_turn
from thaw.engines.served.mail import SCHEDULER
from thaw.engines.served.protocol import Answer, Message, WorkerFacts, merge
from thaw.engines.served.session import Node, ServedSession
from thaw.engines.served.transport import Chunk, Submission, Transport

T = TypeVar("T")
CAPABILITIES = frozenset(
    {"capture-running", "fork-running", "interior-points", "park", "pin", "resume", "policy", "logprobs"}
)
COMMAND_LIMIT_S = 600.0
CONNECT_LIMIT_S = 60.0
FAREWELL_LIMIT_S = 5.0
MAX_TOP_LOGPROBS = 100


class ServedEngine(Engine):
    """One server (tensor-parallel ranks included). Sessions live until `close_session` or `close`."""

    name: ClassVar[str]
    """As `load_engine` knows it."""
    title: ClassVar[str]
    """As people write it."""
    continuation: ClassVar[Continuation] = "decode-exact"
    capabilities: ClassVar[frozenset[str]] = CAPABILITIES

    def __init__(
        self,
        transport: Transport,
        *,
        codec: Codec,
        identity: Callable[[CacheGroup], ModelIdentity],
        eos_token_ids: tuple[int, ...],
        vocab_size: int,
        name: str,
        policy: str,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._transport, self._mail, self._facts = transport, transport.mail, transport.facts
        self._identity_of_files = identity
        self._identity: tuple[int, ModelIdentity] | None = None
        self._policy = policy
        self._sessions: dict[SessionRef, ServedSession] = {}
        self._lanes: dict[SessionRef, Lane] = {}
        self._dropped: list[str] = []
        self._pinned: dict[str, tuple[SessionRef, asyncio.TimerHandle]] = {}
        self._loop = loop
        self._thread_id = threading.get_ident()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False
        self.codec = codec
        self._eos = eos_token_ids
        workers = self._worker_facts()
        first = workers[0]
        group = CacheGroup(
            name="full",
            kind="full",
            first_layer=0,
            num_layers=first.num_layers,
            num_kv_heads=first.total_heads,
            head_dim=first.head_dim,
            dtype=first.dtype,  # type: ignore[arg-type]
        )
        layout = {f"layout.{key}": value for key, value in first.layout.items()}
        self.info = EngineInfo(
            name=self.name,
            version=self._facts.version,
            model=name,
            device=first.layout.get("device", "cpu"),
            continuation=self.continuation,
            groups=(group,),
            max_model_len=self._facts.max_model_len,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            capabilities=self.capabilities,
            numerics={
                self.name: self._facts.version,
                "runner": self._facts.runner,
                "block_size": str(self._facts.block_size),
                "tensor_parallel_size": str(self._facts.world_size),
                **layout,
            },
            num_packs=self._facts.world_size,
        )

    # -- the contract

    def identity(self) -> ModelIdentity:
        return self._wait(self._current_identity())

    def open(self, *, seed: int | None = None, salt: str | None = None, share_prefix: bool = False) -> SessionRef:
        number = fresh_seed() if seed is None else int(check_seed(seed))
        return self._wait(self._soon(lambda: self._admit(self._new(number, salt, share_prefix)).ref))

    def view(self, session: SessionRef) -> SessionView:
        return self._wait(self._soon(lambda: self._get(session).view()))

    def append(
        self, session: SessionRef, token_ids: Sequence[int], *, text: str = "", role: str | None = None
    ) -> Handle[SessionView]:
        return self._handle(lambda promise: self._append(promise, session, list(token_ids), text, role))

    def generate(self, requests: Sequence[GenerateRequest]) -> Handle[list[Completion]]:
        if not requests:
            raise InvalidRequest("generate: no requests; give at least one session")
        asked = tuple(requests)
        return self._handle(lambda promise: self._generate(promise, asked))

    def capture(self, session: SessionRef, plan: CapturePlan) -> Handle[Captured]:
        return self._handle(lambda _: self._capture(session, plan))

    def hydrate(self, plan: HydratePlan) -> Handle[Hydrated]:
        return self._handle(lambda _: self._hydrate(plan))

    def fork(
        self,
        session: SessionRef,
        n: int,
        *,
        at: int | None = None,
        replay: bool = False,
        seeds: Sequence[int] | None = None,
    ) -> Handle[list[SessionRef]]:
        if n < 1 or (seeds is not None and len(seeds) != n):
            raise InvalidRequest(f"fork: n={n}, seeds={seeds!r}; n is at least 1 and seeds, if given, are n integers")
        for seed in seeds or ():
            check_seed(seed)
        return self._handle(lambda _: self._soon(lambda: self._fork(self._fresh(session), n, at, replay, seeds)))

    def park(self, session: SessionRef) -> Handle[SessionView]:
        def put_away() -> SessionView:
            live = self._usable(session)
            live.parked = True
            return live.view()

        return self._handle(lambda _: self._soon(put_away))

    def set_policy(self, version: str) -> None:
        """See the contract. Sessions opened before keep the old version; their KV is not used any more. All pins of
        the engine end, so that the server's own reset of its prefix cache works."""
        if not version or len(version) > 200:
            raise InvalidRequest(f"policy version {version!r}: must be 1 to 200 characters")

        async def change() -> None:
            self._policy = version
            await self._unpin_all()

        self._wait(change())

    @property
    def policy_version(self) -> str:
        return self._policy

    def pin(self, session: SessionRef, seconds: float) -> Handle[int]:
        """Hold the session's full blocks in the engine for `seconds` (0: let go). The result is the tokens held.

        Opt-in, because it takes room from everybody, and the server's own reset of its prefix cache may refuse to run
        while blocks are held (docs/engines). Ends by itself at the engine's limit (`pin_seconds`), when the session
        is closed, with `set_policy`, and with `release_pins`.
        """
        return self._handle(lambda _: self._pin(session, seconds))

    def release_pins(self) -> None:
        """End all pins of the engine, other clients' too: before the server's own reset, pause, sleep or weight update.
        Works while the engine is paused."""
        self._wait(self._unpin_all())

    def stats(self) -> dict[str, int]:
        """Counts of the engine: records, blocks (free, pinned), captures, hydrates, refusals, bytes of the arenas."""
        return self._wait(self._command(protocol.Stats(id=secrets.token_hex(16)))).counts

    def switch(self, *, on: bool = True, watch_weights: bool = True) -> None:
        """Turn thaw off in the engine without a restart (thaw's requests are refused, plain ones untouched), or on.

        `watch_weights` False leaves out the look at the weights where KV is used: only for owners who announce every
        change with `set_policy`, for what nobody announces is then not noticed.
        """
        message = protocol.Switch(id=secrets.token_hex(16), on=on, watch_weights=watch_weights)
        self._wait(self._command(message))

    def collective_rpc(
        self, method: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> list[Any]:
        """The server's own `collective_rpc` on every worker, for engines of this process: how trainers load weights."""
        return self._wait(self._transport.collective_rpc(method, args, kwargs or {}))

    def alive(self) -> bool:
        """Whether the engine's process runs and this client is open."""
        if self._closed:
            return False
        try:
            self._mail.check_alive()
        except EngineDied:
            return False
        return True

    def close_session(self, session: SessionRef) -> None:
        async def drop() -> None:
            live = self._sessions.pop(session, None)
            lane = self._lanes.get(session)
            if live is not None and lane is not None:
                await self._abort(lane)
            if live is not None and live.node is not None and self._pinned.get(live.node.name, ("",))[0] == session:
                await self._let_go(live.node.name)

        if not self._closed:
            self._wait(drop())

    def close(self) -> None:
        if self._closed:
            return
        self._wait(self._shut())

    # -- the loop

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the loop and wait; a call from the loop's own thread would never end."""
        if self._closed:
            work.close()
            raise EngineDied(f"engine {self.info.name} is closed; load it again")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @staticmethod
    async def _soon(fn: Callable[[], T]) -> T:
        return fn()

    def _handle(self, begin: Callable[[Promise[T]], Coroutine[Any, Any, T]]) -> Promise[T]:
        promise: Promise[T] = Promise()

        async def run() -> None:
            try:
                promise.settle(await begin(promise))
            except asyncio.CancelledError:
                promise.settle(error=EngineDied(f"engine {self.info.name} was closed while this was under way"))
            except BaseException as error:  # noqa: BLE001 - handed to the caller
                promise.settle(error=error)

        def start() -> None:
            task = self._loop.create_task(run())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        if self._closed:
            raise EngineDied(f"engine {self.info.name} is closed; load it again")
        self._loop.call_soon_threadsafe(start)
        return promise

    async def _shut(self) -> None:
        self._closed = True
        me = asyncio.current_task()
        for task in list(self._tasks):
            if task is not me:
                task.cancel()
        await asyncio.gather(*(t for t in self._tasks if t is not me), return_exceptions=True)
        await self._farewell()
        await self._transport.close()
        self._loop.call_soon(self._loop.stop)

    async def _farewell(self) -> None:
        """An engine that goes on without this client lets go of what this client kept there."""
        self._sessions.clear()
        self._lanes.clear()
        self._forget_pins(list(self._pinned))
        if self._dropped and self._transport.stays:
            message = protocol.Pin(id=secrets.token_hex(16), record=secrets.token_hex(16), seconds=0.0)
            with contextlib.suppress(ThawError, TimeoutError):
                await asyncio.wait_for(self._command(message, (SCHEDULER,)), FAREWELL_LIMIT_S)

    # -- sessions

    def _new(self, seed: int, salt: str | None, share_prefix: bool) -> ServedSession:
        own = secrets.token_hex(16)
        return ServedSession(
            ref=SessionRef(secrets.token_hex(16)),
            seed=seed,
            salt=own if salt is None else salt,
            share_prefix=share_prefix,
            policy=self._policy,
            cache_salt=(salt or "") if share_prefix else f"{protocol.SALT}{own}",
        )

    def _admit(self, session: ServedSession) -> ServedSession:
        self._sessions[session.ref] = session
        return session

    def _get(self, ref: SessionRef) -> ServedSession:
        live = self._sessions.get(ref)
        if live is None:
            raise NotFound(
                f"session {ref[:8]}… is not open in this engine: it was closed, or belongs to another engine"
            )
        return live

    def _fresh(self, ref: SessionRef) -> ServedSession:
        """The session, if its KV is of the policy that runs now. The weights are looked at where KV is used."""
        live = self._get(ref)
        if live.policy != self._policy:
            if live.computed():
                raise StaleSession(
                    f"the session's KV is of policy {live.policy!r}; the engine now runs policy {self._policy!r}. Open "
                    "a session and append its tokens again, or hydrate a commit with policy='recompute'."
                )
            live.policy = self._policy
        return live

    def _usable(self, ref: SessionRef) -> ServedSession:
        live = self._fresh(ref)
        if live.busy is not None:
            raise Busy(f"session {ref[:8]}… is running; wait for its result, cancel it, or fork it")
        return live

    def _settle_turn(self, session: ServedSession) -> None:
        """A completion left unfinished becomes an aborted one when something else follows it."""
        last = session.turns[-1] if session.turns else None
        if last is not None and last.kind == "completion" and last.finish_reason is None:
            session.turns[-1] = msgspec.structs.replace(last, finish_reason="abort")

    def _check_tokens(self, num_tokens: int, tokens: Sequence[int], more: int) -> None:
        bad = [t for t in tokens if not isinstance(t, int) or not 0 <= t < self.info.vocab_size]
        if bad:
            raise InvalidRequest(f"token ids {bad[:5]} are outside the vocabulary of {self.info.vocab_size}")
        total, limit = num_tokens + len(tokens) + more, self.info.max_model_len
        if total > limit:
            raise TooLong(
                f"{num_tokens} tokens and {len(tokens)} new ones (and {more} to generate) exceed the engine's "
                f"{limit}; shorten the prompt or fork an earlier point"
            )

    # -- running

    def _lane(self, index: int, session: ServedSession, prompt: list[int], request: GenerateRequest, emit: Any) -> Lane:
        """Claim the session for a request; its KV is extended in a record of its own."""
        source, want, before = session.node, session.num_kv, (session.node, session.own, session.num_kv)
        if not prompt:
            want = min(want, max(len(session.tokens) - 1, 0))
        if not session.own:
            session.node, session.own = Node(self._dropped.append), True
        assert session.node is not None
        lane = Lane(
            index, session, secrets.token_hex(16), prompt, request, source or session.node, want,
            len(session.tokens), emit, before,
        )  # fmt: skip
        session.busy, session.parked = lane, False
        session.num_kv = want
        self._lanes[session.ref] = lane
        return lane

    def _message(self, lane: Lane, group: str | None, size: int) -> protocol.Run:
        node, turn = lane.session.node, lane.session.turn
        assert node is not None
        return protocol.Run(
            id=lane.name,
            record=node.name,
            source=lane.node.name if lane.want else None,
            num_kv=lane.want,
            group=group,
            group_size=size,
            group_place=lane.index,
            mail=not self._transport.answers_inband,
            grammar_from=turn.start if turn is not None and turn.sampling.structured_outputs is not None else None,
            drop=self._take_dropped(),
        )

    def _take_dropped(self) -> tuple[str, ...]:
        out = tuple(self._dropped[: protocol.MAX_DROP])
        del self._dropped[: len(out)]
        return out

    def _submission(self, lane: Lane, tokens: list[int], sampling: dict[str, Any], message: Message) -> Submission:
        return Submission(lane.name, tokens, sampling, lane.session.cache_salt or None, message)

    async def _run(self, submission: Submission, take: Callable[[Chunk], bool]) -> Answer:
        """Stream a request through `take` until it says enough; what the connector says at the end."""
        answer: dict[str, Any] | None = None
        reason: str | None = None
        stream = self._transport.stream(submission)
        async with contextlib.aclosing(stream) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                answer, reason = chunk.answer or answer, chunk.finish_reason or reason
                if not take(chunk) and reason is None:
                    await self._transport.abort(submission.name)
                    answer = None
                    reason = "abort"
                    break
        if answer is None or reason == "error":
            found = await self._mailed(submission.message.id, (SCHEDULER, *range(self._facts.world_size)), limit_s=30.0)
            return found[0]
        return msgspec.convert({k: v for k, v in answer.items() if k != "id"}, Answer)

    async def _generate(
        self, promise: Promise[list[Completion]], asked: tuple[GenerateRequest, ...]
    ) -> list[Completion]:
        lanes = self._begin(asked, promise.emit)
        promise.on_cancel = lambda: self._cancel(lanes)
        group = secrets.token_hex(16) if len(lanes) > 1 else None
        outcomes = await asyncio.gather(
            *(self._generate_one(lane, group, len(lanes)) for lane in lanes), return_exceptions=True
        )
        promise.on_cancel = None  # it refers to the sessions, and the promise may be kept for long
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [lane.completion() for lane in lanes]

    def _begin(self, asked: Sequence[GenerateRequest], emit: Callable[[Delta], None]) -> list[Lane]:
        """Check every request before any session is touched."""
        refs = [request.session for request in asked]
        if len(set(refs)) != len(refs):
            raise InvalidRequest("generate: the same session stands twice in one batch; fork it first")
        lives = [self._usable(ref) for ref in refs]
        for live, request in zip(lives, asked, strict=True):
            self._check_request(live, request)
        lanes = []
        for i, (live, request) in enumerate(zip(lives, asked, strict=True)):
            if not request.resume:
                self._settle_turn(live)
            lanes.append(self._lane(i, live, list(request.prompt), request, emit))
        return lanes

    def _check_request(self, live: ServedSession, request: GenerateRequest) -> None:
        if request.resume:
            last = live.turns[-1] if live.turns else None
            if request.prompt or request.sampling is not None:
                raise InvalidRequest("resume goes on with the interrupted completion: give neither prompt nor sampling")
            if last is None or last.kind != "completion" or last.finish_reason not in (None, "abort"):
                raise InvalidRequest("resume: the session's last turn is not an interrupted completion; use generate")
            require_same_policy(last, self._policy)
            self._check_resume(live, last)
            return
        if request.sampling is None:
            raise InvalidRequest("generate: no sampling given")
        self._check_tokens(len(live.tokens), request.prompt, 1)
        if request.sampling.structured_outputs is not None and self._facts.reasons:
            raise errors.BadSampling(
                f"structured_outputs: this {self.title} runs with a reasoning parser, so a grammar begins where the "
                "reasoning ends, and a session cannot go on in its middle; start the server without the parser, or "
                "leave structured_outputs out"
            )
        grammars = "structured" in self.capabilities
        check_sampling(request.sampling, self.codec, self.info.vocab_size, structured=grammars)
        self._check_sampling(request.sampling)
        top = request.sampling.logprobs or 0
        if top > self._facts.max_logprobs:
            raise errors.BadSampling(
                f"logprobs={top}: this {self.title} gives at most {self._facts.max_logprobs} (its --max-logprobs)"
            )
        if not live.tokens and not request.prompt:
            raise InvalidRequest("generate: the session is empty and so is the prompt; append something first")

    def _check_sampling(self, sampling: Sampling) -> None:
        """Raise `Unsupported` for what this server cannot sample with."""

    def _check_resume(self, live: ServedSession, last: Turn) -> None:
        """Raise `Unsupported` where this server cannot go on with `last` exactly."""

    @abc.abstractmethod
    def _fields(self, turn: OpenTurn, num_tokens: int) -> dict[str, Any]:
        """The server's sampling parameters for what is left of a turn, when the session has `num_tokens` tokens."""

    def _one_token(self) -> dict[str, Any]:
        """The server's sampling parameters for one token that nobody looks at."""
        return {"temperature": 0.0, "max_tokens": 1, "ignore_eos": True}

    async def _generate_one(self, lane: Lane, group: str | None, size: int) -> None:
        session = lane.session
        try:
            start = len(session.tokens)
            session.tokens += lane.prompt
            if lane.prompt:
                prompt_turn(session, start, lane.request.prompt_text, lane.request.role)
            session.turn = self._open_turn(session, lane.request)
            lane.num_prompt = len(session.tokens)
            await self._decode(lane, group, size)
        finally:
            self._release(lane)

    def _open_turn(self, session: ServedSession, request: GenerateRequest) -> OpenTurn:
        if request.resume:
            turn = reopen(session, self.codec)
            assert turn is not None
            return turn
        assert request.sampling is not None
        seed = request.sampling.seed
        return OpenTurn(
            start=len(session.tokens),
            sampling=request.sampling,
            seed=session.seed if seed is None else int(seed),
            policy=session.policy,
            role="assistant" if request.role is not None else None,
            stream=TextStream(self.codec, session.tokens, request.sampling.stop),
            bad_ids=bad_ids(self.codec, request.sampling.bad_words),
        )

    async def _decode(self, lane: Lane, group: str | None, size: int) -> None:
        session, turn = lane.session, lane.session.turn
        assert turn is not None
        num_top = turn.sampling.logprobs or 0
        limit = self.info.max_model_len
        sampling = self._fields(turn, len(session.tokens))

        def take(chunk: Chunk) -> bool:
            if not lane.aborted:
                lane.take(chunk, self._eos, limit, num_top)
            return lane.reason is None and not lane.aborted

        submission = self._submission(lane, list(session.tokens), sampling, self._message(lane, group, size))
        answer = await self._run(submission, take)
        if lane.reason is None:
            lane.abort()
        lane.close()
        self._take_answer(lane, answer)

    def _take_answer(self, lane: Lane, answer: Answer) -> None:
        """What the engine counted. Raises when the session's KV was not used as it must be."""
        session = lane.session
        if answer.kind:
            raise _error(answer)
        lane.answered = True
        session.num_kv = min(answer.num_kv, max(len(session.tokens) - 1, 0))  # the last one always runs again
        lane.cached = answer.local + answer.external
        if (lane.aborted or lane.reason == "abort") and lane.cached == 0:
            return  # stopped before it began
        if lane.cached < lane.want and not session.share_prefix:
            raise NotHit(f"the engine counted {lane.cached} of {lane.want} restored tokens as cached")

    def _release(self, lane: Lane) -> None:
        if lane.session.turn is not None:
            lane.close()
        if not lane.answered:  # refused, or never there: what the session went on from is what it still has
            lane.session.node, lane.session.own, lane.session.num_kv = lane.before
        lane.session.busy = None
        lane.emit = _nobody
        if self._lanes.get(lane.session.ref) is lane:
            del self._lanes[lane.session.ref]

    def _cancel(self, lanes: Sequence[Lane]) -> None:
        """From any thread: stop these at the next step boundary."""
        self._loop.call_soon_threadsafe(self._abort_soon, lanes)

    def _abort_soon(self, lanes: Sequence[Lane]) -> None:
        for lane in lanes:
            task = self._loop.create_task(self._abort(lane))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _abort(self, lane: Lane) -> None:
        lane.aborted = True
        await self._transport.abort(lane.name)

    async def _append(
        self, promise: Promise[SessionView], ref: SessionRef, tokens: list[int], text: str, role: str | None
    ) -> SessionView:
        session = self._usable(ref)
        self._check_tokens(len(session.tokens), tokens, 0)
        if len(session.tokens) + len(tokens) >= self.info.max_model_len:
            raise TooLong(
                f"{len(session.tokens) + len(tokens)} tokens fill the engine's {self.info.max_model_len}; it needs "
                "room for one more to read them"
            )
        if not tokens:
            return session.view()
        self._settle_turn(session)
        request = GenerateRequest(session=ref, prompt=tuple(tokens))
        lane = self._lane(0, session, tokens, request, _nobody)
        promise.on_cancel = lambda: self._cancel([lane])
        try:
            return await self._prefill(lane, text, role)
        finally:
            promise.on_cancel = None
            self._release(lane)

    async def _prefill(self, lane: Lane, text: str, role: str | None) -> SessionView:
        session = lane.session
        start, whole = len(session.tokens), [*session.tokens, *lane.prompt]
        lane.num_prompt = len(whole)
        submission = self._submission(lane, whole, self._one_token(), self._message(lane, None, 1))
        answer = await self._run(submission, lambda _: not lane.aborted)
        if answer.kind:
            raise _error(answer)
        if not lane.aborted and answer.num_tokens <= len(whole):
            lane.aborted = True
        count = max(start, min(answer.num_kv, len(whole))) if lane.aborted else len(whole)
        session.tokens = whole[:count]
        prompt_turn(session, start, text, role)
        self._take_answer(lane, answer)
        if lane.aborted:
            raise Cancelled("cancelled by the caller; the session keeps the tokens it has")
        session.busy = None
        return session.view()

    # -- fork

    def _fork(
        self, parent: ServedSession, n: int, at: int | None, replay: bool, seeds: Sequence[int] | None
    ) -> list[SessionRef]:
        position = len(parent.tokens) if at is None else at
        if not 0 <= position <= len(parent.tokens):
            raise InvalidRequest(f"fork at token {position}: the session has {len(parent.tokens)}")
        children = [self._child(parent, position, replay, seeds[i] if seeds else None, i) for i in range(n)]
        return [self._admit(child).ref for child in children]

    def _child(self, parent: ServedSession, at: int, replay: bool, seed: int | None, index: int) -> ServedSession:
        whole = at == len(parent.tokens)
        child = self._new(parent.seed, parent.salt, parent.share_prefix)
        child.num_kv = parent.computed() if whole else min(parent.computed(), max(at - 1, 0))
        child.node = parent.node if child.num_kv else None
        child.cache_salt, child.policy = parent.cache_salt, parent.policy
        child.tokens = parent.tokens[:at]
        child.turns = cut_turns(parent.all_turns(), at, self.codec, parent.tokens)
        child.proof = Proof(
            num_prompt_tokens=at,
            num_cached_tokens=child.num_kv,
            matched=child.num_kv,
            first_mismatch=None,
            verification="live-shared",
            continuation=self.info.continuation,
            share_prefix=parent.share_prefix,
        )
        if not replay:
            reseed(child, derive(parent.seed, at, index) if seed is None else seed)
        return child

    # -- capture

    async def _capture(self, ref: SessionRef, plan: CapturePlan) -> Captured:
        session = self._fresh(ref)
        identity = await self._current_identity()
        if session.policy != identity.policy:
            raise StaleSession("the policy changed while the session was being captured; nothing was kept")
        lane = self._lanes.get(ref)
        decoding = session.turn is not None and bool(session.turn.logprobs)
        if session.node is None or (lane is None and not session.num_kv):
            return self._captured(session, identity, plan, tuple(session.tokens), 0, Answer())
        num_kv = None if lane is not None and not decoding else session.computed()
        tokens = tuple(session.tokens)
        self._mail.register_store(plan.mount.uuid, plan.mount.packs.resolve())
        answer = await self._command(
            protocol.Write(
                id=secrets.token_hex(16), record=session.node.name, store=plan.mount.uuid, packs=plan.packs,
                base=plan.base, num_kv=num_kv,
            )
        )  # fmt: skip
        if lane is not None and num_kv is None:
            tokens = await self._seen(session, lane, answer)
        return self._captured(session, identity, plan, tokens, answer.num_kv, answer)

    async def _seen(self, session: ServedSession, lane: Lane, answer: Answer) -> tuple[int, ...]:
        """The tokens that were captured while a prompt was being read: those read so far, and all that the session had
        before. Where the prompt had been read, wait until the client has seen what came of it."""
        if answer.num_kv < answer.num_tokens - 1:
            whole = (*session.tokens[: lane.prompt_start], *lane.prompt)
            return whole[: max(answer.num_kv, lane.prompt_start)]
        while len(session.tokens) < answer.num_tokens and session.busy is not None:
            await asyncio.sleep(0.002)
        num_tokens = min(len(session.tokens), max(answer.num_tokens, answer.num_kv))
        if num_tokens < answer.num_kv:
            raise Busy("the session ended while it was captured; capture it again")
        return tuple(session.tokens[:num_tokens])

    def _captured(
        self,
        session: ServedSession,
        identity: ModelIdentity,
        plan: CapturePlan,
        tokens: tuple[int, ...],
        num_kv: int,
        answer: Answer,
    ) -> Captured:
        if plan.base > num_kv:
            raise InvalidRequest(f"capture from token {plan.base}: the session has KV for {num_kv} tokens")
        name = self.info.groups[0].name
        starts = sorted({blob.start for blob in answer.blobs})
        segments, locations = [], []
        for start in starts:
            blobs = sorted((b for b in answer.blobs if b.start == start), key=lambda b: b.head)
            if [b.head for b in blobs] != list(range(self.info.groups[0].num_kv_heads)):
                raise errors.LawBroken(f"the workers wrote heads {[b.head for b in blobs]} of the segment at {start}")
            segments.append(
                CapturedSegment(start=start, length=blobs[0].length, blobs={name: tuple(b.blob for b in blobs)})
            )
            locations += [BlobLocation(blob=b.blob, pack=b.pack, offset=b.offset, nbytes=b.nbytes) for b in blobs]
        return Captured(
            identity=identity,
            tokens=tokens,
            num_kv=num_kv,
            segments=tuple(segments),
            blobs=tuple(locations),
            packs=tuple(WrittenPack(name=name, nbytes=nbytes) for name, nbytes in sorted(answer.packs.items())),
            turns=tuple(cut_turns(session.all_turns(), len(tokens), self.codec, tokens)),
            seed=session.seed,
            salt=session.salt,
            share_prefix=session.share_prefix,
            boundary=None,
            stages_s={"cut": 0.0, "write": 0.0, "sync": 0.0, **answer.stages_s},
        )

    # -- hydrate

    async def _hydrate(self, plan: HydratePlan) -> Hydrated:
        identity = await self._current_identity()
        try:
            compare(plan.identity, identity)
        except Refused as refusal:
            if plan.policy != "recompute" or getattr(refusal, "field", "") == "tokenizer":
                raise
            return await self._recompute(plan, str(refusal))
        self._check_tokens(0, plan.tokens, 0)
        session = self._restored(plan)
        proof = await self._fill(session, plan) if plan.num_kv else None
        session.proof = proof or _nothing_to_restore(plan, self.info.continuation)
        if session.policy != self._policy:
            raise PolicyMismatch(f"the engine's policy changed to {self._policy!r} while the session was hydrated")
        self._admit(session)
        return Hydrated(session=session.ref, proof=session.proof)

    def _restored(self, plan: HydratePlan) -> ServedSession:
        session = self._new(plan.seed, plan.salt, plan.share_prefix)
        session.tokens, session.turns = list(plan.tokens), list(plan.turns)
        return session

    async def _fill(self, session: ServedSession, plan: HydratePlan) -> Proof:
        """The plan into the engine's arena, then into its blocks, by a request that the engine itself counts."""
        node = Node(self._dropped.append)
        name = secrets.token_hex(16)
        self._mail.register_store(plan.mount.uuid, plan.mount.packs.resolve())
        self._mail.put_plan(name, plan)
        try:
            answer = await self._command(protocol.Fill(id=name, record=node.name))
        finally:
            self._mail.drop_plan(name)
        session.node, session.own, session.num_kv = node, True, plan.num_kv
        started = self._loop.time()
        cached = await self._probe(session, plan)
        return Proof(
            num_prompt_tokens=len(plan.tokens),
            num_cached_tokens=cached,
            matched=plan.num_kv,
            first_mismatch=None,
            nbytes=answer.nbytes,
            verification="disk-verified",
            continuation=self.info.continuation,
            share_prefix=plan.share_prefix,
            stages_s={**answer.stages_s, "load": self._loop.time() - started},
        )

    async def _probe(self, session: ServedSession, plan: HydratePlan) -> int:
        """One request of the restored tokens and one more: the engine's count of what it found is the proof."""
        tokens = [*plan.tokens[: plan.num_kv], 0]
        if len(tokens) >= self.info.max_model_len:
            tokens = tokens[: self.info.max_model_len - 1]
        want = min(plan.num_kv, len(tokens) - 1)
        assert session.node is not None
        name = secrets.token_hex(16)
        message = protocol.Run(
            id=name, record=secrets.token_hex(16), source=session.node.name, num_kv=want, keep=False,
            mail=not self._transport.answers_inband, drop=self._take_dropped(),
        )  # fmt: skip
        submission = Submission(name, tokens, self._one_token(), session.cache_salt or None, message)
        ends: list[str | None] = []

        def take(chunk: Chunk) -> bool:
            ends.append(chunk.finish_reason)
            return True

        answer = await self._run(submission, take)
        self._dropped.append(message.record)
        if answer.kind:
            raise _error(answer)
        cached = answer.local + answer.external
        if "abort" in ends:
            raise Busy("the engine's owner stopped all requests while the session was hydrated; try it again later")
        if cached < want:
            raise NotHit(f"the engine counted {cached} of {want} restored tokens as cached; nothing was recomputed")
        return plan.num_kv if want == cached else cached

    async def _recompute(self, plan: HydratePlan, reason: str) -> Hydrated:
        """Prefill the plan's tokens again, because the caller allowed it."""
        session = self._admit(self._restored(plan))
        turns, session.tokens, session.turns = session.turns, [], []
        if plan.tokens:
            await self._append(Promise(), session.ref, list(plan.tokens), "", None)
        session.turns = turns
        session.proof = Proof(
            num_prompt_tokens=len(plan.tokens),
            num_cached_tokens=0,
            matched=0,
            first_mismatch=0,
            num_recomputed_tokens=len(plan.tokens),
            verification="none",
            continuation="close",
            share_prefix=plan.share_prefix,
            reason=reason,
        )
        return Hydrated(session=session.ref, proof=session.proof)

    # -- pins, weights, commands

    async def _pin(self, ref: SessionRef, seconds: float) -> int:
        session = self._usable(ref)
        if session.node is None:
            return 0
        name = session.node.name
        answer = await self._command(
            protocol.Pin(id=secrets.token_hex(16), record=name, seconds=float(seconds)), (SCHEDULER,)
        )
        self._forget_pins([name])
        if answer.num_kv:
            ends = self._loop.call_later(answer.seconds + 0.05, self._pin_ended, name)
            self._pinned[name] = (ref, ends)
            if not self._transport.always_served:
                ends.cancel()
        return answer.num_kv

    def _pin_ended(self, record: str) -> None:
        """An idle engine does not look at its pins, so it is told when one is over."""
        task = self._loop.create_task(self._let_go(record))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _forget_pins(self, records: Sequence[str]) -> None:
        for record in records:
            if record in self._pinned:
                self._pinned.pop(record)[1].cancel()

    async def _let_go(self, record: str) -> None:
        """End one pin. Nobody waits for it, and it ends by itself in any case: so no error."""
        self._forget_pins([record])
        with contextlib.suppress(ThawError):
            await self._command(protocol.Pin(id=secrets.token_hex(16), record=record, seconds=0.0), (SCHEDULER,))

    async def _unpin_all(self) -> None:
        self._forget_pins(list(self._pinned))
        await self._command(protocol.Unpin(id=secrets.token_hex(16)), (SCHEDULER,))

    async def _current_identity(self) -> ModelIdentity:
        """The model's identity by its files, or by a digest of what runs when that has changed since the boot."""
        epoch = (await self._command(protocol.Look(id=secrets.token_hex(16)))).epoch
        if self._identity is None or self._identity[0] != epoch:
            found = await asyncio.to_thread(self._identity_of_files, self.info.groups[0])
            if epoch:
                answer = await self._command(protocol.Look(id=secrets.token_hex(16), digest=True))
                found = msgspec.structs.replace(found, weights=digest(f"{self.name}-device\0{answer.digest}".encode()))
            self._identity = (epoch, found)
        return msgspec.structs.replace(self._identity[1], policy=self._policy)

    async def _command(self, message: Message, senders: tuple[str | int, ...] | None = None) -> Answer:
        """Say it, wait for the mail, take the request back. Raises what the engine answered."""
        message = msgspec.structs.replace(message, drop=self._take_dropped())
        submission = Submission(message.id, [0], self._one_token(), None, message)
        talk = self._loop.create_task(self._drain(submission))
        try:
            ranks = senders or tuple(range(self._facts.world_size))
            answers = await self._mailed(message.id, ranks, talk)
        finally:
            await self._transport.abort(submission.name)
            talk.cancel()
            await asyncio.gather(talk, return_exceptions=True)
        answer = merge(answers)
        if answer.kind:
            raise _error(answer)
        return answer

    async def _drain(self, submission: Submission) -> None:
        async for _ in self._transport.stream(submission):
            pass

    async def _mailed(
        self, name: str, senders: Sequence[str | int], talk: asyncio.Task[None] | None = None,
        limit_s: float = COMMAND_LIMIT_S,
    ) -> list[Answer]:  # fmt: skip
        """Answers of all `senders`, or the scheduler's refusal."""
        found: dict[str | int, Answer] = {}
        ends, looks, pause = self._loop.time() + limit_s, self._loop.time() + 1.0, 0.0005
        while True:
            for sender in {*senders, SCHEDULER} - found.keys():
                answer = self._mail.take(name, sender)
                if answer is not None:
                    found[sender] = answer
            if SCHEDULER in found and (found[SCHEDULER].kind or SCHEDULER in senders):
                return [found[SCHEDULER]]
            if all(sender in found for sender in senders):
                return [found[sender] for sender in senders]
            if any(answer.kind for answer in found.values()):
                return [answer for answer in found.values() if answer.kind]
            if talk is not None and talk.done() and not talk.cancelled() and talk.exception() is not None:
                raise talk.exception()  # type: ignore[misc]
            if self._loop.time() > looks:
                looks = self._loop.time() + 1.0
                self._mail.check_alive()
            if self._loop.time() > ends:
                raise TimedOut(f"the engine did not answer within {limit_s:.0f} s; look into its log")
            await asyncio.sleep(pause)
            pause = min(pause * 1.3, 0.01)

    def _worker_facts(self) -> list[WorkerFacts]:
        found = [self._mail.worker_facts(rank) for rank in range(self._facts.world_size)]
        missing = [rank for rank, facts in enumerate(found) if facts is None]
        if missing:
            raise NotFound(
                f"thaw's connector is not active in worker(s) {missing} of {self._facts.world_size}; is thaw installed "
                "in the engine's environment? (its log says why a connector was not loaded)"
            )
        return [facts for facts in found if facts is not None]


def _nobody(_: Delta) -> None:
    """Who listens to a lane that has ended."""


def _error(answer: Answer) -> ThawError:
    return made(answer.kind, answer.error)


def _nothing_to_restore(plan: HydratePlan, continuation: Any) -> Proof:
    return Proof(
        num_prompt_tokens=len(plan.tokens),
        num_cached_tokens=0,
        matched=0,
        first_mismatch=None,
        verification="disk-verified",
        continuation=continuation,
        share_prefix=plan.share_prefix,
    )
