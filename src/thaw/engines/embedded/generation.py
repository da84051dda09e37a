"""Prefill and generation: one batch, step by step.

Prompts go in chunks that end at multiples of CHUNK tokens of the session's own positions, each session's alone; what
is left of every session (at most CHUNK tokens) then runs packed together. A prompt that is only read has its last token
run by itself: a child that is forked there later runs that token so, and has the same bits. So the shape of every
forward pass, and with it the bits, is a function of the batch's own requests and of nothing else that runs.

On models with point states a prompt's last token always runs by itself, so that there is a state before it; a prefill
also stops where a state was asked for, and the states before the last token of each turn are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from thaw.core.cache import point_groups
from thaw.core.objects import Chat, Turn
from thaw.engines.base import Completion, Delta, GenerateRequest, SessionView
from thaw.engines.embedded.backend import Backend, Feed
from thaw.engines.embedded.driver import cancelled
from thaw.engines.embedded.session import LastLogits, LiveSession
from thaw.engines.promise import Promise
from thaw.engines.sampling.spec import Sampled, SampleSpec
from thaw.engines.session.bad_words import endings
from thaw.engines.session.turns import close_prompt, completion, open_turn

CHUNK = 1024
PACK = 1024
"""At most this many tokens run packed in one prefill pass."""


@dataclass
class Lane:
    """One session's way through a batch."""

    index: int
    session: LiveSession
    prompt: list[int] = field(default_factory=list)
    prompt_text: str = ""
    role: str | None = None
    chat: Chat | None = None
    prompt_start: int = 0
    num_cached: int = 0
    num_prefilled: int = 0
    first_token_s: float | None = None
    aborted: bool = False
    done: bool = False

    def __post_init__(self) -> None:
        self.prompt_start = len(self.session.tokens)
        self.num_cached = self.session.kv.num_tokens

    def pending(self) -> list[int]:
        """Tokens that have no KV yet, in order."""
        return self.session.tokens[self.session.kv.num_tokens :] + self.prompt

    def take(self, fed: int) -> None:
        """`fed` pending tokens now have KV: move the prompt's share into the session."""
        self.num_prefilled += fed
        missing = self.session.kv.num_tokens - len(self.session.tokens)
        if missing > 0:
            self.session.tokens += self.prompt[:missing]
            del self.prompt[:missing]

    def close_prompt(self) -> None:
        chat = None if self.prompt else self.chat
        close_prompt(self.session, self.prompt_start, self.prompt_text, self.role, chat)
        self.keep_turn()

    def keep_turn(self) -> None:
        """A turn ended here: its last token can be run again later, from the state before it."""
        kv, before = self.session.kv, len(self.session.tokens) - 1
        if before in kv.points:
            kv.ask([before])


class Prefill:
    """Brings every lane to the point where its next logits are known. `step` returns True while there is more.

    `last_alone`: the last token runs by itself, after the others, as it does for whoever continues from there later."""

    def __init__(self, backend: Backend, lanes: Sequence[Lane], *, last_alone: bool = False) -> None:
        self._backend = backend
        self._lanes = lanes
        self._has_states = bool(point_groups(backend.groups))
        self._last_alone = last_alone or self._has_states

    def step(self) -> bool:
        waiting = [(lane, self._next(lane)) for lane in self._waiting()]
        for lane, pending in waiting:
            if len(pending) > CHUNK:
                position = lane.session.kv.num_tokens
                self._feed([(lane, pending[: CHUNK - position % CHUNK])])
                return True
        pack: list[tuple[Lane, list[int]]] = []
        for lane, pending in waiting:
            if sum(len(p) for _, p in pack) + len(pending) <= PACK:
                pack.append((lane, pending))
        if pack:
            self._feed(pack)
        return bool(self._waiting())

    def _waiting(self) -> list[Lane]:
        return [lane for lane in self._lanes if not lane.aborted and lane.pending()]

    def _next(self, lane: Lane) -> list[int]:
        pending, kv = lane.pending(), lane.session.kv
        asked = kv.next_asked()
        if asked is not None and asked - kv.num_tokens < len(pending):
            return pending[: asked - kv.num_tokens]
        return pending[:-1] if self._last_alone and len(pending) > 1 else pending

    def _feed(self, pack: Sequence[tuple[Lane, list[int]]]) -> None:
        for lane, tokens in pack:
            lane.session.kv.reserve(lane.session.kv.num_tokens + len(tokens))
        rows = self._backend.forward([Feed(lane.session.kv, tokens) for lane, tokens in pack])
        for (lane, tokens), row in zip(pack, rows, strict=True):
            lane.take(len(tokens))
            lane.session.row = row if self._has_states or not lane.pending() else None


class PrefillTask:
    """Task: prefill one session's prompt."""

    def __init__(
        self, backend: Backend, lane: Lane, promise: Promise[SessionView], release: Callable[[LiveSession], None]
    ):
        self._lane, self._promise, self._release = lane, promise, release
        self._prefill = Prefill(backend, [lane], last_alone=True)

    def step(self) -> bool:
        if self._lane.aborted:
            self._finish()
            self._promise.settle(error=cancelled())
            return False
        if self._prefill.step():
            return True
        self._finish()
        self._promise.settle(self._lane.session.view())
        return False

    def abort(self, _: LiveSession | None = None) -> None:
        self._lane.aborted = True

    def fail(self, error: BaseException) -> None:
        self._finish()
        self._promise.settle(error=error)

    def _finish(self) -> None:
        self._lane.close_prompt()
        self._release(self._lane.session)


class GenerationTask:
    """Task: one batch of completions."""

    def __init__(
        self,
        backend: Backend,
        lanes: Sequence[Lane],
        requests: Sequence[GenerateRequest],
        promise: Promise[list[Completion]],
        release: Callable[[LiveSession], None],
        check: Callable[[Sequence[LiveSession]], None],
    ) -> None:
        """`check` is asked at the end, and raises if the weights or the policy are not what the sessions began with."""
        self._backend, self._lanes, self._promise = backend, lanes, promise
        self._check = check
        self._requests, self._release = requests, release
        self._prefill: Prefill | None = Prefill(backend, lanes)
        self._results: list[Completion | None] = [None] * len(lanes)
        self._started = time.perf_counter()

    def step(self) -> bool:
        self._drop_aborted()
        if self._prefill is not None:
            if self._prefill.step():
                return True
            self._prefill = None
            self._begin()
        else:
            self._decode()
        self._sample()
        return self._more()

    def abort(self, session: LiveSession | None = None) -> None:
        """Stop all lanes, or that session's, at the next step boundary."""
        for lane in self._lanes:
            if session is None or lane.session is session:
                lane.aborted = True

    def fail(self, error: BaseException) -> None:
        for lane in self._active():
            self._close(lane, "abort", None)
        self._promise.settle(error=error)

    def _active(self) -> list[Lane]:
        return [lane for lane in self._lanes if not lane.done]

    def _drop_aborted(self) -> None:
        for lane in self._active():
            if lane.aborted:
                self._finish(lane, "abort", None)

    def _begin(self) -> None:
        for lane in self._active():
            if self._requests[lane.index].prompt:
                lane.close_prompt()
            lane.session.turn = open_turn(lane.session, self._requests[lane.index], self._backend.codec)

    def _decode(self) -> None:
        lanes = self._active()
        for lane in lanes:
            lane.session.kv.reserve(len(lane.session.tokens))
        feeds = [Feed(lane.session.kv, lane.session.tokens[lane.session.kv.num_tokens :]) for lane in lanes]
        if feeds:
            for lane, row in zip(lanes, self._backend.forward(feeds), strict=True):
                lane.session.row = row

    def _sample(self) -> None:
        lanes = self._active()
        if not lanes:
            return
        logits = self._backend.logits([lane.session.row for lane in lanes])
        sampled = self._backend.sample(logits, [self._spec(lane) for lane in lanes])
        for i, (lane, choice) in enumerate(zip(lanes, sampled, strict=True)):
            session = lane.session
            session.last = LastLogits(logits, i, len(session.tokens), len(lanes))
            session.row = None
            self._accept(lane, choice)

    def _spec(self, lane: Lane) -> SampleSpec:
        session, turn = lane.session, lane.session.turn
        assert turn is not None
        s = turn.sampling
        few = len(turn.logprobs) < s.min_tokens
        banned = frozenset((*self._backend.eos_token_ids, *s.stop_token_ids)) if few else frozenset()
        if turn.bad_ids:
            banned |= endings(turn.bad_ids, session.tokens[turn.start :])
        return SampleSpec(
            sampling=s,
            seed=turn.seed,
            position=len(session.tokens),
            history=session.tokens,
            output_start=turn.start,
            banned=banned,
            num_top=s.logprobs or 0,
        )

    def _accept(self, lane: Lane, choice: Sampled) -> None:
        session, turn = lane.session, lane.session.turn
        assert turn is not None
        if lane.first_token_s is None:
            lane.first_token_s = time.perf_counter() - self._started
        session.tokens.append(choice.token)
        full = len(session.tokens) >= self._backend.max_model_len
        eos = self._backend.eos_token_ids
        reason, stop_reason = turn.take(choice.token, choice.logprob, choice.top, choice.entropy, eos=eos, full=full)
        if reason is not None:
            self._finish(lane, reason, stop_reason, choice)
        else:
            self._emit(lane, (choice.token,), (choice.logprob,), turn.stream.news(final=False), None)

    def _finish(self, lane: Lane, reason: str, stop_reason: str | int | None, choice: Sampled | None = None) -> None:
        session, turn = lane.session, lane.session.turn
        text = "" if turn is None else turn.rest()
        closed = self._close(lane, reason, stop_reason)
        ids = () if choice is None else (choice.token,)
        self._emit(lane, ids, () if choice is None else (choice.logprob,), text, reason)
        self._results[lane.index] = completion(
            session,
            closed,
            num_cached=lane.num_cached,
            num_prefilled=lane.num_prefilled,
            ttft_s=lane.first_token_s,
            total_s=time.perf_counter() - self._started,
        )

    def _close(self, lane: Lane, reason: str, stop_reason: str | int | None) -> Turn | None:
        """End the lane: freeze its turn into the session and let the session go."""
        session, turn = lane.session, lane.session.turn
        lane.done = True
        closed = None
        if turn is None:
            lane.close_prompt()
        else:
            closed = turn.freeze(reason, stop_reason)
            session.turns.append(closed)
            session.turn = None
            lane.keep_turn()
        self._release(session)
        return closed

    def _emit(
        self, lane: Lane, ids: tuple[int, ...], logprobs: tuple[float, ...], text: str, reason: str | None
    ) -> None:
        self._promise.emit(
            Delta(
                index=lane.index,
                session=lane.session.ref,
                token_ids=ids,
                logprobs=logprobs,
                text=text,
                finish_reason=reason,  # type: ignore[arg-type]
            )
        )

    def _more(self) -> bool:
        if self._active():
            return True
        self._check([lane.session for lane in self._lanes])
        self._promise.settle([result for result in self._results if result is not None])
        return False
