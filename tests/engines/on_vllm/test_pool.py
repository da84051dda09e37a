"""A pool of real vLLMs: two engines, each with its own processes, one arena."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import thaw
from thaw import Sampling
from thaw.pool import Branch, BranchResult, ForkPool, PoolSession
from thaw.store.leases import start_time
from thaw.testing.pool_soak import disturb, undisturbed

pytest.importorskip("vllm")

SAMPLING = Sampling(temperature=0.9, max_tokens=24, ignore_eos=True)
PROMPTS = ["Why?", "How?", "Who?", "When?"]


@pytest.fixture(scope="module")
def pool(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkPool]:
    folder = tiny_model("llama", dtype="bfloat16", head_dim=64)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("THAW_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        with ForkPool(
            "vllm", workers=2, model=str(folder), enforce_eager=True, max_model_len=2048, retries=6, stall_s=240,
            heartbeat_s=120, arena_nbytes=1 << 28,
        ) as made:  # fmt: skip
            yield made


@pytest.fixture(scope="module")
def trunk(pool: ForkPool) -> PoolSession:
    session = pool.session(seed=7)
    session.append("A document that every branch needs, told at some length. " * 14)
    return session


def bits(results: list[BranchResult]) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
    return [(result.token_ids, tuple(value.hex() for value in result.logprobs)) for result in results]


def test_a_second_worker_goes_on_from_the_arena_with_the_first_ones_bits(pool: ForkPool, trunk: PoolSession) -> None:
    first = pool.fork(trunk, PROMPTS, SAMPLING)
    again = pool.fork(trunk, PROMPTS, SAMPLING)
    assert bits(first) == bits(again)
    other = next(name for name in pool.workers if name != trunk.worker)
    second = pool.fork(trunk, PROMPTS, SAMPLING, worker=other)
    assert {result.worker for result in second} == {other}
    assert bits(second) == bits(first)
    for result in second:
        assert result.restore is not None and result.restore.hit and result.restore.num_recomputed_tokens == 0
        assert result.num_cached_tokens >= trunk.num_tokens - 1, "vLLM counted all of the point as cached"
    for result in first:
        assert result.num_cached_tokens >= trunk.num_tokens - 1


def test_the_point_is_the_branches_own_kv(pool: ForkPool, trunk: PoolSession) -> None:
    """The control: from a point one token shorter the same branches give other bits."""
    whole = pool.fork(trunk, PROMPTS, SAMPLING, seeds=[1, 2, 3, 4])
    shorter = pool.fork(trunk, PROMPTS, SAMPLING, seeds=[1, 2, 3, 4], at=trunk.num_tokens - 1)
    assert all(a != b for a, b in zip(bits(whole), bits(shorter), strict=True))


def test_a_session_that_is_decoding_is_a_point(pool: ForkPool, trunk: PoolSession) -> None:
    session = pool.fork(trunk, 1, SAMPLING)[0].session
    assert session is not None
    stream = session.stream("Go on.", Sampling(temperature=0.9, max_tokens=600, ignore_eos=True))
    for delta in stream:
        if delta.token_ids:
            break
    result = pool.fork(session, [Branch(resume=True)], replay=True)[0]
    parent = stream.result()
    assert result.attempts == 1 and len(result.token_ids) == len(parent.token_ids) == 600
    assert result.token_ids[0] == parent.token_ids[0], "what it had when it was forked; then both run in one batch"
    assert result.trajectory.prompt_ids == session.trajectory().prompt_ids
    assert result.num_cached_tokens >= len(result.trajectory.prompt_ids) - 1, "nothing was prefilled again"


@pytest.mark.timeout(1800)
def test_kill_9_in_the_middle_of_a_round_loses_nothing(pool: ForkPool, trunk: PoolSession) -> None:
    sampling = Sampling(temperature=0.9, max_tokens=1000, ignore_eos=True)
    undisturbed_ = pool.fork(trunk, PROMPTS, sampling, snapshot="before")
    round_ = pool.submit(trunk, PROMPTS, sampling)
    for delta in round_:
        if delta.token_ids:
            break
    busy = next(worker for worker in pool.stats().workers if worker.running)
    assert busy.pid is not None
    os.kill(busy.pid, signal.SIGKILL)
    results = round_.result(1500)
    assert bits(results) == bits(undisturbed_)
    assert {result.attempts for result in results} == {2}
    ends = time.monotonic() + 60
    while start_time(busy.pid) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not start_time(busy.pid), "the killed worker's processes are gone"


@pytest.mark.timeout(1800)
def test_three_disturbed_rounds_give_what_undisturbed_ones_give(pool: ForkPool, trunk: PoolSession) -> None:
    points = [pool.snapshot(trunk, at=n) for n in (300, 400)]
    reference = undisturbed(pool, points, 4, SAMPLING)
    harms = ("kill", "cancel", "none")
    soak = disturb(pool, points, reference, SAMPLING, rounds=3, seed=3, harms=harms, logprobs=False)
    assert not soak.wrong, soak.wrong
    assert soak.counts["answered twice"] == 0 and soak.counts["equal"] + soak.counts["cancelled"] == 12


def test_no_kv_of_an_old_policy_is_served(pool: ForkPool) -> None:
    session = pool.session(seed=1)
    session.append("Read under the first policy. " * 8)
    ids = list(session.tokens)
    snapshot = pool.snapshot(session)
    pool.set_policy("1")
    for stale in (session, snapshot):
        with pytest.raises(thaw.ThawError, match="policy"):
            pool.fork(stale, 1, SAMPLING)
    result = pool.fork(ids, 1, SAMPLING)[0]
    assert result.decision is not None and result.decision.num_prefilled_tokens == len(ids)
    assert set(result.trajectory.policy_versions) == {"1"}


@pytest.mark.soak(
    "twenty rounds with kills",
    receipt="pool-soak-vllm",
    covers=("src/thaw/pool", "src/thaw/engines/vllm", "src/thaw/engines/served", "src/thaw/data"),
)
@pytest.mark.skipif(not os.environ.get("THAW_SOAK"), reason="set THAW_SOAK=1 (or `make soak`)")
@pytest.mark.timeout(3 * 3600)
def test_twenty_disturbed_rounds(pool: ForkPool, soak_receipt: Callable[..., None]) -> None:
    seed = random.getrandbits(30)
    session = pool.session(seed=9)
    session.append("A document for the soak. " * 20)
    points = [pool.snapshot(session), pool.snapshot(session, at=200)]
    reference = undisturbed(pool, points, 4, SAMPLING)
    harms = ("kill", "cancel", "none", "none")
    soak = disturb(pool, points, reference, SAMPLING, rounds=20, seed=seed, harms=harms, logprobs=False)
    assert not soak.wrong, soak.wrong
    assert soak.counts["answered twice"] == 0 and soak.counts["equal"] + soak.counts["cancelled"] == 80
    soak_receipt(
        what="20 rounds of 4 branches in a pool of 2 vLLMs under random kill -9 and cancels",
        held="every branch that was not cancelled came once, with the tokens of the undisturbed run",
        seed=seed, counts=soak.counts,
    )  # fmt: skip
