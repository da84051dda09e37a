"""Every public name that touches a disk or an engine has an awaited form, with the same parameters.

What touches neither is listed here by name, so that whoever adds a verb decides.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import inspect
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import thaw
import thaw.pool
import thaw.repo
import thaw.serve
import thaw.snapshot
from thaw import Sampling, aio
from thaw.core.errors import NotFound
from thaw.engines.base import Engine
from thaw.pool import ForkPool, PoolSession, Round, Snapshot
from thaw.pool.aio import AsyncForkPool, AsyncRound
from thaw.repo import Group, Repository, Session, Stream, bridge
from thaw.repo.aio import AsyncGroup, AsyncRepository, AsyncSession, AsyncStream, AsyncWeights
from thaw.repo.bridge import MAX_THREADS, Begun, call, each, opened
from thaw.snapshot import CheckpointRing, QueuedRequest, RequestQueue
from thaw.snapshot.aio import AsyncCheckpointRing, AsyncQueuedRequest, AsyncRequestQueue
from thaw.weights import WeightsBook

VIEWS: dict[type, type] = {
    Repository: AsyncRepository,
    Session: AsyncSession,
    PoolSession: AsyncSession,
    Group: AsyncGroup,
    Stream: AsyncStream,
    ForkPool: AsyncForkPool,
    Round: AsyncRound,
    RequestQueue: AsyncRequestQueue,
    QueuedRequest: AsyncQueuedRequest,
    CheckpointRing: AsyncCheckpointRing,
    WeightsBook: AsyncWeights,
}
PLAIN: dict[type, set[str]] = {
    Repository: {
        "path", "namespace", "within",  # as on the view
        "weights",  # a view of its own
        "store", "commits_of",  # the open store itself; a comparison
        "live_sessions", "is_drained",  # remembered
    },
    Session: {
        "ref", "engine_ref", "parent", "branch", "namespace", "num_inherited", "is_open", "engine",  # remembered
        "commits_to", "kept_at", "num_reread", "check_process",  # likewise
        "request", "plan_chat", "follow", "settle_chat",  # the steps of `generate` and `chat`, for groups
    },
    Group: {"check_process", "index", "count"},
    Stream: set(),
    ForkPool: set(),
    WeightsBook: set(),
    Round: {"on_cancel", "emit", "settle", "has"},  # the pool's side
    RequestQueue: {
        "add", "forget", "known", "request", "requests",  # in memory
        "hold", "release", "stop", "go_on", "remove",  # the steps of a restore and of a migration
    },
    QueuedRequest: {
        "token_ids", "text", "num_tokens", "ended",  # in memory
        "given", "begin", "own_turn", "take_up", "follow", "finish", "stop", "interrupt", "resume", "fail", "move_to",
    },
    CheckpointRing: set(),
}  # fmt: skip
PLAIN[PoolSession] = PLAIN[Session] | {"worker", "moved"}
PLAIN_NAMES = {"Snapshot", "has_server", "require_keys", "aio", "__version__"}
"""A snapshot is held in memory; the two ask the registry."""


def public(kind: type) -> list[str]:
    return [name for name in dir(kind) if not name.startswith("_")]


def lacking(kind: type, view: type, plain: set[str]) -> list[str]:
    """Names of `kind` that `view` does not await with the same parameters."""
    return [name for name in public(kind) if name not in plain and not awaits(getattr(kind, name), view, name)]


def awaits(blocking: Any, view: type, name: str) -> bool:
    found = getattr(view, name, None)
    if found is None or isinstance(found, property):
        return False
    begins = getattr(found, "__wrapped__", None) is not None or "AsyncRound" in str(found.__annotations__.get("return"))
    if not (inspect.iscoroutinefunction(found) or inspect.isasyncgenfunction(found) or begins):
        return False
    if isinstance(blocking, property):
        return list(inspect.signature(found).parameters) == ["self"]
    if issubclass(view, Begun) and name in ("result", "add_done_callback"):
        return True  # who wants less time than it takes has asyncio.timeout
    return parameters(found) == parameters(blocking) or passes_on(found) or passes_on(blocking)


def passes_on(function: Callable[..., Any]) -> bool:
    """Whether it takes what another one takes, by name."""
    return any(one.kind is one.VAR_KEYWORD for one in inspect.signature(function).parameters.values())


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(one.name, one.kind, one.default) for one in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("kind", VIEWS, ids=lambda kind: kind.__name__)
def test_every_verb_of_a_class_is_awaited_or_touches_nothing(kind: type) -> None:
    assert lacking(kind, VIEWS[kind], PLAIN[kind]) == []
    assert PLAIN[kind] <= {*public(kind)}


def test_a_verb_that_is_not_awaited_is_noticed() -> None:
    class More(Repository):
        def extra(self) -> None: ...

        @property
        def asked(self) -> int:
            return 1

        def log(self, other: int) -> None: ...  # type: ignore[override]

    assert lacking(More, AsyncRepository, PLAIN[Repository]) == ["asked", "extra", "log"]
    assert "store" in lacking(Repository, AsyncRepository, set())


@pytest.mark.parametrize(
    "module", [thaw, thaw.repo, thaw.pool, thaw.serve, thaw.snapshot], ids=lambda module: module.__name__
)
def test_every_public_name_has_an_awaited_form_or_is_a_value(module: Any) -> None:
    for name in module.__all__:
        found = getattr(module, name)
        if name in PLAIN_NAMES or found in VIEWS or name == "ThawError":
            continue
        if inspect.isclass(found):
            values = issubclass(found, (msgspec.Struct, Exception)) or dataclasses.is_dataclass(found)
            assert values, f"{name} is no value: give it a view in VIEWS, or say that it touches nothing"
        else:
            assert inspect.iscoroutinefunction(getattr(aio, name)), name
    assert not any(name in dir(Snapshot) for name in ("append", "commit"))


def test_look_ups_are_awaited_and_say_what_the_blocking_ones_say(tmp_path: Path, engine: Engine) -> None:
    async def main() -> None:
        async with await aio.open(tmp_path / "r", engine=engine) as whole:
            repo = whole.within("acme")
            async with await repo.session(seed=3) as s:
                await s.append("hello " * 50)
                done = await s.commit("read", branch="main")
                assert await s.tokens() == s.sync.tokens and await s.num_tokens() == 300
                assert await s.text() == "hello " * 50 and await s.committed() == done
                found = await repo.match(await s.tokens())
                assert found is not None and found.commit == done.commit
            await repo.tag("v1", "main")
            assert [entry.commit for entry in await repo.log(all=True)] == [done.commit]
            assert [ref.name for ref in await repo.tags()] == ["v1"] and await whole.branches() == []
            assert (await repo.resolve("v1")).commit == (await repo.at("main", token=300)).commit
            assert (await repo.diff("main", "v1")).equal and len((await repo.show("main")).tokens) == 300
            assert (await repo.undo("v1")).new is None and (await repo.stats()).num_commits == 1
            assert (await whole.gc(dry_run=True)).commits_removed == 0 and (await whole.fsck()).ok
            assert await whole.namespaces() == ["acme"] and (repo.namespace, repo.path) == ("acme", whole.path)
            async with await repo.fork("main", 2) as kids:
                await kids.generate("Go. ", Sampling(max_tokens=3, ignore_eos=True))
                await repo.adopt(kids[1], "main")
                assert len(await kids.proofs()) == len(list(kids)) == 2
            with pytest.raises(NotFound):
                await whole.resolve("main")
            assert await whole.engine() is engine

    asyncio.run(main())


def test_what_is_opened_for_a_task_that_is_gone_is_closed(tmp_path: Path, engine: Engine) -> None:
    opening, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def slowly() -> str:
        opening.set()
        go_on.wait(60)
        return "opened"

    async def main() -> None:
        task = asyncio.ensure_future(opened(lambda one: closed.set(), slowly))
        await asyncio.to_thread(opening.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not closed.is_set()

    asyncio.run(main())
    go_on.set()  # the loop is gone as well
    assert closed.wait(60)


def test_many_verbs_that_wait_hold_up_no_others(tmp_path: Path, engine: Engine) -> None:
    go_on = threading.Event()

    async def main() -> None:
        async with await aio.open(tmp_path / "r", engine=engine) as repo:
            waiting = [asyncio.ensure_future(call(go_on.wait, 60)) for _ in range(60)]
            await asyncio.sleep(0)
            assert await asyncio.wait_for(repo.branches(), 30) == []
            assert not any(one.done() for one in waiting)
            go_on.set()
            assert all(await asyncio.gather(*waiting))

    asyncio.run(main())


def test_streams_go_on_while_verbs_fill_every_thread() -> None:
    go_on = threading.Event()

    async def main() -> None:
        waiting = [asyncio.ensure_future(call(go_on.wait, 60)) for _ in range(MAX_THREADS + 8)]
        await asyncio.sleep(0)
        for _ in range(3):
            assert await asyncio.wait_for(listed(range(5)), 30) == [0, 1, 2, 3, 4]
        assert not any(one.done() for one in waiting)
        go_on.set()
        assert all(await asyncio.gather(*waiting))

    asyncio.run(main())


async def listed(items: Iterable[int]) -> list[int]:
    return [item async for item in each(items)]


class Items:
    """A stream's: its number, and on what threads it ran. `together`: waits there first."""

    def __init__(self, number: int, ran: dict[int, int], together: threading.Barrier | None = None) -> None:
        self.number, self.ran, self.together = number, ran, together

    def __iter__(self) -> Iterator[int]:
        if self.together is not None:
            self.together.wait(30)
        self.ran[self.number] = threading.get_ident()
        yield self.number


def soon(holds: Callable[[], bool]) -> bool:
    ended = time.monotonic() + 30
    while not holds() and time.monotonic() < ended:
        time.sleep(0.01)
    return holds()


def test_a_stream_takes_the_thread_of_one_that_is_over_of_which_nothing_is_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    idle: list[object] = []
    monkeypatch.setattr(bridge, "_idle", idle)
    ran: dict[int, int] = {}

    async def main() -> None:
        first = Items(1, ran)
        gone = weakref.ref(first)
        assert await listed(first) == [1] and soon(lambda: len(idle) == 1)
        del first
        assert soon(lambda: gc.collect() >= 0 and gone() is None)
        assert await listed(Items(2, ran)) == [2] and soon(lambda: len(idle) == 1)
        both = threading.Barrier(2)
        assert await asyncio.gather(listed(Items(3, ran, both)), listed(Items(4, ran, both))) == [[3], [4]]

    asyncio.run(main())
    assert ran[1] == ran[2] and ran[3] != ran[4]


def test_a_thread_for_which_no_stream_comes_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    idle: list[object] = []
    monkeypatch.setattr(bridge, "_idle", idle)
    monkeypatch.setattr(bridge, "IDLE_S", 0.05)
    ran: dict[int, int] = {}
    assert asyncio.run(listed(Items(1, ran))) == [1]
    assert soon(lambda: not idle and ran[1] not in {thread.ident for thread in threading.enumerate()})
    assert asyncio.run(listed(Items(2, ran))) == [2]


def test_a_stream_whose_thread_cannot_start_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the system has no room for another one."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "thaw-aio":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(bridge, "_idle", [])
    with pytest.raises(RuntimeError, match="new thread"):
        asyncio.run(asyncio.wait_for(listed([1]), 30))
