"""A job: one completion, from the session that it continues from to the commit that it became.

It runs in a task of its own and outlives the connection that asked for it: deltas are kept until it is forgotten, and
its followers see all of them, from any place on. `stop` ends it at the next step boundary; what was said until
then is committed like any other. `park` does too, so that it can go on bit for bit later: what a stream holds back, the
beginning of a stop string or of a character, is not given out. Where the engine ends, the job runs again with the seed
that it had, in another one or, once it is there, in the one that takes its place; what it says must begin with what was
given out, and followers see the rest. One that comes no further in several engines one after the other, or in one that
answers all the same, ends with an error. Its outcome exists once the commit is on disk.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextvars import ContextVar

import msgspec

from thaw.core.errors import Cancelled, EngineDied
from thaw.engines.base import Completion, Delta, SessionView
from thaw.gateway.asked import Asked, RequestBegun, RequestOutcome, SpokenPiece
from thaw.gateway.engines import NoEngineUp
from thaw.gateway.place import Place
from thaw.gateway.problems import told
from thaw.gateway.reading import SpeechReader
from thaw.gateway.speech import Said, ToolCall, merged_said
from thaw.repo.aio import AsyncSession, AsyncStream
from thaw.repo.bridge import call, each
from thaw.repo.chat import ChatResult
from thaw.repo.commit import CommitResult
from thaw.repo.stream import Stream

REQUEST: ContextVar[str] = ContextVar("thaw.gateway.request", default="")
"""The number of the request that is answered, as its reply's header `x-request-id` says it; "" where none is."""

MAX_FAILURES = 3
"""How often an engine may fail a request once more after the first time, each time no further than before."""
AGAIN_S = 0.5
"""Before the first of those runs; twice as long before each that follows."""


class Given:
    """What followers have received, so that a restarted run gives them only the rest."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._text = ""
        self._ran: tuple[list[int], str] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

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
            raise Cancelled("the engine restarted and generates something different now; try again")
        new_ids, new_text = ids[len(self._ids) :], text[len(self._text) :]
        self._ran = (ids, text)
        if len(ids) >= len(self._ids) and len(text) >= len(self._text):
            self._ids, self._text, self._ran = ids, text, None
        if not new_ids and not new_text and delta.finish_reason is None:
            return None
        logprobs = delta.logprobs[len(delta.token_ids) - len(new_ids) :] if new_ids else ()
        return msgspec.structs.replace(delta, token_ids=tuple(new_ids), logprobs=logprobs, text=new_text)


def _completion(result: ChatResult | Completion) -> Completion:
    return result.completion if isinstance(result, ChatResult) else result


def _prompt(view: SessionView) -> tuple[int, ...]:
    """What a session's last completion follows."""
    last = view.turns[-1] if view.turns else None
    return view.tokens[: last.start] if last is not None and last.kind == "completion" else view.tokens


class Failures:
    """How often engines have failed a request one after the other, and how far it had come."""

    def __init__(self) -> None:
        self._num, self._num_tokens = 0, 0

    def wait_s(self, error: EngineDied, num_tokens: int) -> float:
        """Seconds until it runs again, after a run that gave out `num_tokens` tokens and failed with `error`. Raises
        `EngineDied` where it is not to run again."""
        self._num = 1 if num_tokens > self._num_tokens else self._num + 1
        self._num_tokens = num_tokens
        if self._num > MAX_FAILURES:
            raise EngineDied(
                f"the engine failed this request {self._num} times, each time after no more than {num_tokens} tokens, "
                f"and could be reached again in between; the last time: {error}"
            )
        return 0.0 if self._num == 1 else float(AGAIN_S * 2 ** (self._num - 2))


Keep = Callable[[RequestOutcome], Awaitable[None]]


class ReplyJob:
    """Made and used in one event loop. `begun` and `outcome` raise what became of it instead."""

    def __init__(
        self,
        asked: Asked,
        place: Callable[[Asked], Awaitable[Place]],
        keep: Keep,
        engine_back: Callable[[], Awaitable[None]],
        reader: Callable[[Asked, Sequence[int]], SpeechReader],
        said: Sequence[SpokenPiece] = (),
        ran: Callable[[int], object] = lambda _: None,
    ) -> None:
        """`engine_back` waits until an engine is up after one has died, or raises. `reader` reads what is said after a
        prompt. `said`: pieces from before it was parked. `ran` is told of tokens as the engine samples them."""
        self.asked = asked
        self.name = secrets.token_hex(8)
        self.request = REQUEST.get()
        """The number of the request that asked for it."""
        self.session: AsyncSession | None = None
        """Where it runs; None until its place is found."""
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
        self._make_reader = reader
        self._reader: SpeechReader | None = None
        self._called = False
        self._given = Given()
        self._ran = ran
        self.read = False
        """The engine has begun to read its prompt."""
        self._pieces = list(said)
        self._news = asyncio.Event()
        self._ended = False
        self._stream: AsyncStream[ChatResult] | AsyncStream[Completion] | None = None
        for future in (self.begun, self.outcome):
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.task = asyncio.create_task(self._run())

    @property
    def parent(self) -> str | None:
        """The commit that it continues from, once it is known."""
        if self.asked.at is not None:
            return str(self.asked.at.commit)
        begun = self.begun
        return begun.result().parent if begun.done() and begun.exception() is None else None

    def last_text(self, num: int) -> str:
        """The end of its text until now, of about so many characters."""
        found: list[str] = []
        for piece in reversed(self._pieces):
            if num <= 0:
                break
            found.append(piece.text)
            num -= len(piece.text)
        return "".join(reversed(found))

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

    async def follow(self, start: int = 0) -> AsyncIterator[Sequence[SpokenPiece]]:
        """Its pieces from number `start` on, until the last one: each time all that are there."""
        while True:
            news, pieces = self._news, self._pieces[start:]
            if pieces:
                start += len(pieces)
                yield pieces
                continue
            if self._ended:
                return
            await news.wait()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _run(self) -> None:
        failures = Failures()
        try:
            while True:
                try:
                    await self._go_on(await self._find(self.asked))
                    break
                except EngineDied as error:
                    if self.stopped or self.asked.resume:
                        raise
                    if not isinstance(error, NoEngineUp):
                        await asyncio.sleep(failures.wait_s(error, self._given.num_tokens))
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
            if self._reader is not None:
                await self._reader.close()

    async def _go_on(self, place: Place) -> None:
        try:
            self.asked = msgspec.structs.replace(self.asked, sampling=place.sampling)
            self.session = place.session
            self._stream = self._ask(place)
            work = await self._stream.sync()
            self.read = True
            if not self.begun.done():
                self.begun.set_result(
                    RequestBegun(num_prompt_tokens=place.num_tokens, num_known=place.num_known, parent=place.parent)
                )
            if self.stopped:
                await self._stream.cancel()
            reader = await self._reading(place)
            async for delta in each(work):
                if delta.token_ids:
                    place.entry.ready.set()
                    self._ran(len(delta.token_ids))
                if self.parked and delta.finish_reason == "abort":
                    delta = msgspec.structs.replace(delta, text="")
                news = self._given.beyond(delta)
                if news is not None:
                    await self._spoken(reader, news)
            result, done, created, view, retold = await call(self._committed, place, work)
            outcome = self._outcome(place, result, done, created, await self._said(reader, _completion(result)))
        except BaseException as error:
            await place.give_up(error)
            raise
        place.settle(view, retold, outcome)
        await self._keep(outcome)
        self.outcome.set_result(outcome)

    async def _reading(self, place: Place) -> SpeechReader:
        """The reader, which knows what was said before the job was parked. It goes on where a run begins again."""
        if self._reader is None:
            self._reader = self._make_reader(self.asked, place.entry.tokens or _prompt(await place.session.view()))
            for piece in self._pieces:
                await self._reader.push(piece.text, piece.token_ids)
        return self._reader

    async def _spoken(self, reader: SpeechReader, news: Delta) -> None:
        said = await reader.push(news.text, news.token_ids) if self.asked.followed else []
        if self.asked.single_call:
            said = self._up_to_first_call(said)
            if self._called and self._stream is not None:
                await self._stream.cancel()
        piece = SpokenPiece(
            text=news.text, token_ids=news.token_ids, logprobs=news.logprobs, said=tuple(said)
        )  # fmt: skip
        self._pieces.append(piece)
        self._tell()

    def _up_to_first_call(self, all_said: list[Said]) -> list[Said]:
        """Of what comes now, that which is not behind the first call of all."""
        out: list[Said] = []
        for said in all_said:
            if not self._called:
                out.append(said)
            self._called = self._called or isinstance(said, ToolCall)
        return out

    async def _said(self, reader: SpeechReader, completion: Completion) -> tuple[Said, ...]:
        """All that was said. A last piece gives out what was not told until now, unless the job is to go on."""
        parked = self.parked and completion.finish_reason == "abort"
        if self.asked.followed:
            left = [] if parked else await reader.end()
        else:
            left = await reader.whole(completion.text, completion.token_ids)
        if self.asked.single_call:
            left = self._up_to_first_call(left)
        told = [said for piece in self._pieces for said in piece.said]
        if left and not parked:
            self._pieces.append(SpokenPiece(text="", said=tuple(left)))
            self._tell()
        return tuple(merged_said([*told, *left]))

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
    ) -> tuple[ChatResult | Completion, CommitResult, float, SessionView, tuple[int, ...]]:
        """The end, on a thread: what was generated, its commit and when, the session then, and its tokens as a client
        tells them. The branch stays where it is if the job is to begin again (`anew`)."""
        result = work.result()
        created = time.time()
        session = place.session.sync
        anew = self.parked and not self.asked.resume and not _completion(result).token_ids
        done = session.commit(self.asked.note, branch=None if anew else self.asked.branch)
        view = session.view()
        return result, done, created, view, place.told(view, _completion(result))

    def _outcome(
        self,
        place: Place,
        result: ChatResult | Completion,
        done: CommitResult,
        created: float,
        said: tuple[Said, ...],
    ) -> RequestOutcome:
        completion = _completion(result)
        usage = completion.usage
        return RequestOutcome(
            text=completion.text,
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            top_logprobs=completion.top_logprobs,
            finish_reason="stop" if self._called and not self.stopped else completion.finish_reason or "abort",
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
            engine=place.entry.home.number,
            said=said,
            pieces=tuple(self._pieces),
            ttft_s=completion.ttft_s,
            total_s=completion.total_s,
        )
