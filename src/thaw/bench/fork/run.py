"""The run: make a session, measure every arm in turn, round by round, and seal the receipt.

Everything is made in a temporary folder, which is removed, also when the run is interrupted. Nothing is printed:
`progress` is told what is being done.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

from thaw import receipt as r
from thaw.bench import text
from thaw.bench.fork import disk, fresh, memory, report
from thaw.bench.fork.fresh import FreshJob
from thaw.bench.fork.options import SUFFIX_TOKENS, SUFFIXES, ForkBenchOptions
from thaw.bench.fork.warm import Stock, Warm
from thaw.bench.rounds import Progress, Rounds, Thunk
from thaw.bench.sample import Ask, Sample
from thaw.bench.subject import accelerator, model_of, numerics
from thaw.core.errors import InvalidRequest
from thaw.core.prefix import WINDOW
from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.receipt.machine import software, this_machine
from thaw.repo import Session
from thaw.repo import open as open_repository


def run(options: ForkBenchOptions, progress: Progress = lambda _: None) -> r.Receipt:
    """Measure, and return the receipt. Raises `InvalidRequest` for a session that does not fit, and what arms raise."""
    progress("booting the engine")
    with (
        tempfile.TemporaryDirectory(prefix="thaw-bench-", dir=options.folder) as folder,
        load_engine(options.engine, **options.engine_options) as engine,
        open_repository(Path(folder) / "repo", engine=engine, create=True) as repo,
    ):
        progress("hashing the model")
        engine.identity()
        with repo.session(seed=options.seed) as live:
            progress(f"reading {options.num_tokens} tokens once")
            live.append(token_ids=_tokens(engine, options))
            commit = live.commit("the session that is forked", branch="trunk").commit
            warm = Warm(engine, repo, live, repo.resolve(commit), options.seed)
            bench = _Bench(options, progress, warm, Path(folder))
            bench.rounds()
            bench.storage(live)
            return _seal(options, engine, live, bench.measured)


class _Bench(Rounds):
    """The rounds of a run, collected by arm."""

    def __init__(self, options: ForkBenchOptions, progress: Progress, warm: Warm, folder: Path) -> None:
        super().__init__(progress)
        self.options, self.warm, self.folder = options, warm, folder
        self.stock = _stock(options) if options.stock else None
        suffixes = _suffixes(warm.engine, options.children)
        self.asks = (
            Ask(n=1, suffixes=suffixes, max_tokens=1),
            Ask(n=options.children, suffixes=suffixes, max_tokens=options.child_tokens),
        )

    def rounds(self) -> None:
        self.progress("warming up")
        for thunk in self._warm_arms().values():
            thunk()
        for pair in range(self.options.rounds):
            arms = self._warm_arms()
            if pair < self.options.fresh_rounds:
                arms |= self._fresh_arms()
            self._round(pair, arms)

    def _round(self, pair: int, arms: dict[str, Thunk]) -> None:
        self.take(pair, self.options.rounds, arms)

    def _warm_arms(self) -> dict[str, Thunk]:
        warm, out = self.warm, {}
        for method, measure in (
            ("prefill-warm", warm.prefill),
            ("live", warm.live_fork),
            ("hydrate-warm", warm.hydrate),
        ):
            for ask in self.asks:
                out[f"{method}.{ask.n}"] = _later(measure, ask)
        one = self.asks[0]
        out["hydrate-cold.1"] = _later(warm.hydrate_cold, one)
        stock: Stock | None = self.stock
        if stock is not None:
            out["prefill-stock.1"] = _later(lambda ask: warm.stock_prefill(stock, ask), one)
        return out

    def _fresh_arms(self) -> dict[str, Thunk]:
        out = {}
        for ask in self.asks:
            out[f"hydrate-fresh.{ask.n}"] = _later(self._hydrate_fresh, ask)
            out[f"prefill-fresh.{ask.n}"] = _later(self._prefill_fresh, ask)
        return out

    def _hydrate_fresh(self, ask: Ask) -> Sample:
        return fresh.run(self._job("hydrate", ask=ask), self.options.process_timeout_s)

    def _prefill_fresh(self, ask: Ask) -> Sample:
        job = self._job("prefill", ask=ask, tokens=self.warm.tokens)
        return fresh.run(job, self.options.process_timeout_s)

    def _job(self, what: str, **others: object) -> FreshJob:
        common = {
            "engine": self.options.engine, "engine_options": self.options.engine_options, "seed": self.options.seed,
            "repository": str(self.warm.repo.path), "commit": self.warm.point.commit,
        }  # fmt: skip
        return FreshJob(what=what, **common, **others)  # type: ignore[arg-type]

    def storage(self, live: Session) -> None:
        """Writes, reads, memory and the size of forks, after the rounds: they change what is in the repository."""
        folder = self.folder / "writes"
        data = memoryview(max(self.warm.packs, key=lambda pack: pack.stat().st_size).read_bytes())
        writes: dict[str, Thunk] = {
            "commit-write": lambda: disk.capture(self.warm.engine, live, folder),
            "plain-write": lambda: disk.plain_write(data, folder),
        }
        reads: dict[str, Thunk] = {
            "hydrate-read": lambda: self.warm.cold_read(self.asks[0]),
            "plain-read": self.warm.plain_read,
        }
        for arms in (writes, reads):
            for thunk in arms.values():
                thunk()
            for pair in range(self.options.rounds):
                self._round(pair, arms)
        self.progress("writing and reading packs and plain files")
        nbytes = int(self.measured["commit-write"][0][1].values["write_nbytes"])
        for name, samples in disk.packs_against_files(folder, nbytes, self.options.rounds).items():
            self.measured[name] = list(enumerate(samples))
        lengths = _lengths(self.warm.num_kv)
        if memory.is_measurable() and lengths is not None:
            job = self._job("memory", lengths=lengths)
            for pair in range(self.options.fresh_rounds):
                self._round(pair, {"memory": lambda: fresh.run(job, self.options.process_timeout_s)})
        if self.options.disk_children:
            n, num_tokens = self.options.disk_children, self.options.disk_tokens
            self.progress(f"forking {n} × {num_tokens} tokens to disk")
            self.measured["disk"].append((0, disk.forks(self.warm.repo, live, n, num_tokens)))


def _later(measure: Callable[[Ask], Sample], ask: Ask) -> Thunk:
    return lambda: measure(ask)


def _stock(options: ForkBenchOptions) -> Stock | None:
    """The model's own prefill, where the engine's package brings one."""
    name = f"thaw.engines.{options.engine}"
    if importlib.util.find_spec(name) is None or importlib.util.find_spec(f"{name}.stock") is None:
        return None
    stock: Stock = importlib.import_module(f"{name}.stock").load(**options.engine_options)
    return stock


def _tokens(engine: Engine, options: ForkBenchOptions) -> list[int]:
    document = options.document or text.document(options.num_tokens // 4)
    tokens = engine.codec.encode(document, first=True)[: options.num_tokens]
    room = engine.info.max_model_len - SUFFIX_TOKENS - max(options.child_tokens, options.disk_tokens)
    if not 2 * SUFFIX_TOKENS < len(tokens) <= room:
        raise InvalidRequest(
            f"the document gives {len(tokens)} tokens; the model has room for {room} before the children's. "
            "Choose another document or fewer tokens."
        )
    return tokens


def _suffixes(engine: Engine, n: int) -> tuple[tuple[int, ...], ...]:
    """What each child is asked: at most `SUFFIX_TOKENS` tokens."""
    return tuple(
        tuple(engine.codec.encode(" " + SUFFIXES[i % len(SUFFIXES)], first=False)[:SUFFIX_TOKENS]) for i in range(n)
    )


def _lengths(num_kv: int) -> tuple[int, int] | None:
    """Two lengths in whole windows, one about four times the other; None for a session too short for that."""
    windows = (num_kv - 1) // WINDOW
    return (max(windows // 4, 1) * WINDOW, windows * WINDOW) if windows >= 2 else None


def _seal(options: ForkBenchOptions, engine: Engine, live: Session, measured: report.Measured) -> r.Receipt:
    info, model = engine.info, model_of(engine)
    numbers, arms = report.derived(measured, options.children), report.arms(measured)
    packages = software("torch", "transformers", "safetensors", "msgspec", "blake3")
    return r.make(
        kind="bench.fork",
        command=options.command_line(model.name),
        versions={**packages, "engine": f"{info.name} {info.version}"},
        machine=this_machine(accelerator(info)),
        model=model,
        parameters=_parameters(options, engine, live),
        arms=arms,
        derived=numbers,
        checks=report.checks(measured, options.children),
        goals=report.goals(numbers, options.children) if options.goals else (),
        notes=report.NOTES,
    )


def _parameters(options: ForkBenchOptions, engine: Engine, live: Session) -> dict[str, r.format.Scalar]:
    return {
        "engine": engine.info.name, "device": engine.info.device, "continuation": engine.info.continuation,
        "num_tokens": live.num_tokens, "num_kv": live.num_kv, "children": options.children,
        "child_tokens": options.child_tokens, "suffix_tokens": SUFFIX_TOKENS, "rounds": options.rounds,
        "fresh_rounds": options.fresh_rounds, "disk_children": options.disk_children,
        "disk_tokens": options.disk_tokens, "seed": options.seed, "temperature": 1.0,
        **numerics(engine.info),
    }  # fmt: skip
