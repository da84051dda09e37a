"""An engine in another process, at the other end of a line: what its handle does wherever that process is."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from thaw.core.errors import EngineDied, TimedOut, Unsupported
from thaw.engines.base import Engine
from thaw.pool.rpc import protocol
from thaw.pool.rpc.client import EngineProxy, RpcClient
from thaw.pool.rpc.protocol import Booted

FAREWELL_S = 25.0


class LineHandle(ABC):
    """A process that was started, and the line to it. After `start`, `engine` is there and `boot_s` above 0."""

    engine: Engine

    def __init__(self, line: RpcClient, pid: int) -> None:
        self._line = line
        self.pid: int | None = pid
        self.boot_s = 0.0

    def start(self, engine: str, options: dict[str, Any], limit_s: float) -> None:
        """Boot the engine. Raises `EngineDied`, with the end of the process' log."""
        began = time.perf_counter()
        call = protocol.Boot(id=0, protocol=protocol.PROTOCOL, engine=engine, options=options)
        try:
            booted: Booted = self._line.ask(call).result(limit_s)
        except TimedOut:
            raise EngineDied(f"the worker did not boot within {limit_s:.0f} s{self._last_words()}") from None
        except EngineDied as error:
            raise EngineDied(f"{error}{self._last_words()}") from None
        self.engine = self._proxy(booted)
        self.boot_s = time.perf_counter() - began

    def check(self, limit_s: float) -> bool:
        silent = time.monotonic() - self._line.heard
        if silent > limit_s / 3:
            self._line.tell(protocol.Ping(id=0))
        return silent < limit_s

    def invoke(self, update: str | Callable[[Engine], object], arguments: dict[str, Any]) -> Any:
        assert isinstance(self.engine, EngineProxy)
        return self.engine.invoke(named(update), arguments)

    def _proxy(self, booted: Booted) -> Engine:
        return EngineProxy(self._line, booted)

    @abstractmethod
    def _log(self) -> str:
        """The end of the process' log, "" where it cannot be read."""

    def _last_words(self) -> str:
        """The last lines of its log, for the error."""
        lines = self._log().strip().splitlines()[-5:]
        return ": " + " | ".join(lines) if lines else ""


def named(update: str | Callable[[Engine], object]) -> str:
    """`update`, where it can be sent to another process. Raises `Unsupported` for a function itself."""
    if isinstance(update, str):
        return update
    raise Unsupported(
        "the workers are processes of their own, to which no function can be sent: give update as 'module:function', "
        "importable there, or make the pool with backend='inline'"
    )
