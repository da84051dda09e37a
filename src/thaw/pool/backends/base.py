"""The seam below a pool: how a worker's engine comes to be, and how it is ended.

The pool needs an `Engine` of the contract and, where it may, the means to kill and boot it again. Everything above
(placement, retries, rounds) is the same for every backend, and `thaw.testing.PoolTests` runs on each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from thaw.core.errors import InvalidRequest
from thaw.engines.base import Engine, HydratePlan
from thaw.pool.shm.dirs import PoolDirs


@dataclass(frozen=True)
class WorkerSpec:
    """What a pool was given for its workers, all that a backend is made of.

    `engine` and `options` are `load_engine`'s (for engines that run already: what joins them, and `attach`'s). `dirs`:
    the pool's folders on this host. `env`: the environment of the workers, one mapping for all or one for each.
    `boot_timeout_s`: after that a worker that boots is given up. `heartbeat_s`: one that is silent for so long is too.
    """

    engine: Any
    options: Mapping[str, Any]
    dirs: PoolDirs
    env: Mapping[str, str] | Sequence[Mapping[str, str]] = ()
    boot_timeout_s: float = 900.0
    heartbeat_s: float = 60.0

    def options_for(self, policy_version: str | None) -> dict[str, Any]:
        """Of `load_engine`, for an engine that begins with this policy."""
        return {**self.options} if policy_version is None else {**self.options, "policy": policy_version}

    def env_of(self, index: int) -> Mapping[str, str]:
        """What was given for the worker of that number."""
        if isinstance(self.env, Mapping):
            return self.env
        return self.env[index % len(self.env)] if self.env else {}

    def check_no_process(self, why: str) -> None:
        """For a backend that starts no process: raises `InvalidRequest` for what only a process can be given. `why`:
        what the engines are instead. Names variables of `env` and not their values, which may be secrets."""
        names = sorted({name for env in ([self.env] if isinstance(self.env, Mapping) else self.env) for name in env})
        if names:
            raise InvalidRequest(
                f"env sets {', '.join(names)} for the workers' processes, and {why}. Leave env out, and set what they "
                "need before they are loaded"
            )
        for name in ("boot_timeout_s", "heartbeat_s"):
            if (value := getattr(self, name)) != getattr(WorkerSpec, name):
                raise InvalidRequest(
                    f"{name}={value!r} is a limit for the workers' processes, and {why}. Leave {name} out"
                )


class WorkerHandle(Protocol):
    """One life of a worker's engine."""

    engine: Engine
    pid: int | None
    boot_s: float

    def alive(self) -> bool: ...

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when it ends by itself, where that can be seen."""

    def check(self, limit_s: float) -> bool:
        """Whether it was heard within `limit_s`, asking it if need be; True where that cannot be known."""

    def invoke(self, update: str | Callable[[Engine], object], arguments: dict[str, Any]) -> Any:
        """Run a function on the engine, where the engine is; what it returns."""

    def kill(self) -> None:
        """End it now, with everything that it started; whoever waits for it gets `EngineDied`. Idempotent."""

    def close(self) -> None:
        """End it in order. Idempotent."""


@runtime_checkable
class LinkedHandle(Protocol):
    """What a handle has besides where its engine may run on another node, to which KV comes over a link. A link is
    named by the address that KV comes from, "" where it lies on the engine's own node. `state`: a stored state's id."""

    def link(self, state: str) -> str:
        """Over which link that point would come, as far as it is known."""

    def came_over(self, plan: HydratePlan) -> str:
        """Over which link most of what was loaded came."""

    def holds(self, state: str) -> None:
        """That point's KV was written or read on the engine's node."""


class WorkerBackend(Protocol):
    """Boots workers. `restarts`: whether a dead worker can be booted again."""

    restarts: bool

    def boot(self, index: int, name: str, policy_version: str | None) -> WorkerHandle:
        """Blocks until the engine can be used. Called on several threads at once, for different workers."""

    def check_update(self, update: str | Callable[[Engine], object] | None) -> None:
        """Raise `Unsupported` for a function that its workers could not run."""

    def close(self) -> None:
        """Nothing is booted any more: what is booting now ends with `EngineDied`, where it can be ended. Idempotent."""
