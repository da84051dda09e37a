"""The embedded engine: the contract's verbs over a driver and a backend."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import msgspec

from thaw.core import kv_ranges
from thaw.core.cache import keeps_all, point_groups
from thaw.core.errors import (
    Busy,
    EngineDied,
    InvalidRequest,
    NotFound,
    NotKept,
    Refused,
    StaleSession,
    TooLong,
    Unsupported,
)
from thaw.core.identity import ModelIdentity
from thaw.core.objects import Chat
from thaw.core.proof import Proof
from thaw.core.sampling import check_seed, derive, fresh_seed
from thaw.engines import restoring
from thaw.engines.base import (
    Captured,
    CapturePlan,
    Completion,
    Engine,
    EngineInfo,
    GenerateRequest,
    Handle,
    Hydrated,
    HydratePlan,
    SessionRef,
    SessionView,
    check_sleep_level,
    require_no_adapter,
)
from thaw.engines.embedded import transfer
from thaw.engines.embedded.backend import Backend
from thaw.engines.embedded.driver import Driver
from thaw.engines.embedded.generation import GenerationTask, Lane, PrefillTask
from thaw.engines.embedded.pages import PagedKV
from thaw.engines.embedded.park import Parked
from thaw.engines.embedded.session import LiveSession
from thaw.engines.embedded.sleep import Nap
from thaw.engines.embedded.stale import StaleKV
from thaw.engines.embedded.weights import Weights, WeightsWatch
from thaw.engines.promise import Promise
from thaw.engines.session.bad_words import check as check_sampling
from thaw.engines.session.children import check_children
from thaw.engines.session.turns import require_resumable, reseed, settle_turn
from thaw.engines.text import cut_turns

T = TypeVar("T")
ASK_TO_KEEP = "To go on with its KV as it is, ask for that first: session.keep_stale_kv()."
CAPABILITIES = frozenset(
    {
        "capture-running", "fork-running", "interior-points", "park", "resume", "policy", "logprobs",
        "boundary", "boundary-hidden", "own-batch", "prefill-progress", "entropy", "points", "stale-kv", "beside",
        "sleep",
    }
)  # fmt: skip


class EmbeddedEngine(Engine):
    """One model in this process. Sessions live until `close_session` or `close`."""

    def __init__(self, backend: Backend, *, policy: str = "0") -> None:
        self._backend = backend
        self._weights = WeightsWatch(backend, policy)
        self._sessions: dict[SessionRef, LiveSession] = {}
        self._driver = Driver(backend.name)
        self._io = ThreadPoolExecutor(2, thread_name_prefix="thaw-io")
        self._in_flight: set[Future[None]] = set()
        self._nap = Nap(backend)
        self._closed = False
        self.codec = backend.codec
        self.info = EngineInfo(
            name=backend.name,
            version=backend.version,
            model=backend.model,
            device=backend.device,
            continuation="decode-exact",
            groups=backend.groups,
            max_model_len=backend.max_model_len,
            vocab_size=backend.vocab_size,
            eos_token_ids=backend.eos_token_ids,
            capabilities=CAPABILITIES - _without(backend),
            numerics=backend.numerics,
        )

    def identity(self, adapter: str | None = None) -> ModelIdentity:
        require_no_adapter(self, adapter)
        with self._nap.awake():
            return self._weights.identity()

    def set_policy(self, version: str) -> None:
        """See the contract. Sessions opened before keep the old version and may only be read, forked from never."""
        if not version or len(version) > 200:
            raise InvalidRequest(f"policy version {version!r}: must be 1 to 200 characters")
        with self._nap.awake():
            self._driver.call(lambda: self._weights.set_policy(version)).result()

    def update_weights(self, source: str | Path) -> None:
        """See the contract. Other sessions run on while the files are read."""
        with self._nap.awake():
            put = self._backend.weights_of(source)

            def change() -> None:
                put()
                self._weights.check()

            self._driver.call(change).result()

    def require_sleep(self, *, level: int = 1) -> None:
        check_sleep_level(level)
        self._nap.require_awake()
        self._backend.require_sleep(level)

    def sleep(self, *, level: int = 1) -> tuple[SessionRef, ...]:
        """See the contract. Parked sessions stay where they are, in host memory."""
        self.require_sleep(level=level)
        with self._nap.falling_asleep():
            self._driver.call(lambda: None).result()  # what was let in has its job by now
            wait(tuple(self._in_flight))
            return self._driver.call(lambda: self._fall_asleep(level)).result()

    def wake(self) -> None:
        with self._nap.waking():
            self._driver.call(self._wake_up).result()

    @property
    def policy_version(self) -> str:
        return self._weights.policy

    def open(
        self,
        *,
        seed: int | None = None,
        salt: str | None = None,
        share_prefix: bool = False,
        adapter: str | None = None,
    ) -> SessionRef:
        require_no_adapter(self, adapter)
        self._nap.require_awake()
        number = fresh_seed() if seed is None else check_seed(seed)
        session = self._new(PagedKV(self._backend), number, salt, share_prefix)
        return self._driver.call(lambda: self._admit(session)).result()

    def view(self, session: SessionRef) -> SessionView:
        if self._driver.on_thread():
            return self._get(session).view()
        return self._driver.call(lambda: self._get(session).view()).result()

    def append(
        self,
        session: SessionRef,
        token_ids: Sequence[int],
        *,
        text: str = "",
        role: str | None = None,
        chat: Chat | None = None,
    ) -> Handle[SessionView]:
        promise: Promise[SessionView] = Promise()

        def begin() -> None:
            live = self._usable(session)
            self._check_tokens(len(live.tokens), token_ids, 0)
            self._check_text(token_ids)
            settle_turn(live)
            lane = Lane(0, live, list(token_ids), text, role, chat)
            task = PrefillTask(self._backend, lane, promise, self._settle)
            live.busy = task
            promise.on_cancel = lambda: self._soon(task.abort)
            self._driver.start(task)

        return self._begin(begin, promise)

    def keep_points(self, session: SessionRef, tokens: Sequence[int], *, unaligned: bool = False) -> None:
        self._driver.call(lambda: self._ask(self._usable(session), tokens, unaligned)).result()

    def keep_stale_kv(self, session: SessionRef) -> None:
        """See the contract. Not on models with recurrent layers: a state is of all tokens before it at once."""
        if "stale-kv" not in self.info.capabilities:
            raise Unsupported(
                f"{self.info.model}: a recurrent layer's state is of all tokens before it at once, so after a policy "
                "step it would be of no one policy. Recompute it (policy='recompute')"
            )

        def keep() -> None:
            self._get(session).stale.asked = True

        self._driver.call(keep).result()

    def generate(self, requests: Sequence[GenerateRequest]) -> Handle[list[Completion]]:
        promise: Promise[list[Completion]] = Promise()
        asked = tuple(requests)

        def begin() -> None:
            lanes = self._lanes(asked)
            task = GenerationTask(self._backend, lanes, asked, promise, self._release, self._still_current)
            for lane in lanes:
                lane.session.busy = task
            promise.on_cancel = lambda: self._soon(task.abort)
            self._driver.start(task)

        if not asked:
            raise InvalidRequest("generate: no requests; give at least one session")
        return self._begin(begin, promise)

    def capture(self, session: SessionRef, plan: CapturePlan) -> Handle[Captured]:
        promise: Promise[Captured] = Promise()

        def take() -> None:
            taken = transfer.cut(self._fresh(session), self._backend)
            self._in_background(promise, lambda: transfer.write(taken, plan, self._identity_of(taken)))

        return self._begin(take, promise)

    def hydrate(self, plan: HydratePlan) -> Handle[Hydrated]:
        require_no_adapter(self, plan.adapter)
        promise: Promise[Hydrated] = Promise()
        self._in_background(promise, lambda: self._hydrate(plan))
        return promise

    def fork(
        self,
        session: SessionRef,
        n: int,
        *,
        at: int | None = None,
        replay: bool = False,
        seeds: Sequence[int] | None = None,
    ) -> Handle[list[SessionRef]]:
        check_children(n, replay, seeds)
        return self._driver.call(lambda: self._fork(self._fresh(session), n, at, replay, seeds))

    def reread(self, session: SessionRef, at: int) -> Handle[SessionRef]:
        promise: Promise[SessionRef] = Promise()
        self._in_background(promise, lambda: self._reread(session, at))
        return promise

    def park(self, session: SessionRef) -> Handle[SessionView]:
        def put_away() -> SessionView:
            live = self._usable(session)
            live.parked = Parked(live.kv)
            return live.view()

        return self._driver.call(put_away)

    def close_session(self, session: SessionRef) -> None:
        def drop() -> None:
            live = self._sessions.pop(session, None)
            if live is not None and isinstance(live.busy, (PrefillTask, GenerationTask)):
                live.busy.abort(live)

        if not self._closed:
            self._driver.call(drop).result()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._nap.end()
        self._driver.close()
        self._io.shutdown()
        self._sessions.clear()
        self._backend.close()

    # -- sessions

    def _new(self, kv: PagedKV, seed: int, salt: str | None, share_prefix: bool) -> LiveSession:
        running = self._weights.running
        return LiveSession(
            ref=SessionRef(secrets.token_hex(16)),
            kv=kv,
            seed=seed,
            salt=secrets.token_hex(16) if salt is None else salt,
            share_prefix=share_prefix,
            policy=running.policy,
            epoch=running.epoch,
            stale=StaleKV(self._weights),
        )

    def _admit(self, session: LiveSession) -> SessionRef:
        self._sessions[session.ref] = session
        return session.ref

    def _identity_of(self, taken: transfer.Cut) -> ModelIdentity:
        """The identity that a cut's KV was computed under. Raises `StaleSession` when it is gone meanwhile."""
        identity, epoch = self._weights.stamp()
        if (taken.policy, taken.epoch) != (identity.policy, epoch):
            raise StaleSession(
                "the weights or the policy changed while the session was being captured; nothing was kept"
            )
        return identity

    def _get(self, ref: SessionRef) -> LiveSession:
        live = self._sessions.get(ref)
        if live is None:
            raise NotFound(
                f"session {ref[:8]}… is not open in this engine: it was closed, or belongs to another engine"
            )
        return live

    def _fresh(self, ref: SessionRef) -> LiveSession:
        """The session, its KV in memory and of the weights and policy that run now."""
        self._nap.require_awake()
        self._weights.check()
        return self._current(ref)

    def _current(self, ref: SessionRef) -> LiveSession:
        """As `_fresh`, by the last look at the weights."""
        live, now = self._get(ref), self._weights.running
        live.require_kept()
        is_stale = bool(live.kv.num_tokens or live.parked) and self._is_stale(live)
        self._require_asked(live, now, is_stale)
        if isinstance(live.parked, Parked):
            live.kv = live.parked.restore(self._backend)
            live.parked = None
        if is_stale:
            live.step(now)
        live.policy, live.epoch = now
        return live

    def _require_asked(self, live: LiveSession, now: Weights, is_stale: bool) -> None:
        """Raise for KV of other weights, unless the session's owner asked to keep it and nothing runs on it."""
        if is_stale and (live.busy is not None or not live.stale.asked):
            raise StaleSession(
                f"the session's KV is of policy {live.policy!r}, weights epoch {live.epoch}; the engine now runs "
                f"policy {now.policy!r}, epoch {now.epoch}. {StaleSession.way_out} {self._keeping}"
            )
        if not live.stale.asked and (ranges := live.kv_ranges()):
            raise StaleSession(
                f"the session has KV of other weights than those that run ({kv_ranges.text(ranges)}), and nobody asked "
                f"to keep it. {StaleSession.way_out} {self._keeping}"
            )

    @property
    def _keeping(self) -> str:
        return ASK_TO_KEEP if "stale-kv" in self.info.capabilities else ""

    def _is_stale(self, live: LiveSession) -> bool:
        return (live.epoch, live.policy) != (self._weights.epoch, self._weights.policy)

    def _still_current(self, sessions: Sequence[LiveSession]) -> None:
        """Raise if the weights or the policy changed while these ran: their tokens would be of no one policy."""
        self._weights.check()
        if any(self._is_stale(live) for live in sessions):
            raise StaleSession(
                f"the weights or the policy changed while this generation ran (it began under {sessions[0].policy!r}), "
                "so its tokens are of no one policy; change them between generations, and generate again"
            )
        for live in sessions:
            live.stale.settled = live.kv.num_tokens

    def _usable(self, ref: SessionRef) -> LiveSession:
        return _idle(self._fresh(ref))

    def _settle(self, session: LiveSession) -> None:
        """A prefill has ended: look whether it is all of one policy."""
        with contextlib.suppress(StaleSession):  # of a guest that is gone: the next use says so
            self._weights.check()
            if not self._is_stale(session):
                session.stale.settled = session.kv.num_tokens
        self._release(session)

    def _release(self, session: LiveSession) -> None:
        session.busy = None

    def _check_tokens(self, num_tokens: int, tokens: Sequence[int], more: int) -> None:
        """Raise unless `tokens` may follow `num_tokens` others, with room for `more`."""
        bad = [t for t in tokens if not isinstance(t, int) or not 0 <= t < self._backend.vocab_size]
        if bad:
            raise InvalidRequest(f"token ids {bad[:5]} are outside the vocabulary of {self._backend.vocab_size}")
        total, limit = num_tokens + len(tokens) + more, self._backend.max_model_len
        if total > limit:
            raise TooLong(
                f"{num_tokens} tokens and {len(tokens)} new ones (and {more} to generate) exceed the model's "
                f"{limit}; shorten the prompt or fork an earlier point"
            )

    def _check_text(self, tokens: Sequence[int]) -> None:
        """Raise for a token that stands for what is no text."""
        named = next((t for t in tokens if t in self._backend.placeholders), None)
        if named is not None:
            raise Unsupported(
                f"token {named} is the model's {self._backend.placeholders[named]}: it stands for what is no text, and "
                "this engine runs the text part alone; leave images, videos and sound out"
            )

    # -- verbs, on the driver's thread

    def _ask(self, live: LiveSession, tokens: Sequence[int], unaligned: bool) -> None:
        multiple, limit = self._backend.point_multiple, self._backend.max_model_len
        for token in tokens:
            if not isinstance(token, int) or not 0 < token <= limit:
                raise InvalidRequest(f"a point at token {token!r}: it must be 1 to {limit}")
            if token % multiple and not unaligned:
                near = [n for n in (token // multiple * multiple, (token // multiple + 1) * multiple) if n]
                raise InvalidRequest(
                    f"a point at token {token}: the model's recurrent layers read {multiple} tokens at a time, and a "
                    f"prefill that is cut inside such a chunk computes other bits than one that is not. Ask for "
                    f"{' or '.join(map(str, near))}, or insist (unaligned=True, --unaligned)"
                )
        if not keeps_all(self._backend.groups):
            live.kv.ask(tokens)

    def _lanes(self, requests: Sequence[GenerateRequest]) -> list[Lane]:
        """Check every request before any session is touched."""
        refs = [request.session for request in requests]
        if len(set(refs)) != len(refs):
            raise InvalidRequest("generate: the same session stands twice in one batch; fork it first")
        self._nap.require_awake()
        self._weights.check()
        lives = [_idle(self._current(ref)) for ref in refs]
        for live, request in zip(lives, requests, strict=True):
            self._check_request(live, request)
        lanes = []
        for i, (live, request) in enumerate(zip(lives, requests, strict=True)):
            if not request.resume:
                settle_turn(live)
            if not request.prompt:
                _step_back(live)
            lanes.append(Lane(i, live, list(request.prompt), request.prompt_text, request.role, request.chat))
        return lanes

    def _check_request(self, live: LiveSession, request: GenerateRequest) -> None:
        if not request.prompt:
            _require_next(live)
        if request.resume:
            require_resumable(live, request, self._weights.policy)
            return
        if request.sampling is None:
            raise InvalidRequest("generate: no sampling given")
        self._check_tokens(len(live.tokens), request.prompt, 1)
        self._check_text(request.prompt)
        check_sampling(request.sampling, self.codec, self._backend.vocab_size)
        if not live.tokens and not request.prompt:
            raise InvalidRequest("generate: the session is empty and so is the prompt; append something first")

    def _fork(
        self, parent: LiveSession, n: int, at: int | None, replay: bool, seeds: Sequence[int] | None
    ) -> list[SessionRef]:
        position = len(parent.tokens) if at is None else at
        if not 0 <= position <= len(parent.tokens):
            raise InvalidRequest(f"fork at token {position}: the session has {len(parent.tokens)}")
        children = [self._child(parent, position, replay, seeds[i] if seeds else None, i) for i in range(n)]
        return [self._admit(child) for child in children]

    def _child(
        self, parent: LiveSession, at: int, replay: bool, seed: int | None, index: int, *, num_kv: int | None = None
    ) -> LiveSession:
        """`num_kv`: how many tokens of KV it begins with, where that is not as many as `at` allows."""
        whole = at == len(parent.tokens) and num_kv is None
        if num_kv is None:
            num_kv = parent.kv.num_tokens if whole else parent.kv.before(at)
        child = self._new(parent.kv.fork(num_kv), parent.seed, parent.salt, parent.share_prefix)
        child.policy, child.epoch, child.stale = *parent.of, parent.stale.child(parent.of, child.kv.num_tokens)
        child.tokens = parent.tokens[:at]
        child.turns = list(cut_turns(parent.all_turns(), parent.tokens, at, self.codec))
        child.row = parent.row if whole else None
        child.last = parent.last if whole else None
        child.stored_boundary = parent.stored_boundary if whole else None
        child.proof = Proof(
            num_prompt_tokens=at,
            num_cached_tokens=child.kv.num_tokens,
            matched=child.kv.num_tokens,
            first_mismatch=None,
            verification="live-shared",
            continuation="decode-exact",
            share_prefix=parent.share_prefix,
            kv_ranges=child.kv_ranges(),
        )
        if not replay:
            reseed(child, derive(parent.seed, at, index) if seed is None else seed)
        return child

    def _reread(self, session: SessionRef, at: int) -> SessionRef:
        """On an I/O thread."""

        def begin() -> LiveSession:
            parent = self._fresh(session)
            if not 0 <= at <= len(parent.tokens):
                raise InvalidRequest(f"fork at token {at}: the session has {len(parent.tokens)}")
            child = self._child(parent, at, True, None, 0, num_kv=parent.kv.nearest(at))
            self._admit(child)
            return child

        child = self._driver.call(begin).result()
        num_kv = child.kv.num_tokens
        self._read(child.ref, ())
        child.proof = None if child.proof is None else _with_gap(child.proof, num_kv, at, "read again as asked")
        return child.ref

    def _hydrate(self, plan: HydratePlan) -> Hydrated:
        """On an I/O thread: nothing of it touches a session before it is admitted."""
        self._nap.require_awake()
        try:
            identity, epoch = self._weights.stamp()
            restoring.check_weights(plan, identity)
        except Refused as refusal:
            if plan.policy != "recompute" or getattr(refusal, "field", "") == "tokenizer":
                raise
            return self._recompute(plan, str(refusal))
        if plan.stale_kv and "stale-kv" not in self.info.capabilities:
            restoring.refuse_stale(plan, self.info.name)
        if plan.not_kept and plan.policy != "recompute":
            restoring.check_kept(plan)
        if plan.not_kept and not plan.num_kv:
            return self._recompute(plan, plan.not_kept)
        self._check_tokens(0, plan.tokens, 0)
        loaded = transfer.load(plan, self._backend, self._shared(plan))
        session = self._restored(plan, loaded.kv)
        session.loaded = plan.slices
        session.row, session.proof, proof = loaded.row, loaded.proof, loaded.proof
        session.policy, session.epoch = identity.policy, epoch
        session.stored_boundary = plan.boundary
        session.stale.settled = session.kv.num_tokens
        if plan.stale_kv:
            proof = session.load_stale(restoring.ranges_of(plan), keep_row=plan.identity == identity)
        ref = self._driver.call(lambda: self._admit(session)).result()
        if plan.not_kept:
            session.proof = proof = self._replay(ref, plan, proof)
        return Hydrated(session=ref, proof=proof)

    def _shared(self, plan: HydratePlan) -> PagedKV | None:
        """What `plan.beside` has of the plan's KV, as a fork of it has that."""

        other = plan.beside
        if other is None or "beside" not in self.info.capabilities:
            return None

        def take() -> PagedKV | None:
            live = self._sessions.get(other)
            if live is None or self._is_stale(live):
                return None
            at = restoring.num_shared(plan, live.loaded)
            return live.kv.fork(at) if 0 < at <= live.kv.num_tokens else None

        return self._driver.call(take).result()

    def _replay(self, ref: SessionRef, plan: HydratePlan, loaded: Proof) -> Proof:
        """Prefill what comes after the point that was loaded, because the caller allowed it."""
        self._read(ref, ())
        return _with_gap(loaded, plan.num_kv, len(plan.tokens), plan.not_kept)

    def _recompute(self, plan: HydratePlan, reason: str) -> Hydrated:
        """Prefill the plan's tokens again, because the caller allowed it."""
        session = self._restored(plan, PagedKV(self._backend))
        turns, session.tokens, session.turns = session.turns, [], []
        ref = self._driver.call(lambda: self._admit(session)).result()
        if plan.tokens:
            self._read(ref, plan.tokens)
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
        return Hydrated(session=ref, proof=session.proof)

    def _read(self, ref: SessionRef, tokens: Sequence[int]) -> None:
        """Prefill, for a session that nobody has yet: where it fails, the session is gone."""
        try:
            self.append(ref, tokens).result()
        except BaseException:
            self.close_session(ref)
            raise

    def _restored(self, plan: HydratePlan, kv: PagedKV) -> LiveSession:
        session = self._new(kv, plan.seed, plan.salt, plan.share_prefix)
        session.tokens, session.turns = list(plan.tokens), list(plan.turns)
        return session

    # -- threads

    def _begin(self, begin: Callable[[], None], promise: Promise[T]) -> Promise[T]:
        """Run `begin` on the driver; if it raises, that is the promise's outcome."""

        def hand_on(started: Handle[None]) -> None:
            try:
                started.result()
            except BaseException as error:  # noqa: BLE001 - handed to the caller
                promise.settle(error=error)

        self._driver.call(begin).add_done_callback(hand_on)
        return promise

    def _soon(self, fn: Callable[[], None]) -> None:
        if not self._closed:
            self._driver.call(fn)

    def _in_background(self, promise: Promise[T], work: Callable[[], T]) -> None:
        def run() -> None:
            try:
                promise.settle(work())
            except BaseException as error:  # noqa: BLE001 - handed to the caller
                promise.settle(error=error)

        if self._closed:
            raise EngineDied(f"engine {self.info.name} is closed; load it again")
        job = self._io.submit(run)
        self._in_flight.add(job)
        job.add_done_callback(self._in_flight.discard)

    # -- sleep, on the driver's thread

    def _fall_asleep(self, level: int) -> tuple[SessionRef, ...]:
        running = sum(live.busy is not None for live in self._sessions.values())
        if running:
            raise Busy(
                f"{running} sessions are running, and would lose their KV; wait for their results or cancel them "
                "(repo.sleep() does, and stores them first)"
            )
        self._weights.check()  # what runs now is what is to run afterwards
        dropped = [live for live in self._sessions.values() if live.kv.num_tokens]
        try:
            self._backend.sleep(level)
        except BaseException:
            self._wake_up()
            raise
        for live in dropped:
            live.drop()
        self._backend.free()
        return tuple(live.ref for live in dropped)

    def _wake_up(self) -> None:
        self._backend.wake()
        self._weights.check()


def _without(backend: Backend) -> frozenset[str]:
    """What an engine has not of this model."""
    missing = set() if backend.keeps_interior else {"interior-points"}
    missing |= set() if keeps_all(backend.groups) else {"beside"}
    return frozenset(missing | ({"stale-kv"} if point_groups(backend.groups) else set()))


def _with_gap(proof: Proof, num_kv: int, num_tokens: int, reason: str) -> Proof:
    """The proof of a session whose tokens from `num_kv` on were read again."""
    return msgspec.structs.replace(
        proof,
        first_mismatch=num_kv,
        num_recomputed_tokens=num_tokens - num_kv,
        continuation="close",
        reason=reason,
    )


def _idle(session: LiveSession) -> LiveSession:
    if session.busy is not None:
        raise Busy(f"session {session.ref[:8]}… is running; wait for its result, cancel it, or fork it")
    return session


def _require_next(session: LiveSession) -> None:
    """Raise `NotKept` where nothing says what follows: all tokens are read, and the state before the last is gone."""
    count = len(session.tokens)
    if session.row is None and session.kv.num_tokens == count > 0 and session.kv.before(count) == count:
        raise NotKept(
            f"the state after {count} tokens is kept and the one before the last of them is not, so it goes on with "
            f"new tokens alone: give a prompt, fork at token {count + 1}, whose last token runs again, "
            f"{NotKept.way_out}"
        )


def _step_back(session: LiveSession) -> None:
    """Where every token has KV but the last hidden state is not known (a prefill cut short), run the last one again.

    Slots are never written twice, so the pages are forked one token earlier (the tail page is copied)."""
    if session.row is None and session.kv.num_tokens == len(session.tokens) > 0:
        session.kv = session.kv.fork(len(session.tokens) - 1)
        session.cut_stale()
