"""The fork pool: the front desk.

What it does is in the rooms beside it; this one wires them together.

    schedule/    what a point is, which chunk runs next, where, and how its point gets there
    workers/     boot, watch, restart, drain
    backends/    how a worker's engine comes to be: a process of its own, this process, or joined
    rpc/         calls to an engine in another process
    shm/         the folders in shared memory, the arena in them, and who removes them
    stores.py    the arena and the repository, as one list
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import msgspec

from thaw.core import cache
from thaw.core.errors import EngineDied, InvalidRequest, ThawError
from thaw.core.sampling import check_seed
from thaw.data.files import cache_dir, write_atomic
from thaw.engines.base import Engine, EngineInfo, Message
from thaw.pool.arguments import (
    Branches,
    SnapshotMode,
    as_branches,
    check_counts,
    check_mode,
    check_policy,
    check_seeds,
    each_sampling,
    make_job,
)
from thaw.pool.backends import Factory, choose
from thaw.pool.backends.attached import AttachedBackend
from thaw.pool.backends.base import WorkerSpec
from thaw.pool.round import Round
from thaw.pool.schedule.batch import Batch
from thaw.pool.schedule.captures import Captures
from thaw.pool.schedule.job import JobChunk
from thaw.pool.schedule.monitor import Monitor
from thaw.pool.schedule.planner import Planner
from thaw.pool.schedule.point_loader import PointLoader
from thaw.pool.schedule.rates import Rates
from thaw.pool.schedule.resolver import PointResolver
from thaw.pool.schedule.scheduler import Scheduler
from thaw.pool.session import PoolSession
from thaw.pool.shm.dirs import PoolDirs
from thaw.pool.shm.shared_store import SharedStore
from thaw.pool.snapshot import Snapshot
from thaw.pool.status import FILE, PoolStatus
from thaw.pool.stores import Stores
from thaw.pool.values import BranchResult, LoadPolicy, PoolStats
from thaw.pool.workers.fleet import Fleet
from thaw.pool.workers.reaper import Reaper
from thaw.pool.workers.worker import Incarnation, Worker
from thaw.repo import repository
from thaw.repo.repository import Repository
from thaw.repo.session import Session

MAX_THREADS = 256


class ForkPool:
    """A pool of engines. Safe from any thread; leaving its `with` closes it.

    `engine` is an engine's name (`options` are `load_engine`'s; `workers` of them are booted, in parallel), or engines
    that run already: an `Engine`, an address, an `LLM` or model that `thaw.attach` takes, or a list of these. Those
    stay when the pool closes.

    `repo` (a `Repository`, or a path): where points are named and `result.session.commit` goes.
    `backend`: "process" (each worker a process of its own), "inline" (engines in this process), "ray" or a
    `thaw.cluster.RayCluster` (on the nodes of a Ray cluster), or one that another package provides
    (`thaw.pool.backends`).
    `arena_nbytes`: shared memory for snapshots; what is beyond is spilled to `spill` (default: the temporary folder).
    `policy`: "exact" loads stored KV; "fast" prefills again where that is expected sooner (results say so).
    `snapshot`: see `SnapshotMode`. A worker that dies before a live point was captured takes it along, unless "before".
    `max_batch`: branches that run in a worker at once. `queue_limit`: branches that may wait; `submit` blocks beyond.
    `retries`: how often a branch is begun again when its worker failed. `branch_timeout_s`: for branches without one.
    `stall_s`: a worker whose batch makes no step for so long is killed. `heartbeat_s`: one that answers nothing.
    `policy_version`: the weights' version at boot. `env`: environment of the workers, one mapping or one for each.
    What the backend could not heed (`env` where it starts no process) is refused by name.
    """

    def __init__(
        self,
        engine: str | Engine | Sequence[Any] | Any,
        *,
        workers: int = 1,
        repo: Repository | str | Path | None = None,
        backend: str | Factory = "process",
        arena_nbytes: int = 4 << 30,
        spill: str | Path | None = None,
        policy: LoadPolicy = "exact",
        snapshot: SnapshotMode = "behind",
        max_batch: int = 64,
        queue_limit: int = 4096,
        retries: int = 3,
        branch_timeout_s: float | None = None,
        stall_s: float = 600.0,
        heartbeat_s: float = 60.0,
        boot_timeout_s: float = 900.0,
        residents: int = 32,
        policy_version: str | None = None,
        env: Mapping[str, str] | Sequence[Mapping[str, str]] = (),
        **options: Any,
    ) -> None:
        check_counts(workers=workers, max_batch=max_batch, queue_limit=queue_limit, residents=residents)
        self._policy, self._snapshot, self._timeout_s = check_policy(policy), check_mode(snapshot), branch_timeout_s
        self._max_batch = max_batch
        self._own_repo = None if repo is None or isinstance(repo, Repository) else repository.open(repo, create=True)
        self.repo: Repository | None = repo if isinstance(repo, Repository) else self._own_repo
        self._began, self._closed = time.time_ns(), False
        self._policy_lock = threading.Lock()
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="thaw-pool")
        self._io = ThreadPoolExecutor(4, thread_name_prefix="thaw-pool-io")
        self._reaper = Reaper(self._io)
        self._home = PoolDirs(spill=None if spill is None else Path(spill))
        try:
            spec = WorkerSpec(engine, options, self._home, env, boot_timeout_s, heartbeat_s)
            self._backend, count = choose(spec, workers, backend)
            self._boot(count, arena_nbytes, queue_limit, retries, residents, policy_version, stall_s, heartbeat_s)
        except BaseException:
            self._end()
            raise

    # -- rounds

    def fork(self, point: object, branches: Branches, sampling: object = None, **how: Any) -> list[BranchResult]:
        """`submit(…).result()`: all results, in order. Takes what `submit` takes, and errors="return"."""
        errors = how.pop("errors", "raise")
        return self.submit(point, branches, sampling, **how).result(errors=errors)

    def submit(
        self,
        point: object,
        branches: Branches,
        sampling: object = None,
        *,
        at: int | None = None,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        replay: bool = False,
        policy: LoadPolicy | None = None,
        snapshot: SnapshotMode | None = None,
        spread: int | Literal["auto"] = 1,
        worker: str | None = None,
        timeout_s: float | None = None,
        keep: bool = True,
        store: bool = False,
        block: bool = True,
    ) -> Round:
        """Begin a round: N branches of `point`. Returns at once, unless the queue is full (`block` False: `Busy`).

        `point`: a live session (also one that is decoding), a result or a snapshot of this pool, a point's name in its
        repository (branch, tag, commit, with :turn= or :token=), or token ids. `at`: its first so many tokens.
        `branches`: how many, or for each a prompt, token ids, or a `Branch`. Branch i of a point has the same seed in
        every worker: derived from `seed` (default: the point's own), unless `seeds` or the branch say; `replay` gives
        all the point's own, and goes with none of these. `spread`: over how many workers; "auto" takes as many as the
        planner expects it soonest with (batches then have another shape from round to round, as rates are refitted).
        A round of more than `max_batch` branches goes in batches of so many, to whichever worker is free.
        `worker`: the one to run in, whatever that costs.
        `keep` False: results have no session. `store`: results are snapshotted as they end, so that they outlive their
        worker. `timeout_s`: for each branch, from now on.
        """
        self._check_open()
        wanted = as_branches(branches)
        check_seeds(wanted, seed, seeds, replay)
        where = self._resolver.find(point, at, seed)
        params = each_sampling(sampling, len(wanted))
        limit = self._timeout_s if timeout_s is None else timeout_s
        round_ = Round(len(wanted))
        jobs = [
            make_job(round_, i, branch, params[i], None if seeds is None else seeds[i], limit)
            for i, branch in enumerate(wanted)
        ]
        whole = JobChunk(
            where, jobs, check_policy(policy or self._policy), where.key, check_mode(snapshot or self._snapshot),
            keep or store, store, replay, None if worker is None else self._fleet.named(worker).name,
        )  # fmt: skip
        round_.on_cancel(lambda i: self._scheduler.stop(jobs if i is None else [jobs[i]], "cancel"))
        self._scheduler.submit(self._chunks(whole, spread), block=block)
        self._monitor.wake()
        return round_

    def session(self, point: object = None, *, seed: int | None = None, at: int | None = None) -> PoolSession:
        """A session in one of the workers: an empty one, or one that continues from `point`. A point of the pool.

        `seed`: its own; by default the point's, or for token ids and an empty one a new one."""
        self._check_open()
        if seed is not None:
            check_seed(seed)
        if point is None:
            return self._empty(seed)
        life = self._idlest()
        where = self._resolver.find(point, at, seed)
        if where.held is not None and not where.held.life.over:
            life = where.held.life
        ref, there = self._loader.fork(where, life, self._policy, seed)
        num_kv = life.engine.view(ref).num_kv
        return PoolSession(
            life, ref, kept=there.session.kept.cut(num_kv), parent=where.parent, num_inherited=where.at,
        )  # fmt: skip

    def _empty(self, seed: int | None) -> PoolSession:
        """In the idlest worker; where that ends just then, in another one: nothing was lost with it."""
        while True:
            life = self._idlest()
            try:
                ref = life.engine.open(seed=seed)
            except EngineDied as error:
                self._fleet.failed(self._fleet.named(life.name), life, error)
                continue
            return PoolSession(life, ref)

    def snapshot(self, point: object, *, at: int | None = None) -> Snapshot:
        """Put a live session (or a result) into the arena, so that it outlives its worker. Returns when it is there.

        `at`: only its first tokens. Where more of the session is in the arena already, the snapshot refers to that."""
        self._check_open()
        where = self._resolver.find(point, at)
        if where.plain:
            ref, there = self._loader.fork(where, (life := self._idlest()), self._policy)
            where = self._captures.capture(where, there.session)
            life.forget(ref)
        else:
            where = self._captures.capture(where)
        if where.stored is None:
            raise EngineDied(
                "the session's worker has ended, and with it the KV that only it had; nothing is left of it"
            )
        if where.stored.shared is None:
            raise InvalidRequest("the point is stored in the pool's repository already; fork from it by its name")
        return Snapshot(where.stored.shared, where.at)

    # -- workers

    def add_worker(self, engine: Any = None) -> str:
        """One more worker, ready on return; its name. A pool of attached engines is given the engine."""
        self._check_open()
        if isinstance(self._backend, AttachedBackend):
            if engine is None:
                raise InvalidRequest("this pool joined its engines: give add_worker the one to join")
            self._backend.add(engine)
        elif engine is not None:
            raise InvalidRequest("this pool boots its own engines; add_worker() boots one more like them")
        worker = self._fleet.add()
        self._write_status()
        return worker.name

    def drain(self, name: str) -> None:
        """Give the worker nothing more, wait for its batches, end it. Points of waiting rounds are captured first;
        sessions of results that live there are gone (take snapshots of those that matter)."""
        self._check_open()
        worker = self._fleet.named(name)
        self._fleet.drain(worker, self._rescues)
        self._write_status()

    def set_policy(
        self,
        version: str,
        *,
        update: str | Callable[[Engine], object] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """From here on every worker runs policy `version`, and KV of another is never served.

        Waits for the batches that run; those that wait go on under the new policy (a live or stored point of the old
        one is then refused by name; plain tokens are prefilled anew). `update` brings the weights: a function that is
        called with each engine, or "module:function" to run it in the workers' own processes, with `arguments`; where
        they are such, a function is refused and nothing is changed. Workers that are restarted later get the same. One
        at which it fails is not used any more.
        """
        self._check_open()
        self._backend.check_update(update)
        with self._policy_lock:  # of two at once the first to be done would let batches go on in the other
            self._scheduler.pause()
            try:
                self._fleet.set_policy((version, update, dict(arguments or {})))
                self._captures.forget_prompts()
            finally:
                self._scheduler.go_on()

    @property
    def policy_version(self) -> str:
        return self._fleet.policy_version or "0"

    @property
    def info(self) -> EngineInfo:
        """Of the engine that the workers run."""
        return self._info

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        """Token ids of `text`, as the workers' tokenizer makes them. `first`: at the start of a session."""
        return self._idlest().engine.codec.encode(text, first=first)

    def render_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True,
        tools: Sequence[Message] | None = None, chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[int]:  # fmt: skip
        """Token ids of a conversation, by the model's own chat template: a point to fork from."""
        codec = self._idlest().engine.codec
        return codec.render_chat(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=chat_template_kwargs
        )

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._idlest().engine.codec.decode(token_ids, skip_special_tokens=skip_special_tokens)

    # -- looking

    @property
    def workers(self) -> tuple[str, ...]:
        """Names of the workers that are ready."""
        return tuple(worker.name for worker, _ in self._fleet.ready())

    def stats(self) -> PoolStats:
        arena, rates = self._arena.stats(), self._rates.summary()
        with self._changed:  # what workers and queues count is of one moment
            return PoolStats(
                workers=self._fleet.stats(), arena=arena, waiting=self._scheduler.waiting,
                running=sum(len(chunk.jobs) for chunk in self._scheduler.running),
                num_rounds=self._scheduler.num_rounds, num_branches=self._scheduler.num_branches,
                num_retries=self._scheduler.num_retries, policy_version=self.policy_version, rates=rates,
            )  # fmt: skip

    def close(self) -> None:
        """End the pool: rounds under way fail, workers of its own end, the arena is removed. Closing twice is fine."""
        if not self._closed:
            self._closed = True
            self._end()

    def __enter__(self) -> ForkPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- wiring

    def _boot(
        self, count: int, arena_nbytes: int, queue_limit: int, retries: int, residents: int, version: str | None,
        stall_s: float, heartbeat_s: float,
    ) -> None:  # fmt: skip
        self._changed = threading.Condition()
        self._arena = SharedStore(self._home.path / "arena", self._home.spill, arena_nbytes)
        stores = Stores(self._arena, None if self.repo is None else self.repo.store)
        self._fleet = Fleet(
            self._backend, stores, changed=self._changed, threads=self._threads, reaper=self._reaper,
            residents=residents, policy_version=version,
        )  # fmt: skip
        self._fleet.start(count)
        life = self._fleet.ready()[0][1]
        self._info = life.engine.info
        if version not in (None, life.engine.policy_version):
            raise InvalidRequest(
                f"policy_version={version!r}: the engine that was joined runs policy {life.engine.policy_version!r}. "
                f"Leave policy_version out, or call pool.set_policy({version!r}) once the pool is made"
            )
        self._fleet.policy_version = life.engine.policy_version
        self._rates = Rates(self._info.name, self._info.model, self._info.device, cache_dir())
        self._rates.booted(life.host.boot_s)
        token_nbytes = cache.token_nbytes(self._info.groups)
        self._planner = Planner(self._rates, token_nbytes)
        self._captures = Captures(self._arena, token_nbytes)
        self._resolver = PointResolver(stores, self._captures, self.repo, self._life_of, lambda: self.policy_version)
        self._loader = PointLoader(stores, self._captures, self._planner)
        batch = Batch(self._loader, self._captures, self._resolver, self._rates, self._beside)
        self._scheduler = Scheduler(
            self._fleet, batch, self._planner, self._captures, changed=self._changed, threads=self._threads,
            max_batch=self._max_batch, queue_limit=queue_limit, retries=retries,
        )  # fmt: skip
        self._written = 0.0
        self._monitor = Monitor(self._scheduler, self._fleet, stall_s=stall_s, heartbeat_s=heartbeat_s, tick=self._tick)
        self._write_status()

    def _end(self) -> None:
        for part in ("_monitor", "_scheduler", "_fleet"):
            if hasattr(self, part):
                getattr(self, part).close()
        self._threads.shutdown(wait=True)  # a chunk that waits for a thread is answered by its own run
        self._reaper.end()
        self._io.shutdown(wait=True, cancel_futures=True)
        if hasattr(self, "_rates"):
            self._rates.save()
        if hasattr(self, "_arena"):
            self._arena.close()
        if self._own_repo is not None:
            self._own_repo.close()
        self._home.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineDied("the pool is closed; make another one")

    def _life_of(self, session: Session) -> Incarnation | None:
        return session.life if isinstance(session, PoolSession) else self._fleet.life_of(session.engine)

    def _idlest(self) -> Incarnation:
        """The ready life that runs least; waits while all are booting."""
        with self._changed:
            self._changed.wait_for(lambda: self._fleet.ready() or self._fleet.hopeless())
            ready: list[tuple[Worker, Incarnation]] = self._fleet.ready()
        if not ready:
            raise EngineDied("the pool has no worker left; look into their errors (stats), or add one")
        return min(ready, key=lambda pair: pair[0].running)[1]

    def _chunks(self, whole: JobChunk, spread: int | Literal["auto"]) -> list[JobChunk]:
        """The round in chunks: one for each worker that it is spread over, none larger than `max_batch`."""
        if spread != "auto" and (not isinstance(spread, int) or spread < 1):
            raise InvalidRequest(f"spread={spread!r}: must be 'auto', or at least 1 worker")
        count = len(whole.jobs)
        tokens = max(job.sampling.max_tokens for job in whole.jobs)
        lives = [life for _, life in self._fleet.ready()]
        wide = (
            self._planner.spread(self._captures.now(whole.point), count, tokens, lives) if spread == "auto" else spread
        )
        whole.taken = set() if wide > 1 else None
        return whole.split(min(self._max_batch, -(-count // wide)))

    def _beside(self, life: Incarnation, capture: Callable[[], object]) -> None:
        """Run a capture that no branch waits for; what it cannot do is done when it is needed."""

        def run() -> None:
            with contextlib.suppress(ThawError):
                counted()

        counted = self._fleet.beside(life, capture)
        with contextlib.suppress(RuntimeError):
            self._io.submit(run)

    def _rescues(self, life: Incarnation) -> list[Callable[[], object]]:
        """A capture of each point that an unanswered round forks from and that lives in `life` alone."""
        points = {chunk.point for chunk in self._scheduler.chunks_under_way() if chunk.point.lives_in(life)}
        alone = [point for point in points if self._captures.now(point).stored is None]
        return [functools.partial(self._captures.capture, point) for point in alone]

    def _tick(self) -> None:
        if time.monotonic() - self._written > 2.0:
            self._write_status()

    def _write_status(self) -> None:
        """What `thaw pool status` reads: counts alone, no text and no tokens."""
        self._written = time.monotonic()
        with contextlib.suppress(OSError, ThawError):
            found = PoolStatus(
                pid=os.getpid(), began_ns=self._began, engine=self._info.name, model=Path(self._info.model).name,
                device=self._info.device, stats=self.stats(),
            )  # fmt: skip
            write_atomic(self._home.path / FILE, msgspec.json.encode(found))
