"""Sessions that stay open in the engine: behind the last responses, and those under way.

The next request forks one of them and loads nothing; a fork copies no KV. Requests that begin alike and come at once
wait for the first of them, so that their prefix is loaded and read once. Nothing here is the only copy of anything:
what is closed is stored, and is loaded again when it is asked for.

Used by one event loop; only what the engine does is awaited.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterator
from itertools import count
from typing import TypeAlias

import msgspec

from thaw.core.errors import EngineDied, Refused, ThawError
from thaw.core.ids import CommitId
from thaw.core.prefix import common_prefix
from thaw.engines.base import SessionView
from thaw.gateway.engines import ServingEngine
from thaw.gateway.settings import Limits
from thaw.repo.aio import AsyncSession
from thaw.repo.bridge import opened
from thaw.repo.resolve import ResolvedPoint
from thaw.repo.session import Session

WORTH_WAITING = 64
"""Tokens more than are known elsewhere, for which a request waits until another one has read them."""


class LiveEntry:
    """A session, and the tokens that it has or will have. `ready`: they have KV, or nobody need wait any more."""

    def __init__(
        self, number: int, home: ServingEngine, namespace: str, tokens: tuple[int, ...], *, chat: bool
    ) -> None:
        self.number = number
        self.home = home
        self.life = home.life
        """The engine that it is in. Nothing is where that is the home's no more."""
        self.namespace = namespace
        self.tokens = tokens
        self.told = tokens
        """What a client that tells the conversation again makes of it: answers in the tokenizer's own tokens."""
        self.chat = chat
        self.answers: tuple[tuple[int, int], ...] = ()
        """[start, end) of the completions that are over."""
        self.session: AsyncSession | None = None
        self.commit: str | None = None
        self.parent: str | None = None
        self.ready = asyncio.Event()
        self.users = 1
        self.gone = False

    @property
    def is_there(self) -> bool:
        """Whether it may be continued from, now or once it is ready."""
        return not self.gone and self.life is self.home.life

    @property
    def usable(self) -> bool:
        return self.ready.is_set() and self.is_there

    def in_answer(self, token: int) -> bool:
        return any(start <= token < end for start, end in self.answers)

    def common(self, tokens: tuple[int, ...]) -> int:
        """How many of these it begins with, in its own tokens or as rendered again."""
        own = common_prefix(self.tokens, tokens)
        return max(own, common_prefix(self.told, tokens)) if self.in_answer(own) else own

    def begins_with(self, tokens: tuple[int, ...]) -> bool:
        """Whether `common` may be as many as these; of most entries their first tokens say that it is not."""
        num = len(tokens)
        return self.tokens[:num] == tokens or self.told[:num] == tokens

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Not closed meanwhile."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1

    def child(self, at: int) -> Session:
        """One, at token `at`; on a thread, while it is `held`. Raises what the engine raises."""
        assert self.session is not None
        return self.session.sync.fork(1, None if self.commit and at == len(self.tokens) else at)[0]


class OpenSessions(msgspec.Struct):
    """Of one commit. `num_tokens`: how many of its tokens are open, at most; `num_running`: requests that run from it;
    `memories`: where the KV of these is."""

    num_tokens: int = 0
    num_running: int = 0
    memories: set[str] = msgspec.field(default_factory=set)


def _is_alike(entry: LiveEntry, namespace: str, chat: bool) -> bool:
    """Whether a conversation (`chat`) or a text of that namespace could continue from it."""
    return entry.namespace == namespace and (entry.chat or not chat)


Near: TypeAlias = tuple[int, LiveEntry | None]
"""Tokens in common, with whom."""


def _worth(near: Near) -> tuple[int, int]:
    num, entry = near
    return num, 0 if entry is None else -len(entry.tokens)


def _answers(view: SessionView) -> tuple[tuple[int, int], ...]:
    return tuple((turn.start, turn.end) for turn in view.turns if turn.kind == "completion")


class LiveSessions:
    """All entries of all engines and namespaces, least recently used first."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._entries: dict[int, LiveEntry] = {}
        self._numbers = count()
        self._loading: dict[tuple[ServingEngine, str, str, int], asyncio.Future[None]] = {}
        """Done when it is loaded, or is not."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_tokens(self) -> int:
        return sum(len(entry.tokens) for entry in self._entries.values())

    def of(self, home: ServingEngine) -> list[LiveEntry]:
        return [entry for entry in self._entries.values() if entry.home is home]

    # -- entries

    def begin(self, home: ServingEngine, namespace: str, tokens: tuple[int, ...], *, chat: bool) -> LiveEntry:
        """A request that will have read these tokens there; whoever comes after it may wait for it."""
        home.life.running += 1
        home.num_placed += 1
        return self._enter(home, namespace, tokens, chat=chat)

    def _enter(self, home: ServingEngine, namespace: str, tokens: tuple[int, ...], *, chat: bool) -> LiveEntry:
        entry = LiveEntry(next(self._numbers), home, namespace, tokens, chat=chat)
        self._entries[entry.number] = entry
        return entry

    def touch(self, entry: LiveEntry) -> None:
        self._entries[entry.number] = self._entries.pop(entry.number)

    def settle(self, entry: LiveEntry, view: SessionView, told: tuple[int, ...], commit: str) -> None:
        """The request is over and committed. `trim` follows once its client has been told."""
        entry.life.running -= 1
        entry.life.num_done += 1
        entry.tokens, entry.told, entry.commit, entry.parent = view.tokens, told, commit, commit
        entry.answers = _answers(view)
        entry.ready.set()
        entry.users -= 1

    async def fail(self, entry: LiveEntry) -> None:
        """The request came to nothing: those who wait for it look elsewhere."""
        entry.gone = True
        entry.users -= 1
        entry.ready.set()
        try:
            await self._close(entry)
        finally:
            entry.life.running -= 1

    async def trim(self) -> None:
        """Close the least recently used, down to the limits; never one that is in use."""
        idle = [entry for entry in self._entries.values() if not entry.users and entry.ready.is_set()]
        for entry in idle:
            if len(self) <= self._limits.live_sessions and self.num_tokens <= self._limits.live_tokens:
                return
            if not entry.users:
                entry.gone = True
                await self._close(entry)

    def drop(self, home: ServingEngine) -> None:
        """Forget those of an engine that is gone. Those that are under way fail by themselves."""
        for entry in [entry for entry in self.of(home) if entry.ready.is_set()]:
            entry.gone = True
            del self._entries[entry.number]

    def commits(self) -> set[tuple[str, str]]:
        """Those that open sessions stand behind: namespace, commit."""
        return {(entry.namespace, entry.commit) for entry in self._entries.values() if entry.commit is not None}

    async def forget(self, commits: Collection[tuple[str, str]]) -> None:
        """Close the sessions behind commits that are no more: nobody could commit what follows."""
        for entry in [one for one in self._entries.values() if (one.namespace, one.commit) in commits]:
            entry.gone = True
            if not entry.users:
                await self._close(entry)

    async def clear(self) -> None:
        for entry in list(self._entries.values()):
            entry.gone = True
            await self._close(entry)

    def standing(self, namespace: str) -> dict[CommitId, OpenSessions]:
        """The commits behind which sessions are open, or from which requests run."""
        found: dict[CommitId, OpenSessions] = {}
        for entry in self._entries.values():
            commit = entry.commit or entry.parent
            if entry.namespace == namespace and commit is not None:
                one = found.setdefault(CommitId(commit), OpenSessions())
                is_open = entry.commit is not None
                one.num_tokens = max(one.num_tokens, len(entry.tokens) if is_open else 0)
                one.num_running += not is_open
                one.memories.add(entry.home.memory(running=not is_open))
        return found

    async def _close(self, entry: LiveEntry) -> None:
        self._entries.pop(entry.number, None)
        session, entry.session = entry.session, None
        if session is not None:
            with contextlib.suppress(ThawError):
                await session.close()

    # -- finding

    def nearest(self, mine: LiveEntry, refused: set[int]) -> tuple[Near, Near]:
        """The best that is ready, and the best that will be; of those before `mine` alone, so that no two wait for each
        other. Of equals the shortest. `refused`: entries that cannot be forked there."""
        ready: Near = (0, None)
        coming: Near = (0, None)
        for entry in self._entries.values():
            here = entry.home is mine.home and _is_alike(entry, mine.namespace, mine.chat)
            if not here or entry is mine or not entry.is_there or entry.number in refused:
                continue
            num, best = ready if entry.usable else coming
            longer = best is not None and len(entry.tokens) >= len(best.tokens)
            if not entry.begins_with(mine.tokens[: num + longer]):
                continue
            found: Near = (entry.common(mine.tokens), entry)
            if entry.usable:
                ready = max(ready, found, key=_worth)
            elif entry.number < mine.number:
                coming = max(coming, found, key=_worth)
        return ready, coming

    def most(self, home: ServingEngine, namespace: str, tokens: tuple[int, ...], *, chat: bool) -> int:
        """Of these tokens the most that one entry of that engine has or will have."""
        alike = (one for one in self.of(home) if _is_alike(one, namespace, chat) and one.is_there)
        return max((entry.common(tokens) for entry in alike), default=0)

    def has(self, home: ServingEngine, namespace: str, point: ResolvedPoint) -> bool:
        """Whether the session at a stored point is open in that engine, is being loaded there, or is part of one."""
        key = (namespace, str(point.commit), point.num_tokens)
        loading = (home, *key) in self._loading
        return loading or self._standing(home, *key) is not None or self._containing(home, *key) is not None

    async def at(
        self, home: ServingEngine, namespace: str, point: ResolvedPoint, load: Callable[[], Session]
    ) -> LiveEntry:
        """The session at a stored point: one that is open, or loaded now on a thread, once for all who ask for it. Held
        for the caller, who says `entry.users -= 1`."""
        key = (home, namespace, str(point.commit), point.num_tokens)
        while True:
            found = self._standing(*key)
            if found is not None:
                found.users += 1
                self.touch(found)
                return found
            if key not in self._loading:
                return await self._load(key, load)
            await asyncio.shield(self._loading[key])

    def _standing(self, home: ServingEngine, namespace: str, commit: str, num_tokens: int) -> LiveEntry | None:
        for entry in self.of(home):
            where = (entry.namespace, entry.commit, len(entry.tokens))
            if where == (namespace, commit, num_tokens) and entry.usable:
                return entry
        return None

    def _containing(self, home: ServingEngine, namespace: str, commit: str, num_tokens: int) -> LiveEntry | None:
        for entry in self.of(home):
            same = (entry.namespace, entry.commit) == (namespace, commit)
            if same and entry.usable and len(entry.tokens) > num_tokens:
                return entry
        return None

    async def _load(self, key: tuple[ServingEngine, str, str, int], load: Callable[[], Session]) -> LiveEntry:
        loaded = self._loading[key] = asyncio.get_running_loop().create_future()
        life = key[0].life
        try:
            session, view = await self._cut(key) or await _seen(load)
            if life is not key[0].life:
                raise EngineDied("the engine was replaced while a session was loaded into it")
            entry = self._enter(key[0], key[1], view.tokens, chat=bool(view.turns) and view.turns[0].role is not None)
            entry.session, entry.commit, entry.parent = session, key[2], key[2]
            entry.answers = _answers(view)
            entry.ready.set()
        finally:
            del self._loading[key]
            loaded.set_result(None)
        return entry

    async def _cut(self, key: tuple[ServingEngine, str, str, int]) -> tuple[AsyncSession, SessionView] | None:
        """The point as a fork of a longer open session; None if there is none, or if it kept nothing there."""
        longer = self._containing(*key)
        if longer is None:
            return None
        with longer.held():
            try:
                return await _seen(lambda: longer.child(key[3]))
            except Refused:
                return None


async def _seen(make: Callable[[], Session]) -> tuple[AsyncSession, SessionView]:
    """A session that is made now, and its view, both on one thread."""

    def made() -> tuple[Session, SessionView]:
        session = make()
        try:
            return session, session.view()
        except BaseException:
            session.close()
            raise

    session, view = await opened(lambda found: found[0].close(), made)
    return AsyncSession(session), view
