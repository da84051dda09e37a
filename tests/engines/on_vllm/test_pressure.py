"""A small KV pool, cycled again and again: nothing is lost, nothing leaks, and one failure is one request's."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from thaw.core.errors import BadSampling, InvalidRequest, NotFound
from thaw.engines import load_engine
from thaw.engines.base import SessionRef
from thaw.testing.laws.kit import LIMIT_S, Lab, greedy, same, seeded
from thaw.testing.plans import mount_at

pytest.importorskip("vllm")

from thaw.engines.vllm.client.engine import VllmEngine

BLOCKS = 24
OPERATIONS = int(os.environ.get("THAW_VLLM_OPERATIONS", "1000" if os.environ.get("THAW_SOAK") else "200"))
KINDS = (
    "open", "turn and its replay", "fork", "fork inside", "capture and hydrate", "cancel", "turn of three children"
)  # fmt: skip


@pytest.fixture(scope="module", params=[1 << 20, 1 << 40], ids=["loads in the background", "loads in step"])
def engine(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Iterator[VllmEngine]:
    model = str(tiny_model("llama", dtype="bfloat16", head_dim=64))
    with load_engine(
        "vllm", model=model, enforce_eager=True, max_model_len=2048, num_gpu_blocks_override=BLOCKS,
        async_nbytes=request.param,
    ) as loaded:  # fmt: skip
        assert isinstance(loaded, VllmEngine)
        yield loaded


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


def cycle(engine: VllmEngine, lab: Lab) -> None:
    """Other sessions' prompts through the whole pool, three times over."""
    for start in range(100, 106):
        engine.close_session(lab.begin(engine, 1500, start=start))


def test_an_idle_session_survives_the_pool_being_cycled(engine: VllmEngine, lab: Lab) -> None:
    session = lab.begin(engine, 1500)
    expected = lab.one(engine, lab.twin(engine, session), seeded(12))
    cycle(engine, lab)
    again = lab.one(engine, lab.twin(engine, session), seeded(12))
    same(expected, again)
    assert again.num_cached_tokens == 1499


def test_children_that_come_back_together_are_loaded_once_and_share(engine: VllmEngine, lab: Lab) -> None:
    session = lab.begin(engine, 1500)
    expected = lab.run(engine, *(lab.twin(engine, session) for _ in range(4)), sampling=greedy(8))
    cycle(engine, lab)
    before = engine.stats()
    again = lab.run(engine, *(lab.twin(engine, session) for _ in range(4)), sampling=greedy(8))
    for one, two in zip(expected, again, strict=True):
        same(one, two)
    assert [out.num_cached_tokens for out in again] == [1499] * 4
    after = engine.stats()
    assert after["loaded_tokens"] - before["loaded_tokens"] < 1499 + 4 * 128, "four children need one load, four tails"
    assert after["split_groups"] == before["split_groups"], "all four begin in one step: equal batches, equal bits"


def test_a_session_that_the_engine_let_go_of_is_refused_and_nothing_else(engine: VllmEngine, lab: Lab) -> None:
    session, other = lab.begin(engine, 300), lab.begin(engine, 40)
    node = engine._sessions[session].node
    assert node is not None
    engine._talk.dropped.append(node.name)
    with pytest.raises(NotFound, match="let go"):
        lab.one(engine, session, greedy(2), (1,))
    assert len(lab.one(engine, other, greedy(2)).token_ids) == 2


def test_pins_hold_blocks_and_let_them_go(engine: VllmEngine, lab: Lab) -> None:
    session = lab.begin(engine, 600)
    held = engine.pin(session, 60).result(LIMIT_S)
    assert held == 512 and engine.stats()["pinned_blocks"] == 4
    large = lab.begin(engine, 1500, start=3)
    with pytest.raises(InvalidRequest, match="pin_fraction"):
        engine.pin(large, 60).result(LIMIT_S)
    cycle(engine, lab)
    before = engine.stats()["loaded_tokens"]
    assert lab.one(engine, lab.twin(engine, session), greedy(2)).num_cached_tokens == 599
    assert engine.stats()["loaded_tokens"] - before == 599 - 512, "the pinned blocks were hit, only the tail loaded"
    engine.pin(session, 0).result(LIMIT_S)
    assert engine.stats()["pinned_blocks"] == 0


def test_what_vllm_cannot_give_is_refused_by_name(engine: VllmEngine, lab: Lab) -> None:
    with pytest.raises(BadSampling):
        lab.one(engine, lab.begin(engine, 10), greedy(2, logprobs=101))


def test_switched_off_it_refuses_and_on_again_it_goes_on(engine: VllmEngine, lab: Lab) -> None:
    session = lab.begin(engine, 300)
    expected = lab.one(engine, lab.twin(engine, session), greedy(4))
    engine.switch(on=False)
    try:
        with pytest.raises(InvalidRequest, match="switched off"):
            lab.one(engine, lab.twin(engine, session), greedy(4))
    finally:
        engine.switch(on=True)
    same(expected, lab.one(engine, lab.twin(engine, session), greedy(4)))


@pytest.mark.timeout(3600)
def test_random_operations_leak_nothing_and_give_no_wrong_token(
    engine: VllmEngine, lab: Lab, soak_receipt: Callable[..., None], request: pytest.FixtureRequest
) -> None:
    """Sessions opened, continued, forked, captured, hydrated, cancelled and closed in random order, in a pool that
    holds two of them. Every turn is repeated from its own start by a child with the parent's seed: equal tokens."""
    dice, before = random.Random(7), engine.stats()["records"]
    sessions: list[SessionRef] = [lab.begin(engine, 700, start=1, seed=1)]
    counts: Counter[str] = Counter()
    for step in range(OPERATIONS):
        session = dice.choice(sessions)
        kind = dice.randrange(7)
        counts[KINDS[kind]] += 1
        match kind:
            case 0:
                sessions.append(lab.begin(engine, dice.randrange(1, 900), start=step, seed=step))
            case 1:
                start = len(engine.view(session).tokens)
                if start < 1500:
                    replay = lab.twin(engine, session)
                    expected = lab.one(engine, session, seeded(dice.randrange(1, 12)))
                    again = lab.one(engine, replay, seeded(len(expected.token_ids)))
                    assert again.token_ids == expected.token_ids, f"step {step}"
                    sessions.append(replay)
            case 2:
                sessions += lab.fork(engine, session, dice.randrange(1, 4))
            case 3:
                at = dice.randrange(1, len(engine.view(session).tokens) + 1)
                sessions += lab.fork(engine, session, 1, at=at)
            case 4:
                sessions.append(lab.move(engine, session, engine))
            case 5:
                handle = lab.start(engine, session, sampling=seeded(200))
                next(iter(handle))
                handle.cancel()
                handle.result(LIMIT_S)
            case _:
                group = lab.fork(engine, session, 3)
                outs = lab.run(engine, *group, sampling=greedy(4), prompt=(5, 6))
                assert len({out.token_ids for out in outs}) == 1, f"step {step}: equal children, unequal tokens"
                sessions += group
        while len(sessions) > 12:
            engine.close_session(sessions.pop(dice.randrange(len(sessions))))
    for session in sessions:
        engine.close_session(session)
    lab.begin(engine, 5)
    stats = engine.stats()
    assert stats["running"] == 0
    assert stats["records"] <= before + 1, "records of sessions that were closed"
    assert stats["free_blocks"] >= BLOCKS - 2, f"{BLOCKS - stats['free_blocks']} blocks are held by nobody"
    soak_receipt(
        f"vllm-operations-{request.node.callspec.id.replace(' ', '-')}",
        what=f"{OPERATIONS} random operations on one vLLM whose blocks hold two of its sessions",
        held="every turn equal to its replay, no record and no block held by nobody",
        counts=dict(counts), engine=stats,
    )  # fmt: skip
