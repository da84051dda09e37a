"""Where a request continues from: the session that holds most of its tokens, open in the engine or stored.

    at a point that it names          the session there, loaded once for all who name it
    the longest prefix                of what is open, of what is under way (the request waits for it), or of what the
                                      repository has by `match`, within the tenant's namespace
    nothing                           a new session

Both look at token ids after rendering, so what a client sends beside them (marks of a cache, a session's name) decides
nothing. Where the last common token lies inside an answer, the whole answer's session is taken: thaw's chat compares
its text, and keeps the tokens that were sampled.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import Literal, TypeVar

import msgspec

from thaw.core.errors import EngineDied, NotFound, Refused, TooLong
from thaw.core.ids import CommitId, StateId
from thaw.core.objects import Commit, Turn
from thaw.core.prefix import common_prefix
from thaw.core.sampling import Sampling, fresh_seed
from thaw.engines.base import Completion, Engine, Message, SessionView
from thaw.gateway.asked import Asked, RequestOutcome
from thaw.gateway.engines import EngineLife, ServingEngine, ServingEngines
from thaw.gateway.live import WORTH_WAITING, LiveEntry, LiveSessions
from thaw.repo import resolve, timeline
from thaw.repo.aio import AsyncRepository, AsyncSession
from thaw.repo.bridge import call, opened
from thaw.repo.resolve import ResolvedPoint
from thaw.repo.session import Session

T = TypeVar("T")
Source = Literal["live", "stored", "new"]
COMMON = 8
"""Characters of a token; a text with no more of them may fit, whatever the longest token is."""
WORTH_LOADING = 8
"""Tokens more than an open session has, for which a place inside what is stored is loaded. Fewer are read again beside
the rest of the prompt: prompts that begin alike by chance would each pay for a load otherwise."""


class StoredPrefix(msgspec.Struct, frozen=True):
    """What the repository has of a prompt: its first `num_tokens`. `point`: where to continue from, which is the end of
    an answer whose tokens the prompt tells otherwise."""

    num_tokens: int
    point: ResolvedPoint

    def worth_loading(self, num_open: int) -> bool:
        """Rather than going on from the first `num_open` tokens, which are open. The end of a commit is, for any."""
        return self.num_tokens >= num_open + (1 if self.point.at_end else WORTH_LOADING)


class ParentFound(msgspec.Struct, kw_only=True):
    """A session of the request's own, at its place in history, and how many of the prompt's tokens it has."""

    session: AsyncSession
    source: Source
    num_known: int = 0
    parent: str | None = None


class Place:
    """A request's session, its entry among the open ones, and what it says there."""

    def __init__(
        self,
        engines: ServingEngines,
        live: LiveSessions,
        entry: LiveEntry,
        found: ParentFound,
        *,
        messages: tuple[Message, ...],
        whole: bool,
        num_tokens: int,
        sampling: Sampling,
    ) -> None:
        self._engines, self._live, self.entry = engines, live, entry
        self.session, self.source = found.session, found.source
        self.num_known, self.parent = found.num_known, found.parent
        self.messages, self.whole = messages, whole
        self.num_tokens, self.sampling = num_tokens, sampling
        entry.session, entry.parent = found.session, found.parent

    def told(self, view: SessionView, completion: Completion) -> tuple[int, ...]:
        """The session's tokens as a client that tells the conversation again makes them."""
        if not self.entry.chat or not self.entry.tokens or not completion.token_ids:
            return view.tokens
        again = self.session.sync.engine.codec.encode_chat(completion.text, inside=True)
        return (*self.entry.tokens, *again)

    def settle(self, view: SessionView, told: tuple[int, ...], outcome: RequestOutcome) -> None:
        self._live.settle(self.entry, view, told, outcome.point)

    async def give_up(self, error: BaseException) -> None:
        """It came to nothing; where its engine seems dead, that one is asked."""
        try:
            if isinstance(error, EngineDied):
                await self._engines.failed(self.entry.home, self.entry.life, error)
        finally:
            await self._live.fail(self.entry)


class TextLimit:
    """How long a text may be at most, in characters, to fit an engine's model: what cannot is not tokenised."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._longest: int | None = None

    def require(self, text: str) -> None:
        """Raises `TooLong`."""
        room = self._engine.info.max_model_len
        if len(text) > room * COMMON and len(text) > room * self._longest_token():
            raise TooLong(
                f"the prompt has {len(text):,} characters, which is more than the {room:,} tokens that the model takes"
            )

    def _longest_token(self) -> int:
        """Characters of the vocabulary's longest token, twice: tokenizers may shorten a text before they part it."""
        with self._lock:
            if self._longest is None:
                codec, size = self._engine.codec, self._engine.info.vocab_size
                self._longest = 2 * max(len(codec.decode([i], skip_special_tokens=False)) for i in range(size))
            return self._longest


class ParentFinder:
    """Of one namespace, over all engines."""

    def __init__(self, engines: ServingEngines, namespace: str, live: LiveSessions, texts: TextLimit) -> None:
        self._engines, self._namespace, self._live = engines, namespace, live
        self._texts = texts

    @property
    def _repo(self) -> AsyncRepository:
        """For what is asked of no engine."""
        return self._engines.any.within(self._namespace)

    async def find(self, asked: Asked) -> Place:
        """Raises what rendering, loading and the engine raise."""
        if asked.resume:
            return await self._resumed(asked)
        if asked.token_ids is not None:
            stored = await self._asked(self._match, asked.token_ids, chat=False)
            return await self._place(asked, asked.token_ids, (), None, stored)
        if asked.at is None:
            messages = _conversation(asked, ())
            tokens, stored = await self._asked(self._render_and_match, asked, messages)
            return await self._place(asked, tokens, messages, None, stored)
        return await self._at(asked, asked.at)

    async def _at(self, asked: Asked, point: ResolvedPoint) -> Place:
        """At a point: in the engine where its session is open, else in the one with the fewest requests."""
        num = point.num_tokens

        def num_open(one: ServingEngine) -> int:
            return num if self._live.has(one, self._namespace, point) else 0

        home = self._engines.nearest(num_open, num, worth=1)
        with home.life.busy():
            async with self._watched(home):
                trunk = await self._live.at(home, self._namespace, point, self._loader(home.life, asked, point))
                try:
                    return await self._from(asked, trunk)
                finally:
                    trunk.users -= 1

    async def _asked(self, do: Callable[..., T], *args: object, **options: object) -> T:
        """On a thread, what the repository says of tokens. It asks an engine which model that runs."""
        async with self._watched(self._engines.first_up):
            return await call(do, *args, **options)

    @contextlib.asynccontextmanager
    async def _watched(self, home: ServingEngine) -> AsyncIterator[None]:
        """An engine that turns out to be dead is taken out."""
        life = home.life
        with life.held():
            try:
                yield
            except EngineDied as error:
                await self._engines.failed(home, life, error)
                raise

    async def count(self, asked: Asked) -> int:
        """Tokens of its prompt."""
        return len(await call(self._render, asked, _conversation(asked, ())))

    async def _from(self, asked: Asked, trunk: LiveEntry) -> Place:
        """At a point: the conversation is what the session there holds, and what is new."""
        assert trunk.session is not None
        view = await trunk.session.view()
        held = tuple(await trunk.session.messages()) if _is_chat(view.turns) else None
        if held is None and view.turns:
            return await self._append(asked, trunk)
        messages = _conversation(asked, held or ())
        return await self._place(asked, await call(self._render, asked, messages), messages, trunk)

    async def _resumed(self, asked: Asked) -> Place:
        """The session of an answer that was interrupted, which nobody else continues with."""
        assert asked.at is not None
        home = self._engines.least_busy()
        entry = self._live.begin(home, self._namespace, (), chat=True)
        try:
            async with self._watched(home):
                session = AsyncSession(await opened(Session.close, self._loader(entry.life, asked, asked.at)))
        except BaseException:
            await self._live.fail(entry)
            raise
        num = asked.at.num_tokens
        found = ParentFound(session=session, source="stored", num_known=num, parent=str(asked.at.commit))
        return Place(
            self._engines, self._live, entry, found, messages=(), whole=True, num_tokens=num, sampling=asked.sampling
        )

    async def _append(self, asked: Asked, trunk: LiveEntry) -> Place:
        """Behind plain text the messages are appended; what they become there only the session knows."""
        entry = self._live.begin(trunk.home, self._namespace, (), chat=False)
        try:
            async with self._watched(trunk.home):
                with trunk.held():
                    session = AsyncSession(await opened(Session.close, trunk.child, len(trunk.tokens)))
        except BaseException:
            await self._live.fail(entry)
            raise
        num = len(trunk.tokens)
        found = ParentFound(session=session, source="live", num_known=num, parent=trunk.commit)
        sampling = self._sampling(asked, num)
        messages = _conversation(asked, ())
        return Place(
            self._engines, self._live, entry, found, messages=messages, whole=False, num_tokens=num, sampling=sampling
        )

    async def _place(
        self,
        asked: Asked,
        tokens: tuple[int, ...],
        messages: tuple[Message, ...],
        trunk: LiveEntry | None,
        stored: StoredPrefix | None = None,
    ) -> Place:
        """`trunk`: the session at the point that the request names; `stored`: what the repository has, where it names
        none."""
        sampling, chat = self._sampling(asked, len(tokens)), asked.token_ids is None
        home = None if trunk is None else trunk.home
        if trunk is not None and not _leads_on(trunk, tokens):
            trunk, stored = None, await self._asked(self._match, tokens, chat=chat)
        home = home or self._nearest_engine(tokens, stored.num_tokens if stored else 0, chat=chat)
        entry = self._live.begin(home, self._namespace, tokens, chat=chat)
        try:
            async with self._watched(home):
                found = await self._nearest(asked, entry, trunk, stored)
        except BaseException:
            await self._live.fail(entry)
            raise
        return Place(
            self._engines,
            self._live,
            entry,
            found,
            messages=messages,
            whole=True,
            num_tokens=len(tokens),
            sampling=sampling,
        )

    def _nearest_engine(self, tokens: tuple[int, ...], num_stored: int, *, chat: bool) -> ServingEngine:
        def num_open(one: ServingEngine) -> int:
            return self._live.most(one, self._namespace, tokens, chat=chat)

        return self._engines.nearest(num_open, num_stored, WORTH_WAITING)

    def _sampling(self, asked: Asked, num_tokens: int) -> Sampling:
        """With a limit that fits, and a seed of its own: siblings of one point do not say the same."""
        longest = min(one.engine.info.max_model_len for one in self._engines.all)
        room = longest - num_tokens
        if room < 1:
            raise TooLong(f"the prompt has {num_tokens} tokens and the model takes {longest}, including the answer")
        wanted = room if asked.max_tokens is None else min(asked.max_tokens, room)
        seed = fresh_seed() if asked.sampling.seed is None else asked.sampling.seed
        return msgspec.structs.replace(asked.sampling, max_tokens=max(wanted, 1), seed=seed)

    # -- on threads

    def _render(self, asked: Asked, messages: tuple[Message, ...]) -> tuple[int, ...]:
        repo = self._repo.sync
        text = repo.engine.codec.chat_text(
            messages,
            add_generation_prompt=not asked.continue_final_message,
            tools=asked.tools or None,
            variables=asked.variables,
        )
        self._texts.require(text)
        return repo.encode_chat(text)

    def _match(self, tokens: tuple[int, ...], *, chat: bool) -> StoredPrefix | None:
        try:
            found = self._repo.sync.match(tokens)
            if found is None or not found.num_tokens:
                return None
            if not chat:
                return StoredPrefix(found.num_tokens, found)
            store = self._repo.sync.store
            turns = timeline.read_turns(store, timeline.read_state(store, found.state))
            if not turns or turns[0].role is None:  # a text, behind which no conversation goes on
                return None
            return StoredPrefix(found.num_tokens, self._whole_answer(found, turns))
        except NotFound:  # gc has removed it meanwhile
            return None

    def _render_and_match(
        self, asked: Asked, messages: tuple[Message, ...]
    ) -> tuple[tuple[int, ...], StoredPrefix | None]:
        tokens = self._render(asked, messages)
        return tokens, self._match(tokens, chat=True)

    def _put_behind(
        self, session: Session, asked: Asked, parent: str | None, num_known: int, *, whole: bool
    ) -> str | None:
        """Its place in history: behind the point that was named, else behind the last commit that it holds whole, which
        is `parent` where it has all of that (`whole`). Returns that commit."""
        if asked.at is not None:
            parent = str(asked.at.commit)
        elif parent is not None and not whole:
            parent = self._held_whole(parent, num_known)
        if parent != session.parent:
            session.reparent(None if parent is None else CommitId(parent))
        return parent

    def _held_whole(self, commit: str | None, num_known: int) -> str | None:
        """Of a commit and those before it, the last that ends within so many tokens; None where gc has removed them."""
        store = self._repo.sync.store
        with contextlib.suppress(NotFound):
            while commit is not None:
                known = store.get_as(commit, Commit)
                if timeline.read_state(store, StateId(known.state)).num_tokens <= num_known:
                    return commit
                commit = store.first_parent(known)
        return None

    # -- the longest prefix

    async def _nearest(
        self, asked: Asked, entry: LiveEntry, trunk: LiveEntry | None, stored: StoredPrefix | None
    ) -> ParentFound:
        """In the entry's engine. `trunk`, `stored`: see `_place`."""
        refused: set[int] = set()
        while True:
            (num, ready), (num_coming, coming) = self._live.nearest(entry, refused)
            loaded = stored if stored is not None and stored.worth_loading(num) else None
            known = max(num, loaded.num_tokens if loaded else 0, len(trunk.tokens) if trunk else 0)
            if coming is not None and num_coming >= known + WORTH_WAITING:
                await coming.ready.wait()
                continue
            if trunk is not None and len(trunk.tokens) + WORTH_WAITING > num:
                found = await self._fork(asked, entry, trunk, len(trunk.tokens))
                return found or await self._fresh(asked, entry)
            if ready is not None and num and loaded is None:
                found = await self._fork(asked, entry, ready, num)
                if found is not None:
                    return found
                refused.add(ready.number)
                continue
            if loaded is not None:
                found = await self._stored(asked, entry, loaded.point)
                if found is not None:
                    return found
                stored = None
                continue
            return await self._fresh(asked, entry)

    async def _fresh(self, asked: Asked, entry: LiveEntry) -> ParentFound:
        return await self._begun(asked, entry.life.within(self._namespace).sync.session, "new")

    async def _begun(
        self,
        asked: Asked,
        make: Callable[[], Session],
        source: Source,
        *,
        parent: str | None = None,
        num_known: int = 0,
        whole: bool = False,
    ) -> ParentFound:
        """A session that is made now and put to its place in history, both on one thread."""

        def made() -> tuple[Session, str | None]:
            session = make()
            try:
                return session, self._put_behind(session, asked, parent, num_known, whole=whole)
            except BaseException:
                session.close()
                raise

        session, behind = await opened(lambda found: found[0].close(), made)
        return ParentFound(session=AsyncSession(session), source=source, num_known=num_known, parent=behind)

    async def _fork(
        self, asked: Asked, entry: LiveEntry, ready: LiveEntry, num: int, stored: ResolvedPoint | None = None
    ) -> ParentFound | None:
        """A child of an open session; None where it can have none there. `stored`: where it was loaded just now."""
        self._live.touch(ready)
        with ready.held():
            own = common_prefix(ready.tokens, entry.tokens)
            retold = entry.chat and (num > own or ready.in_answer(own))
            at = len(ready.tokens) if retold else min(num, len(ready.tokens))
            whole = ready.commit is not None and num >= min(len(ready.tokens), len(ready.told))
            try:
                return await self._begun(
                    asked,
                    lambda: ready.child(at),
                    "live" if stored is None else "stored",
                    parent=ready.parent,
                    num_known=min(num, len(entry.tokens)),
                    whole=whole if stored is None else stored.at_end,
                )
            except Refused:
                return None

    async def _stored(self, asked: Asked, entry: LiveEntry, point: ResolvedPoint) -> ParentFound | None:
        """None where it cannot be loaded, or gc has removed it since it was found."""
        try:
            trunk = await self._live.at(entry.home, self._namespace, point, self._loader(entry.life, asked, point))
        except NotFound:
            return None
        except Refused:
            if asked.policy == "exact":
                return None
            raise
        try:
            return await self._fork(asked, entry, trunk, len(trunk.tokens), stored=point)
        finally:
            trunk.users -= 1

    def _whole_answer(self, point: ResolvedPoint, turns: tuple[Turn, ...]) -> ResolvedPoint:
        """The end of the commit, where the point lies inside an answer."""
        inside = any(turn.kind == "completion" and turn.start <= point.num_tokens < turn.end for turn in turns)
        return resolve.at(self._repo.sync.store, point.commit) if inside and not point.at_end else point

    def _loader(self, life: EngineLife, asked: Asked, point: ResolvedPoint) -> Callable[[], Session]:
        """What loads the session at a stored point, on a thread."""
        repo, bare = life.within(self._namespace).sync, msgspec.structs.replace(point, branch=None)
        return lambda: repo.session(bare, policy=asked.policy)


def _leads_on(trunk: LiveEntry, tokens: tuple[int, ...]) -> bool:
    """Whether the conversation continues from the point: all of it, or up to an answer that is rendered differently."""
    common = common_prefix(trunk.tokens, tokens)
    return common == len(trunk.tokens) or trunk.in_answer(common)


def _conversation(asked: Asked, held: tuple[Message, ...]) -> tuple[Message, ...]:
    """All messages: instructions, what was said, what is new."""
    if asked.whole and asked.at is None:
        held = ()
    replaced = asked.held_instructions
    if replaced is None:
        replaced = bool(asked.instructions) and bool(held) and held[0]["role"] == "system"
    if replaced:
        held = held[1:]
    first: tuple[Message, ...] = ()
    if asked.instructions:
        first = ({"role": "system", "content": asked.instructions},)
    return (*first, *held, *asked.messages)


def _is_chat(turns: tuple[Turn, ...]) -> bool:
    return all(turn.role is not None for turn in turns)
