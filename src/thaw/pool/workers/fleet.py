"""The fleet: workers booted in parallel, watched, booted again when they die, added and drained.

A worker that fails is over at once for everybody (its `Incarnation` is), and the next one begins on another thread.
After `MAX_RESTARTS` failures with no batch between them it is given up. Whatever changes here wakes the scheduler.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from thaw.core.errors import EngineDied, NotFound, ThawError
from thaw.engines.base import Engine
from thaw.pool.backends.base import WorkerBackend, WorkerHandle
from thaw.pool.stores import Stores
from thaw.pool.values import WorkerStats
from thaw.pool.workers.reaper import Reaper
from thaw.pool.workers.worker import Incarnation, Worker

MAX_RESTARTS = 3
Update = tuple[str, Any, dict[str, Any]]
"""A policy version, the function that brings its weights (or None), and its arguments."""


class Fleet:
    """`changed` is the pool's one condition: its lock guards every `Worker`."""

    def __init__(
        self, backend: WorkerBackend, stores: Stores, *, changed: threading.Condition,
        threads: Executor, reaper: Reaper, residents: int, policy_version: str | None,
    ) -> None:  # fmt: skip
        self.workers: list[Worker] = []
        self.policy_version = policy_version
        self.restarts = backend.restarts
        self._backend, self._stores = backend, stores
        self.changed, self._threads, self._reaper = changed, threads, reaper
        self._residents = residents
        self._update: Update | None = None
        self._closing = False
        self._begun = 0

    # -- boot

    def start(self, count: int) -> None:
        """Boot `count` workers in parallel. Raises the first error when none comes up."""
        workers = [self._new() for _ in range(count)]
        boots = [self._threads.submit(self._boot, worker, again=False) for worker in workers]
        errors = [error for boot in boots if (error := boot.result()) is not None]
        if errors and not self.ready():
            raise errors[0]

    def add(self) -> Worker:
        """One more worker; returns when it is ready. Raises what its boot raised."""
        worker = self._new()
        error = self._boot(worker, again=False)
        if error is not None:
            raise error
        return worker

    def _new(self) -> Worker:
        with self.changed:
            worker = Worker(f"worker-{self._begun}", self._begun)
            self._begun += 1
            self.workers.append(worker)
            return worker

    def _boot(self, worker: Worker, *, again: bool) -> ThawError | None:
        """A new life, brought to the policy that runs. An error is noted, and tried again while it may be."""
        try:
            life = self._begin(worker)
        except ThawError as error:
            self._boot_failed(worker, error, again)
            return error
        life.host.on_end(lambda: self.failed(worker, life, EngineDied(f"{worker.name} ended by itself")))
        if not life.host.alive():
            self.failed(worker, life, EngineDied(f"{worker.name} ended as soon as it had begun"))
        return None

    def _begin(self, worker: Worker) -> Incarnation:
        if worker.state != "booting":
            raise EngineDied(f"{worker.name} was ended before it booted again")
        host = self._backend.boot(worker.index, worker.name, self.policy_version)
        try:
            return self._brought_to_policy(worker, host)
        except BaseException:
            host.kill()
            raise

    def _brought_to_policy(self, worker: Worker, host: WorkerHandle) -> Incarnation:
        life = Incarnation(worker.name, host, self._stores, self._residents, self._reaper)
        applied: Update | None = None
        while True:
            with self.changed:
                if (
                    worker.state != "booting"
                ):  # it was drained meanwhile, or the pool was closed: it is not to come back
                    raise EngineDied(f"{worker.name} was ended while it booted")
                if self._update is applied:
                    worker.life, worker.state = life, "ready"
                    worker.incarnation += 1
                    worker.boot_s = host.boot_s
                    self.changed.notify_all()
                    return life
                applied = self._update
            assert applied is not None
            apply(life, applied)

    def _boot_failed(self, worker: Worker, error: ThawError, again: bool) -> None:
        with self.changed:
            worker.failures_in_row += 1
            worker.last_error = str(error)
            retry = again and worker.state == "booting" and worker.failures_in_row <= MAX_RESTARTS
            worker.state = "booting" if retry else "gone"
            self.changed.notify_all()
        if retry:
            self._later(self._boot, worker, again=True)

    # -- death

    def failed(self, worker: Worker, life: Incarnation, error: BaseException) -> None:
        """`life` is of no use any more. Idempotent; from any thread."""
        with self.changed:
            if life.over:
                return
            life.over = True
            if worker.life is not life:
                return
            worker.life, worker.last_error = None, str(error)
            worker.num_failures += 1
            worker.failures_in_row += 1
            again = self._backend.restarts and not self._closing and worker.state == "ready"
            again = again and worker.failures_in_row <= MAX_RESTARTS
            worker.state = "booting" if again else "gone"
            self.changed.notify_all()
        if not self._closing:
            self._later(self._bury, worker, life, again)

    def _bury(self, worker: Worker, life: Incarnation, again: bool) -> None:
        life.host.kill()
        if again:
            self._boot(worker, again=True)

    def _later(self, work: Callable[..., object], *given: Any, **how: Any) -> None:
        """On a thread of the pool. One that closes just now takes no more: what it would do, closing does."""
        with contextlib.suppress(RuntimeError):
            self._threads.submit(work, *given, **how)

    def worked(self, worker: Worker, branches: int) -> None:
        """A batch came through: failures are counted anew. Under the lock."""
        worker.failures_in_row = 0
        worker.num_branches += branches

    # -- policy

    def set_policy(self, update: Update) -> None:
        """Every life that is there, and every one that begins from now on. Call while nothing runs.

        A worker that fails at it is failed, for it must serve no KV of another policy."""
        with self.changed:
            self._update, self.policy_version = update, update[0]
            lives = [(worker, worker.life) for worker in self.workers if worker.life is not None]
        errors = []
        for worker, life in lives:
            try:
                apply(life, update)
            except ThawError as error:
                errors.append(error)
                self.failed(worker, life, error)
        if errors and len(errors) == len(lives):
            raise errors[0]

    # -- looking

    def ready(self) -> list[tuple[Worker, Incarnation]]:
        with self.changed:
            return [(w, w.life) for w in self.workers if w.state == "ready" and w.life is not None]

    def hopeless(self) -> bool:
        """Whether no worker is or will be ready."""
        return all(worker.state in ("gone", "draining") for worker in self.workers)

    def life_of(self, engine: Engine) -> Incarnation | None:
        """The life whose engine this is."""
        with self.changed:
            found = [w.life for w in self.workers if w.life is not None and w.life.engine is engine]
        return found[0] if found else None

    def named(self, name: str) -> Worker:
        found = [worker for worker in self.workers if worker.name == name]
        if not found:
            raise NotFound(f"no worker {name!r}; there are: {', '.join(w.name for w in self.workers)}")
        return found[0]

    def stats(self) -> tuple[WorkerStats, ...]:
        with self.changed:
            return tuple(
                WorkerStats(
                    name=w.name, state=w.state, pid=w.life.host.pid if w.life else None, running=w.running,
                    resident_points=w.life.num_residents() if w.life else 0, incarnation=w.incarnation,
                    num_branches=w.num_branches, num_failures=w.num_failures, boot_s=w.boot_s,
                )
                for w in self.workers
            )  # fmt: skip

    # -- end

    def drain(self, worker: Worker, rescues: Callable[[Incarnation], list[Callable[[], object]]]) -> None:
        """Give it nothing more, wait for what runs there, rescue what only it has, and end it. Idempotent.

        `rescues` is asked under the lock, and once more when all that it gave were called: a round that is accepted
        meanwhile has its point rescued too, and none is accepted between the last look and the end."""
        with self.changed:
            if worker.state != "gone":
                worker.state = "draining" if worker.life is not None else "gone"
            self.changed.notify_all()
            self.changed.wait_for(lambda: worker.running == 0 and _settled(worker.life))
            life = worker.life
        while life is not None:
            with self.changed:
                left = rescues(life)
                if not left:
                    life.over, worker.life, worker.state = True, None, "gone"
                    self.changed.notify_all()
                    break
            for rescue in left:
                rescue()
        if life is not None:
            life.host.close()

    def beside(self, life: Incarnation, capture: Callable[[], object]) -> Callable[[], None]:
        """`capture`, to be run on another thread; a drain of `life` waits for it from now on."""
        with self.changed:
            life.captures += 1

        def run() -> None:
            try:
                capture()
            finally:
                with self.changed:
                    life.captures -= 1
                    self.changed.notify_all()

        return run

    def close(self) -> None:
        with self.changed:
            self._closing = True
        self._backend.close()
        with self.changed:
            lives = [worker.life for worker in self.workers if worker.life is not None]
            for worker in self.workers:
                worker.state = "gone"
            for life in lives:
                life.over = True
            self.changed.notify_all()
        ends = [threading.Thread(target=life.host.close, name="thaw-farewell") for life in lives]
        for end in ends:
            end.start()
        for end in ends:
            end.join()


def _settled(life: Incarnation | None) -> bool:
    """Whether no capture beside its batches is under way."""
    return life is None or life.over or not life.captures


def apply(life: Incarnation, update: Update) -> None:
    """Bring the weights, then name the policy: in between the engine refuses what it has by its own look at them."""
    version, function, arguments = update
    if function is not None:
        life.host.invoke(function, arguments)
    life.engine.set_policy(version)
    life.drop_all()


def responds(life: Incarnation) -> bool:
    """Whether the engine still takes sessions and its model answers; it may have ended without a word."""
    if life.over or not life.host.alive():
        return False
    try:
        life.engine.close_session(life.engine.open())
        life.engine.identity()
    except ThawError:
        return False
    return True
