"""Sessions run: prompts are read and completions made, each by a request of its own.

What comes back is taken token by token (`ActiveRequest`); the client ends a turn itself, and then the request."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from thaw.core.errors import Cancelled, InvalidRequest, ThawError, TooLong
from thaw.core.objects import Chat
from thaw.engines.base import Completion, Delta, GenerateRequest, SessionView
from thaw.engines.promise import Promise
from thaw.engines.served import protocol
from thaw.engines.served.client.channel import EngineChannel, refusal
from thaw.engines.served.client.event_loop import LoopThread
from thaw.engines.served.client.model import ServedModel
from thaw.engines.served.client.request import ActiveRequest, claim, nobody
from thaw.engines.served.client.session import ServedSession
from thaw.engines.served.client.transport import Chunk, Submission
from thaw.engines.served.mailbox import SCHEDULER
from thaw.engines.served.protocol import Answer, Message
from thaw.engines.session.turns import OpenTurn, close_prompt, open_turn, require_resumable, settle_turn


class Generation:
    """On the loop. The sessions that it is given are not busy; their `busy` is the lane until the request has ended."""

    def __init__(self, loop: LoopThread, talk: EngineChannel, model: ServedModel) -> None:
        self._loop, self._talk, self._model = loop, talk, model

    async def generate(
        self, promise: Promise[list[Completion]], sessions: Sequence[ServedSession], asked: Sequence[GenerateRequest]
    ) -> list[Completion]:
        """One completion for each session. All start in one step; one that fails does not stop the others."""
        lanes = self._begin(sessions, asked, promise.emit)
        promise.on_cancel = lambda: self._cancel(lanes)
        over = await self._open_all(lanes)
        ready = [lane for lane in lanes if lane.index not in over]
        group = secrets.token_hex(16) if len(ready) > 1 else None
        outcomes = await asyncio.gather(
            *(self._generate_one(lane, group, len(ready)) for lane in ready), return_exceptions=True
        )
        promise.on_cancel = None  # it refers to the sessions, and the promise may be kept for long
        for outcome in (*over.values(), *outcomes):
            if isinstance(outcome, BaseException):
                raise outcome
        return [lane.completion() for lane in lanes]

    async def append(
        self,
        promise: Promise[SessionView],
        session: ServedSession,
        tokens: list[int],
        text: str,
        role: str | None,
        chat: Chat | None = None,
    ) -> SessionView:
        """Read a prompt. Cancelled, the session keeps what was read by then."""
        self._model.check_tokens(len(session.tokens), tokens, 0)
        limit = self._model.info.max_model_len
        if len(session.tokens) + len(tokens) >= limit:
            raise TooLong(
                f"{len(session.tokens) + len(tokens)} tokens fill the engine's {limit}; it needs "
                "room for one more to read them"
            )
        if not tokens:
            return session.view()
        session.require_state()
        count = len(session.tokens) + len(tokens)
        ends = session.to_read(count) if self._model.keeps_states else [count]
        if not ends:
            settle_turn(session)
            return _nothing_to_read(session, tokens, text, role, chat)
        request = GenerateRequest(session=session.ref, prompt=tuple(tokens), prompt_text=text, role=role, chat=chat)
        return await self._read(promise, session, request, ends)

    async def read_again(self, promise: Promise[Any], session: ServedSession) -> None:
        """Of a model that keeps states: read those of the session's tokens that have no KV. The last one runs with what
        follows."""
        ends = session.to_read(len(session.tokens))
        if ends:
            await self._read(promise, session, GenerateRequest(session=session.ref), ends)

    async def _read(
        self, promise: Promise[Any], session: ServedSession, request: GenerateRequest, ends: Sequence[int]
    ) -> SessionView:
        """Read the request's prompt, a piece up to each of `ends`."""
        lane = claim(0, session, request, nobody, self._talk.dropped.append)
        if request.prompt:
            settle_turn(session)
        promise.on_cancel = lambda: self._cancel([lane])
        try:
            return await self._prefill(lane, ends)
        finally:
            promise.on_cancel = None
            lane.release()

    async def abort(self, lane: ActiveRequest) -> None:
        """Stop it at the next step boundary."""
        lane.aborted = True
        await self._talk.transport.abort(lane.name)

    def _cancel(self, lanes: Sequence[ActiveRequest]) -> None:
        """Stop these, from any thread."""
        self._loop.inner.call_soon_threadsafe(self._abort_soon, lanes)

    def _abort_soon(self, lanes: Sequence[ActiveRequest]) -> None:
        for lane in lanes:
            self._loop.spawn(partial(self._stop, lane))

    async def _stop(self, lane: ActiveRequest) -> None:
        """Stop it. Where the model keeps states, an answer that has begun is not taken back: the engine, which may be
        some tokens ahead, ends it with its next one, and the session has all of them and the state behind them."""
        if not self._model.keeps_states or lane.first_token_s is None:
            await self.abort(lane)
            return
        try:
            await self._talk.command(protocol.EndRun(id=secrets.token_hex(16), run=lane.name), (SCHEDULER,))
        except ThawError:  # too many commands at once
            await self.abort(lane)

    # -- before a request

    def _begin(
        self, sessions: Sequence[ServedSession], asked: Sequence[GenerateRequest], emit: Callable[[Delta], None]
    ) -> list[ActiveRequest]:
        """Check every request before any session is touched."""
        for session, request in zip(sessions, asked, strict=True):
            self._check_request(session, request)
        adapters = {session.adapter for session in sessions} - {None}
        if len(adapters) > self._talk.transport.facts.max_adapters:
            raise InvalidRequest(
                f"generate: sessions of {len(adapters)} adapters in one batch; this engine runs at most "
                f"{self._talk.transport.facts.max_adapters} in one step (its max_loras)"
            )
        lanes = []
        for i, (session, request) in enumerate(zip(sessions, asked, strict=True)):
            lanes.append(claim(i, session, request, emit, self._talk.dropped.append))
            if not request.resume:
                settle_turn(session)
        return lanes

    def _check_request(self, session: ServedSession, request: GenerateRequest) -> None:
        session.require_state()
        if self._model.keeps_states and not request.prompt:
            session.require_next()
        if request.resume:
            last = require_resumable(session, request, self._model.policy)
            self._talk.dialect.check_resume(last, session.tokens[last.start :])
            return
        if request.sampling is None:
            raise InvalidRequest("generate: no sampling given")
        self._model.check_tokens(len(session.tokens), request.prompt, 1)
        self._talk.dialect.check(request.sampling)
        if not session.tokens and not request.prompt:
            raise InvalidRequest("generate: the session is empty and so is the prompt; append something first")

    # -- a request

    async def _open_all(self, lanes: Sequence[ActiveRequest]) -> dict[int, BaseException | None]:
        """Open each lane's turn, and read its prompt up to the last state that was asked for inside it; one after
        another, as appends that end there. Those that are over by then, by their index: stopped, or with an error."""
        over: dict[int, BaseException | None] = {}
        for lane in lanes:
            try:
                self._open(lane)
                if not await self._read_ahead(lane):
                    over[lane.index] = None
            except Exception as error:  # noqa: BLE001 - handed to the caller, once the others are done
                over[lane.index] = error
            except BaseException:
                for each in lanes:
                    each.release()
                raise
            if lane.index in over:
                lane.release()
        return over

    async def _read_ahead(self, lane: ActiveRequest) -> bool:
        """Whether the lane goes on: nobody has stopped it while its prompt was read up to what was asked for."""
        stops = lane.session.stops(lane.num_prompt - 1)
        if not stops:
            return True
        answer = await self._read_to(lane, lane.session.tokens, stops)
        if not lane.aborted:
            lane.goes_on(answer, stops[-1])
            return True
        lane.abort()
        lane.close()
        self._count(lane, answer)
        return False

    def _open(self, lane: ActiveRequest) -> None:
        session, start = lane.session, len(lane.session.tokens)
        session.tokens += lane.prompt
        if lane.prompt:
            close_prompt(session, start, lane.request.prompt_text, lane.request.role, lane.request.chat)
        session.turn = open_turn(session, lane.request, self._model.codec)
        lane.num_prompt = len(session.tokens)

    async def _generate_one(self, lane: ActiveRequest, group: str | None, size: int) -> None:
        turn = lane.session.turn
        assert turn is not None
        try:
            await self._decode(lane, turn, lane.message(group, size))
        finally:
            lane.release()

    async def _decode(self, lane: ActiveRequest, turn: OpenTurn, message: Message) -> None:
        session, info = lane.session, self._model.info
        num_top = turn.sampling.logprobs or 0
        sampling = self._talk.dialect.fields(turn, len(session.tokens))

        def take(chunk: Chunk) -> bool:
            if not lane.aborted:
                entropies = self._entropies(lane, turn, len(chunk.token_ids))
                lane.take(chunk, entropies, info.eos_token_ids, info.max_model_len, num_top)
            return lane.reason is None and not lane.aborted

        submission = Submission(lane.name, list(session.tokens), sampling, session.cache_salt or None, message)
        if turn.sampling.entropy:
            self._talk.mail.expect_entropies(lane.name)
        try:
            answer = await self._model.run(submission, session.adapter, take)
        finally:
            self._talk.mail.drop_entropies(lane.name)
        if lane.reason is None:
            lane.abort()
        lane.close()
        self._count(lane, answer)

    def _count(self, lane: ActiveRequest, answer: Answer) -> None:
        """What the engine counted, and where it has states. Raises as `ActiveRequest.count`."""
        try:
            lane.count(answer)
        finally:
            if lane.answered and self._model.keeps_states:
                lane.session.kept(lane.want, answer.points)

    def _entropies(self, lane: ActiveRequest, turn: OpenTurn, count: int) -> Sequence[float | None]:
        """Of the next `count` tokens, which have come: the engine says them in the mail, before it sends the tokens."""
        if not turn.sampling.entropy:
            return [None] * count
        return self._talk.mail.entropies(lane.name, len(lane.session.tokens) - lane.num_prompt, count)

    async def _read_to(self, lane: ActiveRequest, tokens: Sequence[int], ends: Sequence[int]) -> Answer:
        """Read `tokens` up to each of `ends`, a request each that goes on from the one before; of a model that keeps
        states, there is one at each. What the engine says of the last that ran: none comes after a cancel."""
        answer = await self._read_piece(lane, tokens[: ends[0]])
        for before, end in pairwise(ends):
            if lane.aborted:
                break
            lane.goes_on(answer, before)
            answer = await self._read_piece(lane, tokens[:end])
        return answer

    async def _read_piece(self, lane: ActiveRequest, sent: Sequence[int]) -> Answer:
        one, salt = self._talk.dialect.one_token, lane.session.cache_salt or None
        submission = Submission(lane.name, list(sent), one, salt, lane.reading())
        answer = await self._model.run(submission, lane.session.adapter, lambda _: not lane.aborted)
        if answer.kind:
            raise refusal(answer)
        if not lane.aborted and answer.num_tokens <= len(sent):
            lane.aborted = True
        return answer

    async def _prefill(self, lane: ActiveRequest, ends: Sequence[int]) -> SessionView:
        session = lane.session
        start, whole = len(session.tokens), [*session.tokens, *lane.prompt]
        lane.num_prompt = len(whole)
        answer = await self._read_to(lane, whole, ends)
        # A state is after all that was read, and what is wanted is the one before the last token, which runs again.
        last = 1 if self._model.keeps_states else 0
        read = answer.num_kv + last if answer.num_kv else 0
        count = max(start, min(read, len(whole))) if lane.aborted else len(whole)
        session.tokens = whole[:count]
        asked = lane.request
        close_prompt(session, start, asked.prompt_text, asked.role, asked.chat if count == len(whole) else None)
        self._count(lane, answer)
        if lane.aborted:
            raise Cancelled("cancelled by the caller; the session keeps the tokens it has")
        session.busy = None
        return session.view()


def _nothing_to_read(
    session: ServedSession, tokens: Sequence[int], text: str, role: str | None, chat: Chat | None
) -> SessionView:
    """A prompt of which nothing is to be computed: its last token runs with what follows, and the rest has KV."""
    start = len(session.tokens)
    session.tokens += tokens
    close_prompt(session, start, text, role, chat)
    return session.view()
