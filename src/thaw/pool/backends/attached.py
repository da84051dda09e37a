"""The backend of engines that run already: joined, and left running when the pool closes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from thaw.engines.base import Engine
from thaw.pool.backends.base import WorkerHandle
from thaw.pool.backends.inline import InlineHandle


class AttachedBackend:
    """Engines that run already: `Engine` objects, addresses, or whatever `thaw.attach` joins."""

    restarts = False

    def __init__(self, targets: Sequence[Any], options: Mapping[str, Any]) -> None:
        self._targets, self._options = list(targets), dict(options)

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
