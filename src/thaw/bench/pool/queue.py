"""Many points at once on few workers: who waits how long. Each point's round is one row of the arm `queue`."""

from __future__ import annotations

import os
import time

from thaw.bench.pool.options import PoolBenchOptions
from thaw.bench.rounds import Rounds
from thaw.bench.sample import Sample
from thaw.bench.vllm.arms import Document
from thaw.core.sampling import Sampling
from thaw.engines.registry import kind_of
from thaw.pool import ForkPool, Round
from thaw.receipt.statistics import median, percentile


def own_cores(options: PoolBenchOptions, workers: int) -> list[dict[str, str]]:
    """The environment of each worker: cores of its own, where there are enough and its engine can be kept to them."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // workers
    if not share or options.engine_options.get("tensor_parallel_size", 1) != 1:
        return [{}] * workers
    return [kind_of(options.engine).on_cores(cores[i * share : (i + 1) * share]) for i in range(workers)]


def measure(rounds: Rounds, options: PoolBenchOptions, pool: ForkPool, document: Document) -> None:
    """All rounds are submitted at once; a row's values are seconds from then."""
    points = []
    for number in range(options.points):
        rounds.progress(f"reading point {number + 1} of {options.points}")
        session = pool.session(seed=options.seed + number)
        session.append(token_ids=document.session(options.queue_trunk, number))
        points.append(session)
    rounds.progress(f"{options.points} points of {options.queue_branches} branches at once")
    sampling = Sampling(temperature=0.0, max_tokens=options.queue_tokens, ignore_eos=True)
    began = time.perf_counter()
    running = [pool.submit(point, options.queue_branches, sampling, keep=False, snapshot="before") for point in points]
    for number, round_ in enumerate(running):
        rounds.measured["queue"].append((number, _row(round_, began)))


def _row(round_: Round, began: float) -> Sample:
    results = round_.result()
    offset = round_.submitted - began
    ends = sorted(offset + result.timings.total_s for result in results)
    waits = [offset + result.timings.queue_s for result in results]
    return Sample(
        values={
            "first_start_s": min(waits), "last_start_s": max(waits), "first_end_s": ends[0],
            "median_end_s": median(ends), "p95_end_s": percentile(ends, 95),
            "last_end_s": ends[-1],
            "branches": float(len(results)), "attempts": float(max(result.attempts for result in results)),
            "workers": float(len({result.worker for result in results})),
        }
    )  # fmt: skip
