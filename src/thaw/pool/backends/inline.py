"""The inline backend: engines in this process. A hang cannot be ended, a crash takes the client along."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from thaw.engines.base import Engine
from thaw.pool.backends.base import WorkerHandle, WorkerSpec


class InlineHandle:
    """An engine of this process, or one that is joined."""

    def __init__(self, engine: Engine, *, owned: bool, boot_s: float = 0.0) -> None:
        self.engine = engine
        self.pid: int | None = None
        self.boot_s = boot_s
        self._owned, self._dead = owned, False

    def alive(self) -> bool:
        return not self._dead

    def on_end(self, callback: Callable[[], None]) -> None:
        """An engine of this process does not say when it ends; its next use does."""

    def check(self, limit_s: float) -> bool:
        return True

    def invoke(self, update: str | Callable[[Engine], object], arguments: dict[str, Any]) -> Any:
        if isinstance(update, str):
            from thaw.pool.rpc.server import invoke

            return invoke(self.engine, update, arguments)
        return update(self.engine, **arguments)

    def kill(self) -> None:
        """Ours is closed, which ends its work; somebody else's is only not used any more."""
        self.close()

    def close(self) -> None:
        if not self._dead:
            self._dead = True
            if self._owned:
                self.engine.close()


class InlineBackend:
    """Engines loaded into this process. A hang cannot be ended, a crash takes the client along."""

    restarts = True

    def __init__(self, spec: WorkerSpec) -> None:
        """Raises `InvalidRequest` for what only a process can be given."""
        spec.check_no_process("with backend='inline' the engines run in this process (backend='process' starts others)")
        self._spec = spec

    def boot(self, index: int, name: str, policy_version: str | None) -> WorkerHandle:
        from thaw.engines import load_engine

        began = time.perf_counter()
        engine = load_engine(self._spec.engine, **self._spec.options_for(policy_version))
        return InlineHandle(engine, owned=True, boot_s=time.perf_counter() - began)

    def check_update(self, update: str | Callable[[Engine], object] | None) -> None:
        return

    def close(self) -> None:
        return
