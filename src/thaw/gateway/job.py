"""A job: one completion, from the session that it goes on from to the commit that it became.

It runs in a task of its own and outlives the connection that asked for it: deltas are kept until it is forgotten, and
whoever follows it sees all of them from any place on. `stop` ends it at the next step boundary; what was said until
then is committed like any other. `park` does too, so that it can go on bit for bit later: what a stream holds back, the
beginning of a stop string or of a character, is not given out. Where the engine ends and another one takes its place,
the job pauses and runs again there with the seed that it had; what it says must begin with what was given out, and
followers see the rest. Its outcome exists once the commit is on disk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import msgspec

from thaw.core.errors import Cancelled, EngineDied
from thaw.engines.base import Completion, Delta, SessionView
from thaw.gateway.asked import Asked, RequestBegun, RequestOutcome
from thaw.gateway.deltas import each
from thaw.gateway.place import Place
from thaw.gateway.problems import told
from thaw.repo.aio import AsyncStream
from thaw.repo.bridge import call
from thaw.repo.chat import ChatResult
from thaw.repo.commit import CommitResult
from thaw.repo.stream import Stream


class Given:
    """What followers have received, so that a restarted run gives them only the rest."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._text = ""
        self._ran: tuple[list[int], str] | None = None

    def again(self) -> None:
        self._ran = ([], "")

    def beyond(self, delta: Delta) -> Delta | None:
        """What of a delta is new; None where nothing is. Raises `Cancelled` where it is not what was said before."""
        if self._ran is None:
            self._ids += delta.token_ids
            self._text += delta.text
            return delta
        ids, text = [*self._ran[0], *delta.token_ids], self._ran[1] + delta.text
        shared, letters = min(len(ids), len(self._ids)), min(len(text), len(self._text))
        if ids[:shared] != self._ids[:shared] or text[:letters] != self._text[:letters]:
            raise Cancelled("the engine restarted and generates something else than before; try again")
        new_ids, new_text = ids[len(self._ids) :], text[len(self._text) :]
        self._ran = (ids, text)
        if len(ids) >= len(self._ids) and len(text) >= len(self._text):
            self._ids, self._text, self._ran = ids, text, None
        if not new_ids and not new_text and delta.finish_reason is None:
            return None
        logprobs = delta.logprobs[len(delta.token_ids) - len(new_ids) :] if new_ids else ()
        return msgspec.structs.replace(delta, token_ids=tuple(new_ids), logprobs=logprobs, text=new_text)


Keep = Callable[[RequestOutcome], Awaitable[None]]


class ReplyJob:
    """Made and used in one event loop. `begun` and `outcome` raise what became of it instead."""

    def __init__(
        self,
        asked: Asked,
        place: Callable[[Asked], Awaitable[Place]],
        keep: Keep,
        engine_back: Callable[[], Awaitable[None]],
        said: Sequence[Delta] = (),
        ran: Callable[[int], object] = lambda _: None,
    ) -> None:
        """`engine_back` waits for another engine after one has died, or raises. `said`: deltas from before it was
        parked. `ran` is told of tokens as the engine samples them."""
        self.asked = asked
        self.begun: asyncio.Future[RequestBegun] = asyncio.get_running_loop().create_future()
        self.outcome: asyncio.Future[RequestOutcome] = asyncio.get_running_loop().create_future()
        self.began = time.time()
        self.stopped = False
        self.parked = False
        self.forgotten = False
        """Nothing but its commit is to be kept of it."""
        self.written: Awaitable[None] | None = None
        """Its row is on disk; None where nothing is written before the end."""
        self.about: object = None
        """What its dialect needs to tell it to somebody else."""
        self._find, self._keep, self._engine_back = place, keep, engine_back
        self._given = Given()
        self._ran = ran
        self.read = False
        """The engine has begun to read its prompt."""
        self._deltas = list(said)
        self._news = asyncio.Event()
        self._ended = False
        self._stream: AsyncStream[ChatResult] | AsyncStream[Completion] | None = None
        for future in (self.begun, self.outcome):
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.task = asyncio.create_task(self._run())

    @property
    def parent(self) -> str | None:
        """The commit that it goes on from, once it is known."""
        if self.asked.at is not None:
            return str(self.asked.at.commit)
        begun = self.begun
        return begun.result().parent if begun.done() and begun.exception() is None else None

    def stop(self) -> None:
        """End it soon; asking again is fine."""
        if not self.stopped and not self._ended:
            self.stopped = True
            if self._stream is not None:
                self._stopping = asyncio.create_task(self._stream.cancel())
                self._stopping.add_done_callback(lambda done: done.cancelled() or done.exception())

    def park(self) -> None:
        self.parked = not self._ended
        self.stop()

    async def follow(self, start: int = 0) -> AsyncIterator[Delta]:
        """Its deltas from number `start` on, until the last one."""
        while True:
            news = self._news
            while start < len(self._deltas):
                start += 1
                yield self._deltas[start - 1]
            if self._ended:
                return
            await news.wait()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _run(self) -> None:
        try:
            while True:
                try:
                    await self._go_on(await self._find(self.asked))
                    break
                except EngineDied:
                    if self.stopped or self.asked.resume:
                        raise
                    await self._engine_back()
                    self._given.again()
        except BaseException as error:  # noqa: BLE001 - it is raised where the outcome is awaited
            ended = told(error, "a request") if isinstance(error, Exception) else Cancelled("the gateway is stopping")
            for future in (self.begun, self.outcome):
                if not future.done():
                    future.set_exception(ended)
        finally:
            self._ended = True
            self._tell()

    async def _go_on(self, place: Place) -> None:
        try:
            self.asked = msgspec.structs.replace(self.asked, sampling=place.sampling)
            self._stream = self._ask(place)
            work = await self._stream.sync()
            self.read = True
            if not self.begun.done():
                self.begun.set_result(
                    RequestBegun(num_prompt_tokens=place.num_tokens, num_known=place.num_known, parent=place.parent)
                )
            if self.stopped:
                await self._stream.cancel()
            async for delta in each(work):
                if delta.token_ids:
                    place.entry.ready.set()
                    self._ran(len(delta.token_ids))
                if self.parked and delta.finish_reason == "abort":
                    delta = msgspec.structs.replace(delta, text="")
                news = self._given.beyond(delta)
                if news is not None:
                    self._deltas.append(news)
                    self._tell()
            outcome, view, told = await call(self._committed, place, work)
        except BaseException:
            await place.give_up()
            raise
        await place.settle(view, told, outcome)
        await self._keep(outcome)
        self.outcome.set_result(outcome)

    def _ask(self, place: Place) -> AsyncStream[ChatResult] | AsyncStream[Completion]:
        asked, session = self.asked, place.session
        if asked.resume:
            return session.resume_stream()
        if asked.token_ids is not None:
            return session.stream("", place.sampling, token_ids=asked.token_ids[place.num_known :])
        return session.chat_stream(
            place.messages if not place.whole else None,
            place.sampling,
            history=place.messages if place.whole else None,
            tools=asked.tools,
            chat_template_kwargs=asked.variables,
            keep_sampled=asked.keep_sampled,
            continue_final_message=asked.continue_final_message,
        )

    def _committed(
        self, place: Place, work: Stream[ChatResult] | Stream[Completion]
    ) -> tuple[RequestOutcome, SessionView, tuple[int, ...]]:
        """The end, on a thread: the completion, its commit, the session then, and its tokens as a client tells them."""
        result = work.result()
        completion = result.completion if isinstance(result, ChatResult) else result
        created = time.time()
        session = place.session.sync
        done = session.commit(self.asked.note, branch=self.asked.branch)
        outcome = self._outcome(place, result, completion, done, created)
        view = session.view()
        return outcome, view, place.told(view, outcome)

    def _outcome(
        self, place: Place, result: ChatResult | Completion, completion: Completion, done: CommitResult, created: float
    ) -> RequestOutcome:
        usage = completion.usage
        return RequestOutcome(
            text=completion.text,
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            top_logprobs=completion.top_logprobs,
            finish_reason=completion.finish_reason or "abort",
            stop_reason=completion.stop_reason,
            num_prompt=usage.num_prompt_tokens,
            num_cached=min(usage.num_cached_tokens, usage.num_prompt_tokens),
            num_prefilled=usage.num_prefilled_tokens,
            point=str(done.commit),
            parent=place.parent,
            nbytes=done.nbytes_written,
            created=created,
            seed=completion.seed,
            forked_at=result.forked_at if isinstance(result, ChatResult) else None,
            num_dropped=result.num_dropped_tokens if isinstance(result, ChatResult) else 0,
            source=place.source,
            pieces=tuple(len(delta.text) for delta in self._deltas),
            ttft_s=completion.ttft_s,
            total_s=completion.total_s,
        )
