"""The backend of engines that run already: joined, and left running when the pool closes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from thaw.core.errors import InvalidRequest
from thaw.engines.base import Engine
from thaw.pool.backends.base import WorkerHandle, WorkerSpec
from thaw.pool.backends.inline import InlineHandle


class AttachedBackend:
    """Engines that run already: `Engine` objects, addresses, or whatever `thaw.attach` joins."""

    restarts = False

    def __init__(self, spec: WorkerSpec) -> None:
        """`spec.engine`: one of them, or a list. Raises `InvalidRequest` for none, and for options that would do
        nothing."""
        self._targets = list(spec.engine) if isinstance(spec.engine, (list, tuple)) else [spec.engine]
        self._options = dict(spec.options)
        if not self._targets:
            raise InvalidRequest("no engines given to attach to")
        spec.check_no_process("the engines that this pool joins run already")
        if self._options and all(isinstance(target, Engine) for target in self._targets):
            given = ", ".join(f"{name}={value!r}" for name, value in self._options.items())
            raise InvalidRequest(f"{given}: no option of ForkPool, and the engines that it joins are attached already")

    def __len__(self) -> int:
        """How many there are."""
        return len(self._targets)

    def add(self, target: Any) -> int:
        self._targets.append(target)
        return len(self._targets) - 1

    def boot(self, index: int, name: str, policy_version: str | None) -> WorkerHandle:
        target = self._targets[index]
        if isinstance(target, Engine):
            return InlineHandle(target, owned=False)
        from thaw.engines.joining import attach

        began = time.perf_counter()
        engine = attach(target, **self._options)
        return InlineHandle(engine, owned=True, boot_s=time.perf_counter() - began)

    def check_update(self, update: str | Callable[[Engine], object] | None) -> None:
        return

    def close(self) -> None:
        return
