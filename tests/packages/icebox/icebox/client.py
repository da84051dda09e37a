"""The engine contract over the server's requests: one POST a verb, on a thread where the contract wants a handle."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from icebox.wire import VERBS, decode, encode
from thaw.core.errors import NotFound
from thaw.core.identity import ModelIdentity
from thaw.core.objects import Chat
from thaw.engines.base import (
    Captured,
    CapturePlan,
    Completion,
    Engine,
    GenerateRequest,
    Handle,
    Hydrated,
    HydratePlan,
    SessionRef,
    SessionView,
    require_no_adapter,
)
from thaw.engines.error_kinds import made
from thaw.engines.fake.codec import FakeCodec
from thaw.engines.promise import Promise

LIMIT_S = 60.0


class HttpEngine(Engine):
    """The engine at `url`. Closing it closes the sessions that were opened through it."""

    def __init__(self, url: str, policy: str) -> None:
        self._url, self._policy, self._open = url.rstrip("/"), policy, set[SessionRef]()
        self.info, self.codec, self.options = self._ask("info"), FakeCodec(), {"url": self._url}

    def identity(self, adapter: str | None = None) -> ModelIdentity:
        require_no_adapter(self, adapter)
        found: ModelIdentity = self._ask("identity")
        return msgspec.structs.replace(found, policy=self._policy)

    def open(
        self,
        *,
        seed: int | None = None,
        salt: str | None = None,
        share_prefix: bool = False,
        adapter: str | None = None,
    ) -> SessionRef:
        require_no_adapter(self, adapter)
        return self._opened(self._ask("open", seed=seed, salt=salt, share_prefix=share_prefix))

    def append(
        self,
        session: SessionRef,
        token_ids: Sequence[int],
        *,
        text: str = "",
        role: str | None = None,
        chat: Chat | None = None,
    ) -> Handle[SessionView]:
        return self._begin("append", session=session, token_ids=list(token_ids), text=text, role=role, chat=chat)

    def generate(self, requests: Sequence[GenerateRequest]) -> Handle[list[Completion]]:
        return self._begin("generate", requests=list(requests))

    def capture(self, session: SessionRef, plan: CapturePlan) -> Handle[Captured]:
        return self._begin("capture", session=session, plan=plan)

    def hydrate(self, plan: HydratePlan) -> Handle[Hydrated]:
        return self._begin("hydrate", plan=plan)

    def fork(
        self,
        session: SessionRef,
        n: int,
        *,
        at: int | None = None,
        replay: bool = False,
        seeds: Sequence[int] | None = None,
    ) -> Handle[list[SessionRef]]:
        return self._begin("fork", session=session, n=n, at=at, replay=replay, seeds=list(seeds) if seeds else None)

    def view(self, session: SessionRef) -> SessionView:
        found: SessionView = self._ask("view", session=session)
        return found

    def park(self, session: SessionRef) -> Handle[SessionView]:
        return self._begin("park", session=session)

    def set_policy(self, version: str) -> None:
        self._ask("set_policy", version=version)
        self._policy = version

    @property
    def policy_version(self) -> str:
        return self._policy

    def update_weights(self, source: str | Path) -> None:
        self._ask("update_weights", source=str(source))

    def close_session(self, session: SessionRef) -> None:
        self._open.discard(session)
        self._ask("close_session", session=session)

    def close(self) -> None:
        while self._open:
            self._ask("close_session", session=self._open.pop())

    def _opened(self, session: SessionRef) -> SessionRef:
        self._open.add(session)
        return session

    def _begin(self, verb: str, **arguments: Any) -> Promise[Any]:
        promise: Promise[Any] = Promise()

        def work() -> None:
            try:
                found = self._ask(verb, **arguments)
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits
                promise.settle(error=error)
                return
            for session in found if verb == "fork" else [found.session] if verb == "hydrate" else ():
                self._opened(session)
            promise.settle(found)

        threading.Thread(target=work, daemon=True).start()
        return promise

    def _ask(self, verb: str, **arguments: Any) -> Any:
        body = encode(arguments)
        try:
            with urllib.request.urlopen(f"{self._url}/{verb}", body, LIMIT_S) as reply:
                return decode(reply.read(), VERBS[verb][1])
        except urllib.error.HTTPError as error:
            said = decode(error.read(), dict[str, str])
            raise made(said["kind"], said["message"]) from None
        except OSError as error:
            raise NotFound(f"no icebox at {self._url}: {error}") from None
