"""The host process of one worker: `python -m thaw.pool.rpc.server FD`, an engine behind a socket.

It lives as long as its pool: when the other end of the socket is gone the engine is closed and the process, with
everything that the engine started, ends. Calls wait for the engine on threads of their own, so a ping is answered
whatever the engine does.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from queue import SimpleQueue
from typing import Any

from thaw.core.errors import InvalidRequest
from thaw.engines.base import Delta, Engine, Handle
from thaw.pool.rpc import protocol
from thaw.pool.rpc.connection import Connection
from thaw.pool.rpc.protocol import Call

MAX_CALLS = 512
GATHER_S = 0.002
"""Deltas that come within this time go as one message."""
FAREWELL_S = 20.0


class RpcServer:
    """Answers calls over one connection until it ends."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._engine: Engine | None = None
        self._threads = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="thaw-host")
        self._lock = threading.Lock()
        self._under_way: dict[int, Handle[Any] | None] = {}
        """Calls that came and are not answered, with what the engine gave for them, None until it gave it."""
        self._cancelled: set[int] = set()
        """Calls that were cancelled while the engine had not yet given anything for them."""
        self._ended = threading.Event()

    def serve(self) -> None:
        while (data := self._connection.receive()) is not None:
            call = protocol.CALLS.decode(data)
            if isinstance(call, protocol.Ping):
                self._say(protocol.Pong(id=call.id))
            elif isinstance(call, protocol.Cancel):
                self._cancel(call.id)
            elif isinstance(call, protocol.Bye):
                break
            else:
                with self._lock:
                    self._under_way[call.id] = None
                self._threads.submit(self._answer, call)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def _answer(self, call: Call) -> None:
        try:
            value = self._run(call)
        except BaseException as error:  # noqa: BLE001 - the caller gets it, whatever it is
            self._say(protocol.failed(call.id, error))
        else:
            self._say(protocol.settled(call.id, value))
        finally:
            with self._lock:
                self._under_way.pop(call.id, None)
                self._cancelled.discard(call.id)

    def _run(self, call: Call) -> Any:
        if isinstance(call, protocol.Boot):
            return self._boot(call)
        assert self._engine is not None
        found = _VERBS[type(call)](self._engine, call)
        if not isinstance(found, Handle):
            return found
        with self._lock:
            self._under_way[call.id] = found
            cancelled = call.id in self._cancelled
        if cancelled:
            found.cancel()
        if isinstance(call, protocol.Generate):
            self._stream(call.id, found)
        return found.result()

    def _boot(self, call: protocol.Boot) -> protocol.Booted:
        if call.protocol != protocol.PROTOCOL:
            raise InvalidRequest(
                f"the host speaks protocol {protocol.PROTOCOL}, the pool {call.protocol}: use one thaw"
            )
        from thaw.engines import load_engine

        self._engine = load_engine(call.engine, **call.options)
        engine = self._engine
        return protocol.Booted(
            info=engine.info, options=engine.options, policy_version=engine.policy_version, pid=os.getpid()
        )

    def _stream(self, number: int, handle: Handle[Any]) -> None:
        """Send deltas until the handle has no more, those of a step as one message. An error is left to `result`."""
        queue: SimpleQueue[Delta | None] = SimpleQueue()
        self._threads.submit(_pump, handle, queue)
        found = queue.get()
        while found is not None:
            batch = [found]
            time.sleep(GATHER_S)
            while not queue.empty() and (found := queue.get()) is not None:
                batch.append(found)
            self._say(protocol.News(id=number, deltas=tuple(batch)))
            found = None if found is None else queue.get()

    def _cancel(self, number: int) -> None:
        """A call waits for a thread before the engine hears of it, and this may come first: then it is noted."""
        with self._lock:
            handle = self._under_way.get(number)
            if handle is None and number in self._under_way:
                self._cancelled.add(number)
        if handle is not None:
            self._threads.submit(handle.cancel)

    def _say(self, reply: protocol.Reply) -> None:
        with contextlib.suppress(OSError):  # the pool is gone; `serve` sees it too
            self._connection.send(reply)


def _pump(handle: Handle[Any], queue: SimpleQueue[Delta | None]) -> None:
    with contextlib.suppress(BaseException):
        for delta in handle:
            queue.put(delta)
    queue.put(None)


def invoke(engine: Engine, update: str, arguments: dict[str, Any]) -> Any:
    """Run `module:function` on the engine."""
    module, _, name = update.partition(":")
    function: Callable[..., object] | None = getattr(importlib.import_module(module), name, None) if name else None
    if function is None:
        raise InvalidRequest(f"update={update!r}: give it as module:function, importable in the worker")
    return function(engine, **arguments)


_VERBS: dict[type, Callable[[Engine, Any], Any]] = {
    protocol.Open: lambda e, c: e.open(seed=c.seed, salt=c.salt, share_prefix=c.share_prefix),
    protocol.Append: lambda e, c: e.append(c.session, c.token_ids, text=c.text, role=c.role, chat=c.chat),
    protocol.Generate: lambda e, c: e.generate(c.requests),
    protocol.Capture: lambda e, c: e.capture(c.session, c.plan),
    protocol.Hydrate: lambda e, c: e.hydrate(c.plan),
    protocol.Fork: lambda e, c: e.fork(c.session, c.n, at=c.at, replay=c.replay, seeds=c.seeds),
    protocol.View: lambda e, c: e.view(c.session),
    protocol.Park: lambda e, c: e.park(c.session),
    protocol.CloseSession: lambda e, c: e.close_session(c.session),
    protocol.SetPolicy: lambda e, c: e.set_policy(c.version),
    protocol.Identity: lambda e, c: e.identity(),
    protocol.Encode: lambda e, c: e.codec.encode(c.text, first=c.first),
    protocol.Decode: lambda e, c: (e.codec.decode_settled if c.settled else e.codec.decode)(
        c.token_ids, skip_special_tokens=c.skip_special_tokens
    ),
    protocol.ChatText: lambda e, c: e.codec.chat_text(
        c.messages,
        add_generation_prompt=c.add_generation_prompt,
        tools=c.tools,
        variables=c.variables,
        moment=None if c.moment is None else datetime.fromisoformat(c.moment),
    ),
    protocol.EncodeChat: lambda e, c: e.codec.encode_chat(c.text, inside=c.inside),
    protocol.Invoke: lambda e, c: invoke(e, c.function, c.arguments),
}


@contextlib.contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """Everything of this process' session is killed when the block is over, or after `seconds` of it."""
    timer = threading.Timer(seconds, _kill_group)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        _kill_group()


def _kill_group() -> None:
    if os.getpgid(0) == os.getpid():  # a pool starts its hosts as leaders of their own; nobody else's group is ended
        os.killpg(0, signal.SIGKILL)


def main(fd: int) -> None:
    host = RpcServer(Connection(socket.socket(fileno=fd)))
    host.serve()
    with _ended_after(FAREWELL_S):
        host.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
