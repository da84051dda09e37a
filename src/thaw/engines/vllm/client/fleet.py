"""Several vLLM engines as one: the ranks of a data-parallel server, or servers that were named in a list.

A session lives in one of them, whose memory holds its KV: its forks live there too, and every verb finds its way by
the session. New and hydrated sessions go where this client has the fewest. A commit may be hydrated by any of them.
Requests of one `generate` start in one step in each engine, so their batch shape is that of the engine's own part.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from thaw.core.errors import EngineDied, InvalidRequest, NotFound
from thaw.core.identity import ModelIdentity, compare
from thaw.core.objects import Chat
from thaw.engines.base import (
    Captured,
    CapturePlan,
    Completion,
    Delta,
    Engine,
    GenerateRequest,
    Handle,
    Hydrated,
    HydratePlan,
    SessionRef,
    SessionView,
)
from thaw.engines.promise import Promise
from thaw.engines.vllm.client.engine import VllmEngine

T = TypeVar("T")


class DataParallelEngine(Engine):
    """`members` run the same model; they are closed with this. Raises `InvalidRequest` or `Refused` where they do not,
    naming what differs."""

    def __init__(self, members: Sequence[VllmEngine]) -> None:
        first = members[0]
        for other in members[1:]:
            _check_same(first, other)
        self.members = tuple(members)
        self.codec = first.codec
        limit = min(member.info.max_model_len for member in members)
        numerics = {**first.info.numerics, "engines": str(len(members))}
        # Sessions are spread: one that begins as another does may come to another member. Nor do all sleep as one.
        capabilities = first.info.capabilities - {"beside", "sleep"}
        self.info = msgspec.structs.replace(
            first.info, max_model_len=limit, numerics=numerics, capabilities=capabilities
        )
        self._home: dict[SessionRef, VllmEngine] = {}
        self._coming: Counter[int] = Counter()
        self._lock = threading.Lock()

    def identity(self, adapter: str | None = None) -> ModelIdentity:
        return self._living()[0].identity(adapter)

    def adapters(self) -> dict[str, str]:
        """Those that every member has, with the same content."""
        first, *others = [member.adapters() for member in self._living()]
        return {name: one for name, one in first.items() if all(other.get(name) == one for other in others)}

    def load_adapter(self, name: str, folder: str | Path) -> str:
        """Into each server once: it loads it into all of its ranks, and refuses a name that it has."""
        servers = {member.options.get("url", id(member)): member for member in self._living()}
        return [member.load_adapter(name, folder) for member in servers.values()][-1]

    # -- sessions begin

    def open(
        self,
        *,
        seed: int | None = None,
        salt: str | None = None,
        share_prefix: bool = False,
        adapter: str | None = None,
    ) -> SessionRef:
        member = self._claim()
        try:
            return self._settle(member, member.open(seed=seed, salt=salt, share_prefix=share_prefix, adapter=adapter))
        finally:
            self._let_go(member)

    def hydrate(self, plan: HydratePlan) -> Handle[Hydrated]:
        member = self._claim()
        try:
            found = member.hydrate(plan)
        except BaseException:
            self._let_go(member)
            raise

        def keep(handle: Handle[Hydrated]) -> None:
            self._let_go(member)
            try:
                self._settle(member, handle.result().session)
            except BaseException:  # noqa: BLE001 - whoever waits for the handle is told
                return

        return _after(found, keep)

    def fork(
        self,
        session: SessionRef,
        n: int,
        *,
        at: int | None = None,
        replay: bool = False,
        seeds: Sequence[int] | None = None,
    ) -> Handle[list[SessionRef]]:
        member = self._of(session)

        def keep(handle: Handle[list[SessionRef]]) -> None:
            try:
                children = handle.result()
            except BaseException:  # noqa: BLE001 - whoever waits for the handle is told
                return
            for child in children:
                self._settle(member, child)

        return _after(member.fork(session, n, at=at, replay=replay, seeds=seeds), keep)

    def reread(self, session: SessionRef, at: int) -> Handle[SessionRef]:
        member = self._of(session)

        def keep(handle: Handle[SessionRef]) -> None:
            try:
                self._settle(member, handle.result())
            except BaseException:  # noqa: BLE001 - whoever waits for the handle is told
                return

        return _after(member.reread(session, at), keep)

    # -- verbs find their way by the session

    def append(
        self,
        session: SessionRef,
        token_ids: Sequence[int],
        *,
        text: str = "",
        role: str | None = None,
        chat: Chat | None = None,
    ) -> Handle[SessionView]:
        return self._of(session).append(session, token_ids, text=text, role=role, chat=chat)

    def keep_points(self, session: SessionRef, tokens: Sequence[int], *, unaligned: bool = False) -> None:
        self._of(session).keep_points(session, tokens, unaligned=unaligned)

    def generate(self, requests: Sequence[GenerateRequest]) -> Handle[list[Completion]]:
        if not requests:
            raise InvalidRequest("generate: no requests; give at least one session")
        parts: dict[VllmEngine, list[int]] = {}
        for index, request in enumerate(requests):
            parts.setdefault(self._of(request.session), []).append(index)
        if len(parts) == 1:
            return next(iter(parts)).generate(requests)
        begun = [(member.generate([requests[i] for i in places]), places) for member, places in parts.items()]
        return _joined(begun, len(requests))

    def capture(self, session: SessionRef, plan: CapturePlan) -> Handle[Captured]:
        member = self._of(session)
        return member.capture(session, msgspec.structs.replace(plan, packs=plan.packs[: member.info.num_packs]))

    def view(self, session: SessionRef) -> SessionView:
        return self._of(session).view(session)

    def park(self, session: SessionRef) -> Handle[SessionView]:
        return self._of(session).park(session)

    def pin(self, session: SessionRef, seconds: float) -> Handle[int]:
        return self._of(session).pin(session, seconds)

    def close_session(self, session: SessionRef) -> None:
        with self._lock:
            member = self._home.pop(session, None)
        if member is not None:
            member.close_session(session)

    # -- what concerns all of them

    def set_policy(self, version: str) -> None:
        for member in self._living():
            member.set_policy(version)

    def update_weights(self, source: str | Path) -> None:
        for member in self._living():
            member.update_weights(str(source))

    @property
    def policy_version(self) -> str:
        return self.members[0].policy_version

    def release_pins(self) -> None:
        for member in self._living():
            member.release_pins()

    def stats(self) -> dict[str, int]:
        """Sums over all engines that run."""
        total: Counter[str] = Counter()
        for member in self._living():
            total.update(member.stats())
        return dict(total)

    def switch(self, *, on: bool = True, watch_weights: bool = True) -> None:
        for member in self._living():
            member.switch(on=on, watch_weights=watch_weights)

    def close(self) -> None:
        for member in self.members:
            member.close()

    # -- where

    def home(self, session: SessionRef) -> str:
        """The address of the engine that has the session."""
        return str(self._of(session).options.get("url", ""))

    def _of(self, session: SessionRef) -> VllmEngine:
        with self._lock:
            member = self._home.get(session)
        if member is None:
            raise NotFound(
                f"session {session[:8]}… is not open in any of these engines: it was closed, or belongs to others"
            )
        return member

    def _settle(self, member: VllmEngine, session: SessionRef) -> SessionRef:
        with self._lock:
            self._home[session] = member
        return session

    def _claim(self) -> VllmEngine:
        """The living engine with the fewest sessions of this client, those on their way included."""
        living = self._living()
        with self._lock:
            count = Counter(map(id, self._home.values())) + self._coming
            chosen = min(living, key=lambda member: count[id(member)])
            self._coming[id(chosen)] += 1
        return chosen

    def _let_go(self, member: VllmEngine) -> None:
        with self._lock:
            self._coming[id(member)] -= 1

    def _living(self) -> list[VllmEngine]:
        """Those whose process runs. Raises `EngineDied` when none is left."""
        found = [member for member in self.members if member.alive()]
        if not found:
            raise EngineDied(f"none of the {len(self.members)} engines runs any more; start them again")
        return found


def _check_same(one: VllmEngine, two: VllmEngine) -> None:
    for name in ("groups", "vocab_size", "version"):
        mine, theirs = getattr(one.info, name), getattr(two.info, name)
        if mine != theirs:
            raise InvalidRequest(f"these engines differ in {name} ({mine} and {theirs}): attach to each by itself")
    compare(one.identity(), two.identity())


def _after(handle: Handle[T], keep: Callable[[Handle[T]], None]) -> Promise[T]:
    """A handle that settles when `keep` has taken note of what came of it."""
    outer: Promise[T] = Promise(on_cancel=handle.cancel)

    def done(inner: Handle[T]) -> None:
        keep(inner)
        try:
            outer.settle(inner.result())
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            outer.settle(error=error)

    handle.add_done_callback(done)
    return outer


def _joined(parts: Sequence[tuple[Handle[list[Completion]], list[int]]], total: int) -> Promise[list[Completion]]:
    """One handle over a batch that runs in several engines. If a part fails, all of it has failed."""

    def cancel() -> None:
        for handle, _ in parts:
            handle.cancel()

    whole: Promise[list[Completion]] = Promise(on_cancel=cancel)
    found: dict[int, Completion] = {}
    lock = threading.Lock()

    def follow(handle: Handle[list[Completion]], places: list[int]) -> None:
        try:
            for delta in handle:
                whole.emit(_placed(delta, places))
            results = handle.result()
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            whole.settle(error=error)
            return
        with lock:
            found.update(zip(places, results, strict=True))
            complete = len(found) == total
        if complete:
            whole.settle([found[i] for i in range(total)])

    for handle, places in parts:
        threading.Thread(target=follow, args=(handle, places), name="thaw-fleet", daemon=True).start()
    return whole


def _placed(delta: Delta, places: Sequence[int]) -> Delta:
    return msgspec.structs.replace(delta, index=places[delta.index])
