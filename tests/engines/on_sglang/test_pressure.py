"""A small KV pool, cycled again and again: nothing is lost, nothing leaks, and one failure is one request's."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from thaw.core.errors import Busy, InvalidRequest, NotFound
from thaw.engines import load_engine
from thaw.engines.base import SessionRef
from thaw.engines.sglang.client.engine import SglangEngine
from thaw.testing.laws.kit import LIMIT_S, Lab, bits, greedy, ids, same, seeded
from thaw.testing.plans import mount_at

pytest.importorskip("sglang")

TOKENS = 3072
OPERATIONS = int(os.environ.get("THAW_SGLANG_OPERATIONS", "1000" if os.environ.get("THAW_SOAK") else "200"))
KINDS = (
    "open", "turn and its replay", "fork", "fork inside", "capture and hydrate", "cancel", "pin", "flush",
    "turn of three children",
)  # fmt: skip


SHAPES = [
    pytest.param({"page_size": 1}, id="pages of 1"),
    pytest.param({"page_size": 16}, id="pages of 16"),
    pytest.param({"page_size": 16, "tensor_parallel_size": 2}, id="pages of 16 on two ranks", marks=pytest.mark.soak),
]


@pytest.fixture(scope="module", params=SHAPES)
def engine(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Iterator[SglangEngine]:
    model = str(tiny_model("llama", dtype="bfloat16", head_dim=64))
    room = {"max_model_len": 2048, "max_total_tokens": TOKENS, **request.param}
    with load_engine("sglang", model=model, **room) as loaded:
        assert isinstance(loaded, SglangEngine)
        yield loaded


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


def cycle(engine: SglangEngine, lab: Lab) -> None:
    """Other sessions' prompts through the whole pool, three times over."""
    for start in range(100, 106):
        engine.close_session(lab.begin(engine, 1500, start=start))


def check_nothing_leaks(engine: SglangEngine) -> None:
    """SGLang's own sum, which its checker makes whenever it is idle (and ends the engine where it does not hold)."""
    stats = engine.stats()
    found = stats["free_tokens"] + stats["evictable_tokens"] + stats["protected_tokens"]
    assert (found, stats["protected_tokens"], stats["running"]) == (stats["tokens"], 0, 0)


def test_an_idle_session_survives_the_pool_being_cycled(engine: SglangEngine, lab: Lab) -> None:
    session = lab.begin(engine, 1500)
    expected = lab.one(engine, lab.twin(engine, session), seeded(12))
    cycle(engine, lab)
    again = lab.one(engine, lab.twin(engine, session), seeded(12))
    same(expected, again)
    assert again.num_cached_tokens == 1499


def test_children_that_come_back_together_are_loaded_once_and_share(engine: SglangEngine, lab: Lab) -> None:
    session = lab.begin(engine, 1500)
    expected = lab.run(engine, *(lab.twin(engine, session) for _ in range(4)), sampling=greedy(8))
    cycle(engine, lab)
    before = engine.stats()["loaded_tokens"]
    again = lab.run(engine, *(lab.twin(engine, session) for _ in range(4)), sampling=greedy(8))
    for one, two in zip(expected, again, strict=True):
        same(one, two)
    assert [out.num_cached_tokens for out in again] == [1499] * 4
    assert engine.stats()["loaded_tokens"] - before < 1499 + 4 * 16, "four children need one load and four tails"


def test_more_children_than_fit_wait_and_all_come_through(engine: SglangEngine, lab: Lab) -> None:
    """Eight of 600 tokens, no page in common, in a pool of 3,072: SGLang queues and retracts, nobody recomputes."""
    sessions = [lab.begin(engine, 600, start=start) for start in range(8)]
    expected = [lab.one(engine, lab.twin(engine, session), greedy(40)).token_ids for session in sessions]
    outs = lab.run(engine, *sessions, sampling=greedy(40))
    assert [out.num_cached_tokens for out in outs] == [599] * 8
    assert [out.token_ids[:1] for out in outs] == [ids[:1] for ids in expected]


def test_a_session_that_the_engine_let_go_of_is_refused_and_nothing_else(engine: SglangEngine, lab: Lab) -> None:
    session, other = lab.begin(engine, 300), lab.begin(engine, 40)
    node = engine._sessions[session].node
    assert node is not None
    engine._talk.dropped.append(node.name)
    with pytest.raises(NotFound, match="let go"):
        lab.one(engine, session, greedy(2), (1,))
    assert len(lab.one(engine, other, greedy(2)).token_ids) == 2


def test_pins_hold_memory_and_let_it_go(engine: SglangEngine, lab: Lab) -> None:
    session = lab.begin(engine, 600)
    held = engine.pin(session, 60).result(LIMIT_S)
    assert 600 - 16 < held <= 600 and engine.stats()["pinned_tokens"] == held == engine.stats()["protected_tokens"]
    large = lab.begin(engine, 1500, start=3)
    with pytest.raises(InvalidRequest, match="pin_fraction"):
        engine.pin(large, 60).result(LIMIT_S)
    cycle(engine, lab)
    before = engine.stats()["loaded_tokens"]
    assert lab.one(engine, lab.twin(engine, session), greedy(2)).num_cached_tokens == 599
    loaded = engine.stats()["loaded_tokens"] - before
    assert loaded == max(599 - held, 0), "what was pinned was hit, only the tail loaded"
    engine.pin(session, 0).result(LIMIT_S)
    assert engine.stats()["protected_tokens"] == 0


def test_a_pin_ends_by_itself(engine: SglangEngine, lab: Lab) -> None:
    """Its budget leaves room for any one request, and its time ends, whoever forgot it."""
    session = lab.begin(engine, 700, start=9)
    held = engine.pin(session, 1.0).result(LIMIT_S)
    assert held and lab.one(engine, lab.begin(engine, 2000, start=10), greedy(40)).finish_reason == "length"
    ends = time.monotonic() + LIMIT_S
    while engine.stats()["protected_tokens"]:
        assert time.monotonic() < ends, "the pin did not end"
        time.sleep(0.1)
    assert engine.stats()["pinned_tokens"] == 0


def test_switched_off_it_refuses_and_on_again_it_goes_on(engine: SglangEngine, lab: Lab) -> None:
    session = lab.begin(engine, 300)
    expected = lab.one(engine, lab.twin(engine, session), greedy(4))
    engine.switch(on=False)
    try:
        with pytest.raises(InvalidRequest, match="switched off"):
            lab.one(engine, lab.twin(engine, session), greedy(4))
    finally:
        engine.switch(on=True)
    same(expected, lab.one(engine, lab.twin(engine, session), greedy(4)))


def test_sglangs_own_flush_works_with_sessions_parked_and_pinned(engine: SglangEngine, lab: Lab) -> None:
    parked, pinned = lab.begin(engine, 500), lab.begin(engine, 400, start=1)
    expected = [lab.one(engine, lab.twin(engine, s), seeded(8)) for s in (parked, pinned)]
    engine.park(parked).result(LIMIT_S)
    assert engine.pin(pinned, 60).result(LIMIT_S)
    engine.flush_cache()
    stats = engine.stats()
    assert (stats["free_tokens"], stats["pinned_tokens"]) == (stats["tokens"], 0)
    for session, before in zip((parked, pinned), expected, strict=True):
        again = lab.one(engine, session, seeded(8))
        same(before, again)
        assert again.num_cached_tokens == before.num_cached_tokens
    check_nothing_leaks(engine)


def test_what_siblings_sampled_alike_in_other_batches_is_not_exchanged(engine: SglangEngine, lab: Lab) -> None:
    """Equal tokens, other bits: a child that ran alone and one that ran among four each keep their own."""
    session = lab.begin(engine, 300)
    alone = lab.twin(engine, session)
    lab.one(engine, alone, greedy(20))
    group = [lab.twin(engine, session) for _ in range(4)]
    lab.run(engine, *group, sampling=greedy(20))
    for child in (alone, *group):
        captured = lab.capture(engine, child)
        live = lab.one(engine, child, greedy(6))
        moved = lab.hydrate(engine, lab.plan(captured)).session
        assert bits(lab.one(engine, moved, greedy(6)).logprobs) == bits(live.logprobs)


def test_a_snapshot_taken_while_others_run_holds_nothing_of_them(engine: SglangEngine, lab: Lab) -> None:
    session, other = lab.begin(engine, 300, start=4), lab.begin(engine, 300, start=5)
    alone = lab.capture(engine, session)
    handle = lab.start(engine, other, sampling=seeded(150))
    next(iter(handle))
    beside = lab.capture(engine, session)
    handle.cancel()
    handle.result(LIMIT_S)
    assert beside.tokens == alone.tokens == ids(300, 4)
    assert [s.blobs for s in beside.segments] == [s.blobs for s in alone.segments]


@pytest.mark.timeout(3600)
def test_random_operations_leak_nothing_and_give_no_wrong_token(
    engine: SglangEngine, lab: Lab, soak_receipt: Callable[..., None], request: pytest.FixtureRequest
) -> None:
    """Sessions opened, continued, forked, captured, hydrated, cancelled, pinned, flushed and closed in random order, in
    a pool that holds two of them. Every turn is repeated from its own start by a child with the parent's seed."""
    dice, before = random.Random(7), engine.stats()["records"]
    sessions: list[SessionRef] = [lab.begin(engine, 700, start=1, seed=1)]
    counts: Counter[str] = Counter()
    for step in range(OPERATIONS):
        session = dice.choice(sessions)
        kind = dice.randrange(9)
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
                    same(expected, again)
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
            case 6:
                with contextlib.suppress(InvalidRequest):  # more than the budget
                    engine.pin(session, dice.choice((0.0, 0.2, 5.0))).result(LIMIT_S)
            case 7:
                engine.release_pins()
                if dice.random() < 0.3:
                    engine.flush_cache()
            case _:
                group = lab.fork(engine, session, 3)
                outs = lab.run(engine, *group, sampling=greedy(4), prompt=(5, 6))
                assert len({out.token_ids for out in outs}) == 1, f"step {step}: equal children, unequal tokens"
                sessions += group
        while len(sessions) > 12:
            engine.close_session(sessions.pop(dice.randrange(len(sessions))))
    for session in sessions:
        engine.close_session(session)
    engine.release_pins()
    lab.begin(engine, 5)
    assert engine.stats()["records"] <= before + 1, "records of sessions that were closed"
    check_nothing_leaks(engine)
    soak_receipt(
        f"sglang-operations-{request.node.callspec.id.replace(' ', '-')}",
        what=f"{OPERATIONS} random operations on one SGLang whose pool holds two of its sessions",
        held="every turn equal to its replay bit for bit, SGLang's own leak check clean, no record held by nobody",
        counts=dict(counts), engine=engine.stats(),
    )  # fmt: skip


def test_many_threads_at_once(engine: SglangEngine, lab: Lab) -> None:
    """Requests of several sessions in flight, more than fit: each ends with its own tokens, or says why not."""
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            session = lab.begin(engine, 500, start=number, seed=number)
            for _ in range(3):
                lab.one(engine, session, seeded(10))
            moved = lab.move(engine, session, engine)
            assert engine.view(moved).tokens == engine.view(session).tokens
        except (AssertionError, Busy) as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert not failures and not any(thread.is_alive() for thread in threads)
    check_nothing_leaks(engine)
