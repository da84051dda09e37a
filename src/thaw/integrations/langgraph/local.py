"""Answers from an engine in this process: of a repository, or of a fork pool with one.

A conversation continues from the deepest of its messages' points that can be used (`messages.carried`), else from the
longest stored prefix of its tokens, else from nothing. The session there is forked, the conversation is laid beside its
tokens (`Session.chat`, `history=`), and the answer is committed before it is given out.

Shared: sessions behind the last answers stay open, so that the next call forks one of them and loads nothing. Each of
them is stored as well; what is closed is loaded again when it is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import msgspec

from thaw.core import objects
from thaw.core.errors import IdentityMismatch, InvalidRequest, NotFound, PolicyMismatch, Refused, ThawError, Unsupported
from thaw.core.ids import StateId
from thaw.core.objects import Commit
from thaw.core.prefix import common_prefix
from thaw.core.sampling import Sampling
from thaw.engines.base import Completion, Engine
from thaw.gateway.speech import CALLS, NONE, Said, Text, TextReader, TextReaders, ToolCall, read_all
from thaw.integrations.langgraph.asking import AnswerPart, CallMade, ChatAnswer, ChatAsk, reread
from thaw.repo import Repository, Session, timeline
from thaw.repo.bridge import call, each, opened, wake
from thaw.repo.chat import ChatResult
from thaw.repo.stream import Stream

MIN_MATCH = 64
"""Tokens from which on a stored prefix that nobody named is worth loading."""
Open: TypeAlias = Callable[[str | None], Session]
"""A session at a point, or an empty one."""


class SessionFound(msgspec.Struct, frozen=True, kw_only=True):
    """Where an answer begins. `source`: live, stored or new. `said`: what the record says of how it was found."""

    session: Session
    source: str
    said: dict[str, object] = {}


class Trunks:
    """Sessions that are open at points, the least recently used first, `limit` at most. Safe from any thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()
        self._loading: dict[str, threading.Lock] = {}

    def fork(self, point: str, load: Callable[[], Session]) -> tuple[Session, bool]:
        """A child of the session at `point`, and whether that was open. Who asks for the same point at once waits while
        the first one loads it."""
        with self._lock:
            gate = self._loading.setdefault(point, threading.Lock())
        try:
            with gate:
                child = self._child(point)
                return (child, True) if child is not None else (self._loaded(point, load), False)
        finally:
            with self._lock:
                self._loading.pop(point, None)

    def _loaded(self, point: str, load: Callable[[], Session]) -> Session:
        trunk = load()
        try:
            child = trunk.fork(1)[0]
        except ThawError:
            trunk.close()
            raise
        self.keep(point, trunk)
        return child

    def _child(self, point: str) -> Session | None:
        with self._lock:
            trunk = self._sessions.get(point)
            if trunk is None:
                return None
            self._sessions.move_to_end(point)
            try:
                return trunk.fork(1)[0]
            except ThawError:  # its engine or its weights are gone: what is stored decides
                _close(self._sessions.pop(point))
                return None

    def keep(self, point: str, session: Session) -> None:
        """The session is at `point` and belongs to this from here on."""
        with self._lock:
            left = [self._sessions.pop(point)] if point in self._sessions else []
            self._sessions[point] = session
            while len(self._sessions) > self._limit:
                left.append(self._sessions.popitem(last=False)[1])
            for one in left:
                _close(one)

    def close(self) -> None:
        with self._lock:
            while self._sessions:
                _close(self._sessions.popitem()[1])


class EngineSource:
    """See the module. `engine`: one that runs; `open`: how a session is opened, in `repo` or in a pool over it."""

    def __init__(
        self, repo: Repository, engine: Callable[[], Engine], open: Open, *, tool_calls: str, match: bool,
        live_sessions: int,
    ) -> None:  # fmt: skip
        if live_sessions < 0:
            raise InvalidRequest(f"live_sessions={live_sessions}: a count, 0 for none")
        self._repo, self._engine, self._open, self._match = repo, engine, open, match
        self._make_reader = _reader_of(tool_calls)
        self._trunks = Trunks(live_sessions)

    @property
    def model(self) -> str:
        return self._engine().info.model

    def require_structured(self) -> None:
        info = self._engine().info
        if "structured" not in info.capabilities:
            raise Unsupported(
                f"the engine {info.name} has no structured output; use one that does (vllm, sglang), or ask for JSON "
                "in the prompt and parse the text"
            )

    def close(self) -> None:
        self._trunks.close()

    # -- answers

    def answers(self, ask: ChatAsk) -> list[ChatAnswer]:
        return self.begin(ask).finish()

    async def aanswers(self, ask: ChatAsk) -> list[ChatAnswer]:
        job = await opened(EngineJob.abandon, self.begin, ask)
        try:
            await _ended(job.stream)
            return await call(job.finish)
        finally:
            await call(job.abandon)

    def stream(self, ask: ChatAsk) -> Iterator[AnswerPart | ChatAnswer]:
        job = self.begin(ask)
        try:
            for delta in job.stream:
                yield from job.parts(delta.text)
            yield from job.rest()
            yield from job.finish()
        finally:
            job.abandon()

    async def astream(self, ask: ChatAsk) -> AsyncIterator[AnswerPart | ChatAnswer]:
        job = await opened(EngineJob.abandon, self.begin, ask)
        try:
            async for delta in each(job.stream):
                for part in job.parts(delta.text):
                    yield part
            for part in job.rest():
                yield part
            for answer in await call(job.finish):
                yield answer
        finally:
            await call(job.abandon)

    def begin(self, ask: ChatAsk) -> EngineJob:
        """Raises what finding, rendering and the engine raise. What was begun is `finish`ed or `abandon`ed."""
        reader = self._make_reader if ask.tools else _reader_of(NONE)
        found = self._find(ask)
        try:
            return EngineJob(self, ask, found, reader)
        except Refused as error:  # the point is fine, and a place inside it, where the conversation parts, is not
            if found.source == "new":
                raise
            return EngineJob(self, ask, self._fresh(reread(error.kind, str(error))), reader)

    def settled(self, session: Session, keep: int, note: str) -> tuple[str, str | None]:
        """Commit an answer as `note`: (its point, its parent). The first `keep` tokens are from before, and the parent
        is the last commit that they hold whole; so what no message names any more keeps nothing."""
        parent = session.parent
        while parent is not None and self._num_tokens(parent) > keep:
            parent = self._repo.store.first_parent(self._repo.store.get_as(parent, Commit))
        if parent != session.parent:
            session.reparent(parent)
        point = str(session.commit(note).commit)
        self._trunks.keep(point, session)
        return point, None if parent is None else str(parent)

    def _num_tokens(self, commit: str) -> int:
        store = self._repo.store
        return timeline.read_state(store, StateId(store.get_as(commit, Commit).state)).num_tokens

    # -- where an answer begins

    def _find(self, ask: ChatAsk) -> SessionFound:
        said: dict[str, object] = {}
        other_models: set[str] = set()
        for one in ask.carried:
            if not one.intact or (one.model and one.model in other_models):
                continue
            try:
                return self._forked(one.commit, said)
            except (Refused, NotFound) as error:
                said = said or reread(error.kind, str(error))
                if isinstance(error, (IdentityMismatch, PolicyMismatch)):
                    other_models.add(one.model)
        return self._matched(ask, said) or self._edited(ask, said) or self._fresh(said)

    def _edited(self, ask: ChatAsk, said: dict[str, object]) -> SessionFound | None:
        """Messages before it are not what they were, but may begin alike."""
        one = next((one for one in ask.carried if not one.intact), None)
        try:
            return None if one is None or said else self._forked(one.commit, said)
        except (Refused, NotFound):
            return None

    def _matched(self, ask: ChatAsk, said: dict[str, object]) -> SessionFound | None:
        """The longest stored prefix of the conversation's tokens."""
        if not self._match:
            return None
        codec = self._engine().codec
        text = codec.chat_text(
            ask.messages, add_generation_prompt=True, tools=ask.tools or None, variables=ask.variables
        )
        point = self._repo.match(codec.encode_chat(text))
        if point is None or point.num_tokens < MIN_MATCH:
            return None
        turns = timeline.read_turns(self._repo.store, timeline.read_state(self._repo.store, point.state))
        if not all(turn.role is not None for turn in turns if turn.start < point.num_tokens):
            return None
        inside = any(turn.kind == "completion" and turn.start <= point.num_tokens < turn.end for turn in turns)
        try:
            return self._forked(str(point.commit) if inside else str(point), said)
        except (Refused, NotFound):
            return None

    def _forked(self, point: str, said: dict[str, object]) -> SessionFound:
        session, live = self._trunks.fork(point, lambda: self._open(point))
        return SessionFound(session=session, source="live" if live else "stored", said=said)

    def _fresh(self, said: dict[str, object]) -> SessionFound:
        return SessionFound(session=self._open(None), source="new", said=said)


class EngineJob:
    """One batch of answers under way, from the session that was found to their commits."""

    def __init__(
        self, source: EngineSource, ask: ChatAsk, found: SessionFound, make_reader: Callable[[], TextReader]
    ) -> None:
        self._source, self._ask, self._found = source, ask, found
        self._make_reader, self._reader = make_reader, make_reader()
        self._sessions: Sequence[Session] = [found.session]
        self._left = [found.session]
        """To be closed at the end: what became no answer."""
        self._over = False
        self.keep = 0
        """Tokens that the sessions have from before."""
        self.num_known = 0
        """Of them, those that had KV."""
        try:
            self.stream: Stream[ChatResult] | Stream[list[Completion]] = self._begun(found.session, ask.samplings())
        except ThawError:
            self.abandon()
            raise

    def _begun(self, session: Session, samplings: list[Sampling]) -> Stream[ChatResult] | Stream[list[Completion]]:
        ask, before = self._ask, session.view()
        self.keep, self.num_known = len(before.tokens), before.num_kv
        if ask.n == 1:
            return session.chat_stream(
                history=ask.messages,
                sampling=samplings[0],
                tools=ask.tools,
                chat_template_kwargs=ask.variables,
                keep_sampled=ask.keep_sampled,
            )
        after = session.append(
            history=ask.messages, tools=ask.tools, chat_template_kwargs=ask.variables, add_generation_prompt=True
        )
        if after.tokens[: self.keep] != before.tokens:
            self.keep = common_prefix(before.tokens, after.tokens)
            self.num_known = min(self.num_known, self.keep)
        self._sessions = children = session.fork(ask.n)
        self._left += children
        return children.stream("", samplings)

    # -- deltas

    def parts(self, text: str) -> Iterator[AnswerPart]:
        for said in self._reader.push(text):
            yield _part(said)

    def rest(self) -> Iterator[AnswerPart]:
        for said in self._reader.end():
            yield _part(said)

    # -- the end

    def finish(self) -> list[ChatAnswer]:
        """Wait for the answers and commit each. They are on disk on return."""
        try:
            done = self.stream.result()
            if isinstance(done, ChatResult):
                return [self._answer(0, done.completion, done)]
            return [self._answer(i, completion, None) for i, completion in enumerate(done)]
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close what became no answer. Doing so twice is fine."""
        if self._over:
            return
        self._over = True
        stream = getattr(self, "stream", None)
        if stream is not None and not stream.done():
            stream.cancel()
        for session in self._left:
            _close(session)

    def _answer(self, number: int, completion: Completion, result: ChatResult | None) -> ChatAnswer:
        session, usage = self._sessions[number], completion.usage
        forked_at = result.forked_at if result is not None else None
        num_cached = min(usage.num_cached_tokens, usage.num_prompt_tokens)
        if result is None and number == 0:
            num_cached = min(num_cached, self.num_known)  # the prompt was read once for all, and counts as this one's
        point, parent = self._source.settled(session, self.keep if forked_at is None else forked_at, self._ask.note)
        self._left.remove(session)
        said = read_all(self._make_reader(), completion.text)
        calls = [one for one in map(_part, said) if one.call is not None]
        record: dict[str, object] = {
            "point": point,
            "parent": parent,
            "model_id": objects.encode(session.engine.identity())[0],
            "source": self._found.source,
            "cached_tokens": num_cached,
            "prefilled_tokens": usage.num_prompt_tokens - num_cached,
            "mean_logprob": sum(completion.logprobs) / max(1, len(completion.logprobs)),
            **({} if forked_at is None else {"forked_at": forked_at}),
            **self._found.said,
        }
        return ChatAnswer(
            text="".join(one.text for one in said if isinstance(one, Text)),
            calls=tuple(one.call for one in calls if one.call is not None),
            finish_reason="tool_calls" if calls else completion.finish_reason or "abort",
            num_prompt=usage.num_prompt_tokens,
            num_cached=num_cached,
            num_completion=usage.num_completion_tokens,
            record=record,
        )


def _reader_of(tool_calls: str) -> Callable[[], TextReader]:
    """What makes readers of that form; thoughts stay text. Raises `InvalidRequest`."""
    if tool_calls not in (NONE, *CALLS):
        raise InvalidRequest(f"tool_calls={tool_calls!r}: expected one of {', '.join((NONE, *CALLS))}")
    return partial(TextReaders, tool_calls, NONE, opened=False)


def _part(said: Said) -> AnswerPart:
    if isinstance(said, ToolCall):
        return AnswerPart(call=CallMade(id=f"call_{secrets.token_hex(12)}", name=said.name, arguments=said.arguments))
    return AnswerPart(text=said.text)


def _close(session: Session) -> None:
    """Whatever became of its engine."""
    with contextlib.suppress(ThawError):
        session.close()


async def _ended(stream: Stream[Any]) -> None:
    """Until it is over; nothing waits on a thread meanwhile."""
    loop = asyncio.get_running_loop()
    over = loop.create_future()

    def tell() -> None:
        if not over.done():
            over.set_result(None)

    stream.add_done_callback(lambda _: wake(loop, tell))
    await over
