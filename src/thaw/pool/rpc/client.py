"""An engine in another process, as the contract's `Engine`: every verb is a message and a promise.

Nothing is cached but what cannot change. When the process ends, whatever waits for it raises `EngineDied`.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from thaw.core.errors import EngineDied
from thaw.core.identity import ModelIdentity
from thaw.core.objects import Chat
from thaw.engines.base import (
    Captured,
    CapturePlan,
    Codec,
    Completion,
    Engine,
    GenerateRequest,
    Handle,
    Hydrated,
    HydratePlan,
    Message,
    SessionRef,
    SessionView,
    require_no_adapter,
)
from thaw.engines.promise import Promise
from thaw.pool.rpc import protocol
from thaw.pool.rpc.connection import Connection
from thaw.pool.rpc.protocol import Booted, Call


class RpcClient:
    """Calls under way over one connection. A reader thread settles their promises."""

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection = connection
        self._name = name
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[type, Promise[Any]]] = {}
        self._ended = ""
        self.heard = time.monotonic()
        self.on_end: Callable[[], None] | None = None
        threading.Thread(target=self._read, name=f"thaw-{name}", daemon=True).start()

    def number(self) -> int:
        return next(self._numbers)

    def ask(self, call: Call) -> Promise[Any]:
        """Send a call; its promise is settled by the reader, or with `EngineDied` at the end."""
        promise: Promise[Any] = Promise(on_cancel=lambda: self.tell(protocol.Cancel(id=call.id)))
        with self._lock:
            if self._ended:
                raise EngineDied(self._ended)
            self._waiting[call.id] = (type(call), promise)
        self.tell(call)
        return promise

    def tell(self, call: Call) -> None:
        try:
            self._connection.send(call)
        except OSError:
            self.end(f"worker {self._name} does not take messages any more: its process has ended")

    def end(self, why: str) -> None:
        """No answer will come: every promise is settled. Idempotent."""
        with self._lock:
            first, self._ended = not self._ended, self._ended or why
            waiting, self._waiting = self._waiting, {}
        for _, promise in waiting.values():
            promise.settle(error=EngineDied(self._ended))
        self._connection.close()
        if first and self.on_end is not None:
            self.on_end()

    def _read(self) -> None:
        try:
            while (data := self._connection.receive()) is not None:
                self.heard = time.monotonic()
                self._take(protocol.REPLIES.decode(data))
        finally:  # also after a message that is none: nobody may wait for a line that is not read
            self.end(f"worker {self._name} ended while this was under way")

    def _take(self, reply: protocol.Reply) -> None:
        if isinstance(reply, protocol.Pong):
            return
        with self._lock:
            keep = isinstance(reply, protocol.News)
            found = self._waiting.get(reply.id) if keep else self._waiting.pop(reply.id, None)
        if found is None:
            return
        call, promise = found
        if isinstance(reply, protocol.News):
            for delta in reply.deltas:
                promise.emit(delta)
        elif isinstance(reply, protocol.Failed):
            promise.settle(error=protocol.error_of(reply))
        else:
            promise.settle(protocol.value_of(call, reply))


class CodecProxy(Codec):
    """The engine's own tokenizer, asked."""

    def __init__(self, line: RpcClient) -> None:
        self._line = line

    def encode(self, text: str, *, first: bool) -> list[int]:
        found: list[int] = self._line.ask(protocol.Encode(id=self._line.number(), text=text, first=first)).result()
        return found

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._decode(token_ids, skip_special_tokens, settled=False)

    def decode_settled(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._decode(token_ids, skip_special_tokens, settled=True)

    def _decode(self, token_ids: Sequence[int], skip_special_tokens: bool, *, settled: bool) -> str:
        call = protocol.Decode(
            id=self._line.number(),
            token_ids=tuple(token_ids),
            skip_special_tokens=skip_special_tokens,
            settled=settled,
        )
        return str(self._line.ask(call).result())

    def chat_text(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Message] | None = None,
        variables: Mapping[str, object] | None = None,
        moment: datetime | None = None,
    ) -> str:
        call = protocol.ChatText(
            id=self._line.number(),
            messages=tuple(messages),
            add_generation_prompt=add_generation_prompt,
            tools=None if tools is None else tuple(tools),
            variables=None if variables is None else dict(variables),
            moment=None if moment is None else moment.isoformat(),
        )
        return str(self._line.ask(call).result())

    def encode_chat(self, text: str, *, inside: bool = False) -> list[int]:
        found: list[int] = self._line.ask(
            protocol.EncodeChat(id=self._line.number(), text=text, inside=inside)
        ).result()
        return found


NOT_FROM_HERE = frozenset({"sleep", "adapters"})
"""What no message asks an engine in another process for."""


class EngineProxy(Engine):
    """The engine of one host process. `close` ends that process' engine."""

    def __init__(self, line: RpcClient, booted: Booted) -> None:
        self._line = line
        self._policy = booted.policy_version
        capabilities = booted.info.capabilities - NOT_FROM_HERE
        self.info = msgspec.structs.replace(booted.info, capabilities=capabilities)
        self.options = booted.options
        self.codec = CodecProxy(line)

    def identity(self, adapter: str | None = None) -> ModelIdentity:
        require_no_adapter(self, adapter)
        found: ModelIdentity = self._line.ask(protocol.Identity(id=self._line.number())).result()
        return found

    def open(
        self,
        *,
        seed: int | None = None,
        salt: str | None = None,
        share_prefix: bool = False,
        adapter: str | None = None,
    ) -> SessionRef:
        require_no_adapter(self, adapter)
        call = protocol.Open(id=self._line.number(), seed=seed, salt=salt, share_prefix=share_prefix)
        return SessionRef(self._line.ask(call).result())

    def append(
        self,
        session: SessionRef,
        token_ids: Sequence[int],
        *,
        text: str = "",
        role: str | None = None,
        chat: Chat | None = None,
    ) -> Handle[SessionView]:
        call = protocol.Append(
            id=self._line.number(), session=session, token_ids=tuple(token_ids), text=text, role=role, chat=chat
        )
        return self._line.ask(call)

    def generate(self, requests: Sequence[GenerateRequest]) -> Handle[list[Completion]]:
        return self._line.ask(protocol.Generate(id=self._line.number(), requests=tuple(requests)))

    def capture(self, session: SessionRef, plan: CapturePlan) -> Handle[Captured]:
        return self._line.ask(protocol.Capture(id=self._line.number(), session=session, plan=plan))

    def hydrate(self, plan: HydratePlan) -> Handle[Hydrated]:
        return self._line.ask(protocol.Hydrate(id=self._line.number(), plan=plan))

    def fork(
        self,
        session: SessionRef,
        n: int,
        *,
        at: int | None = None,
        replay: bool = False,
        seeds: Sequence[int] | None = None,
    ) -> Handle[list[SessionRef]]:
        given = None if seeds is None else tuple(int(seed) for seed in seeds)
        number = self._line.number()
        return self._line.ask(protocol.Fork(id=number, session=session, n=n, at=at, replay=replay, seeds=given))

    def view(self, session: SessionRef) -> SessionView:
        found: SessionView = self._line.ask(protocol.View(id=self._line.number(), session=session)).result()
        return found

    def park(self, session: SessionRef) -> Handle[SessionView]:
        return self._line.ask(protocol.Park(id=self._line.number(), session=session))

    def set_policy(self, version: str) -> None:
        self._line.ask(protocol.SetPolicy(id=self._line.number(), version=version)).result()
        self._policy = version

    @property
    def policy_version(self) -> str:
        return self._policy

    def update_weights(self, source: str | Path) -> None:
        self.invoke("thaw.engines.base:update_weights", {"source": str(source)})

    def close_session(self, session: SessionRef) -> None:
        self._line.ask(protocol.CloseSession(id=self._line.number(), session=session)).result()

    def invoke(self, function: str, arguments: dict[str, Any]) -> Any:
        """Run `module:function(engine, **arguments)` in the engine's process; its value, if that is a plain one."""
        return self._line.ask(protocol.Invoke(id=self._line.number(), function=function, arguments=arguments)).result()

    def close(self) -> None:
        self._line.tell(protocol.Bye(id=self._line.number()))
