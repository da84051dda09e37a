"""More points than the worker's engine has blocks for, and rounds from each in turn: the pool against vLLM's own cache.

A pass reads all points, with a round from each right after it was read (`…first`), then sweeps through them in an order
that is reshuffled each time, the same in both arms. A row is a sweep: the median and the 95th percentile of its
rounds' seconds to the first tokens, and `recomputed`, what the engine prefilled of tokens that were prefilled before;
of vLLM's own only full blocks are asked for, which is what its cache holds.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from thaw.bench.pool import arms
from thaw.bench.pool.options import PoolBenchOptions
from thaw.bench.rounds import Rounds
from thaw.bench.sample import Sample
from thaw.bench.vllm.arms import Document
from thaw.bench.vllm.pressure import with_recomputed
from thaw.core.ids import digest
from thaw.pool import ForkPool
from thaw.receipt import Hits
from thaw.receipt.statistics import median, percentile

Visit = Callable[[], Sample]
Make = Callable[[ExitStack, int], Visit]
"""Read point number i; the round that is measured. What has to be released goes on the stack."""


def measure(rounds: Rounds, options: PoolBenchOptions, pool: ForkPool, document: Document) -> None:
    worker, asked = pool.workers[0], document.suffixes(options.pressure_branches)
    tokens, trunk_tokens = options.pressure_tokens, options.pressure_trunk
    full_blocks = trunk_tokens // options.block_size * options.block_size

    def of_pool(stack: ExitStack, number: int) -> Visit:
        session = stack.enter_context(pool.session(seed=options.seed))
        session.append(token_ids=document.session(trunk_tokens, number))
        return lambda: arms.pool_round(pool, session, asked, tokens, worker=worker, num_wanted=session.num_kv)

    def of_engine(stack: ExitStack, number: int) -> Visit:
        name = secrets.token_hex(8)
        arms.ask_inside(pool, worker, "read", name=name, trunk=document.session(trunk_tokens, number))
        stack.callback(arms.ask_inside, pool, worker, "forget", name=name)
        return lambda: arms.native(pool, worker, name, asked, tokens, full_blocks)

    makes = {"pressure": of_pool, "pressure-native": of_engine}
    _warm_up(rounds, makes)
    for number in range(options.pressure_rounds):
        for name in sorted(makes, reverse=bool(number % 2)):
            with ExitStack() as stack:
                _pass(rounds, options, name, number, makes[name], stack)


def _warm_up(rounds: Rounds, makes: Mapping[str, Make]) -> None:
    rounds.progress("warming up: pressure")
    for make in makes.values():
        with ExitStack() as stack:
            visit = make(stack, 0)
            visit()
            visit()


def _pass(rounds: Rounds, options: PoolBenchOptions, name: str, number: int, make: Make, stack: ExitStack) -> None:
    visits, firsts, all_points = [], {}, range(options.pressure_points)
    for point in all_points:
        rounds.progress(f"{name}, pass {number + 1}: reading point {point + 1} of {options.pressure_points}")
        visits.append(make(stack, point))
        firsts[point] = visits[point]()
    first_pair = number * options.pressure_returns
    rounds.measured[f"{name}-first"].append((first_pair, _row(firsts)))
    dice = random.Random(number)
    for sweep in range(options.pressure_returns):
        rounds.progress(f"{name}, pass {number + 1}: return {sweep + 1} of {options.pressure_returns} to every point")
        order = dice.sample(all_points, len(all_points))
        returns = {point: with_recomputed(visits[point]()) for point in order}
        rounds.measured[name].append((first_pair + sweep, _row(returns)))


def _row(visits: Mapping[int, Sample]) -> Sample:
    samples = [visits[point] for point in sorted(visits)]
    seconds = [sample.values["first_token_s"] for sample in samples]
    return Sample(
        values={
            "p50_first_s": median(seconds), "p95_first_s": percentile(seconds, 95),
            "recomputed": sum(sample.values.get("recomputed", 0.0) for sample in samples),
        },
        hits=_sum([sample.hits for sample in samples if sample.hits is not None]),
        outputs={name: digest("".join(s.outputs[name] for s in samples).encode()) for name in samples[0].outputs},
    )  # fmt: skip


def _sum(hits: Sequence[Hits]) -> Hits:
    return Hits(
        num_prompt_tokens=sum(hit.num_prompt_tokens for hit in hits),
        num_wanted_tokens=sum(hit.num_wanted_tokens for hit in hits),
        num_cached_tokens=sum(hit.num_cached_tokens for hit in hits),
        num_prefilled_tokens=sum(hit.num_prefilled_tokens for hit in hits),
    )
