"""The arms of a round: the pool in the worker that has the trunk, in one that has not, and the engine by itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from thaw.bench.pool import inside
from thaw.bench.sample import Sample, _digest, tokens_digest
from thaw.core.errors import EngineDied
from thaw.core.sampling import Sampling
from thaw.pool import Branch, BranchResult, ForkPool, Round
from thaw.pool.values import LoadPolicy
from thaw.pool.workers.worker import Incarnation
from thaw.receipt import Hits

INSIDE = inside.__name__


def life_of(pool: ForkPool, name: str) -> Incarnation:
    found = pool._fleet.named(name).life
    if found is None:
        raise EngineDied(f"{name} ended during the bench: {pool._fleet.named(name).last_error}")
    return found


def ask_inside(pool: ForkPool, worker: str, function: str, **arguments: Any) -> Any:
    """Run one of `inside`'s functions in the worker's process."""
    return life_of(pool, worker).host.invoke(f"{INSIDE}:{function}", arguments)


def pool_round(
    pool: ForkPool, point: object, suffixes: Sequence[Sequence[int]], max_tokens: int, *, worker: str,
    num_wanted: int, at: int | None = None, forget: bool = False, policy: LoadPolicy = "exact",
) -> Sample:  # fmt: skip
    """A round in `worker`, timed from the call to the last result. `forget`: the worker first releases every point
    that it holds, so that the round has to load (or, with policy "fast", to prefill)."""
    if forget:
        life_of(pool, worker).drop_all()
    branches = [Branch(token_ids=tuple(ids)) for ids in suffixes]
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    began = time.monotonic()
    round_ = pool.submit(point, branches, sampling, worker=worker, at=at, keep=False, policy=policy)
    first_s = _until_all_began(round_, began)
    results = round_.result()
    total_s = time.monotonic() - began
    return Sample(
        values={"first_token_s": first_s, "total_s": total_s, "nbytes": float(_decision(results).nbytes)},
        stages_s=stages(results),
        hits=hits(results, num_wanted),
        outputs=outputs(results),
    )


def native(
    pool: ForkPool, worker: str, name: str, suffixes: Sequence[Sequence[int]], max_tokens: int, num_wanted: int
) -> Sample:
    found = ask_inside(
        pool, worker, "native", name=name, suffixes=suffixes, max_tokens=max_tokens, num_wanted=num_wanted
    )
    return as_sample(found)


def again(
    pool: ForkPool, worker: str, trunk: Sequence[int], suffixes: Sequence[Sequence[int]], max_tokens: int
) -> Sample:
    return as_sample(ask_inside(pool, worker, "again", trunk=trunk, suffixes=suffixes, max_tokens=max_tokens))


def as_sample(found: dict[str, Any]) -> Sample:
    return Sample(
        values={"first_token_s": found["first_token_s"], "total_s": found["total_s"]},
        stages_s={"first_token": found["first_token_s"], "decode": found["total_s"] - found["first_token_s"]},
        hits=Hits(
            num_prompt_tokens=found["prompt"], num_wanted_tokens=found["wanted"], num_cached_tokens=found["cached"],
            num_prefilled_tokens=found["prefilled"],
        ),
        outputs={"tokens": found["tokens"]},
    )  # fmt: skip


def stages(results: Sequence[BranchResult]) -> dict[str, float]:
    """Of the branch that took longest."""
    slowest = max(results, key=lambda result: result.timings.total_s).timings
    return {
        "queue": slowest.queue_s, "capture": slowest.capture_s, "hydrate": slowest.hydrate_s, "fork": slowest.fork_s,
        "first_token": slowest.ttft_s, "decode": slowest.decode_s,
        "transfer": max(0.0, slowest.prepare_s - slowest.capture_s - slowest.hydrate_s),
    }  # fmt: skip


def hits(results: Sequence[BranchResult], num_wanted: int) -> Hits:
    usages = [result.usage for result in results if result.usage is not None]
    decision = _decision(results)
    return Hits(
        num_prompt_tokens=sum(usage.num_prompt_tokens for usage in usages),
        num_wanted_tokens=num_wanted * len(usages),
        num_cached_tokens=sum(usage.num_cached_tokens for usage in usages),
        num_prefilled_tokens=decision.num_prefilled_tokens + sum(usage.num_prefilled_tokens for usage in usages),
    )


def outputs(results: Sequence[BranchResult]) -> dict[str, str]:
    return {
        "first_tokens": tokens_digest([result.token_ids[:1] for result in results]),
        "first_logprobs": _digest("d", [result.logprobs[:1] for result in results]),
        "tokens": tokens_digest([result.token_ids for result in results]),
        "logprobs": _digest("d", [result.logprobs for result in results]),
    }


def _decision(results: Sequence[BranchResult]) -> Any:
    assert results[0].decision is not None
    return results[0].decision


def _until_all_began(round_: Round, began: float) -> float:
    waiting = set(range(len(round_)))
    for delta in round_:
        if delta.token_ids:
            waiting.discard(delta.index)
        if not waiting:
            break
    return time.monotonic() - began
