"""SGLang with 3,072 slots, in pages of 1 and of 16, and on two ranks."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from leaks import check_nothing_leaks

from thaw.core.errors import Busy, StaleSession
from thaw.engines import load_engine
from thaw.engines.base import SessionRef
from thaw.engines.served.client.engine import ServedEngine
from thaw.engines.sglang.client.engine import SglangEngine
from thaw.testing import PressureTests
from thaw.testing.laws.bytes_law import blob_ids
from thaw.testing.laws.kit import LIMIT_S, Lab, bits, greedy, ids, same, seeded
from thaw.testing.reference import Reference

pytest.importorskip("sglang")

SLOTS = 3072
SHAPES = [
    pytest.param(
        {"page_size": 1},
        id="pages of 1",
        marks=pytest.mark.soak("what holds on pages of 16, once more", receipt="sglang-operations-pages-of-1"),
    ),
    pytest.param(
        {"page_size": 16},
        id="pages of 16",
        marks=pytest.mark.longer_in_soak("1,000 operations in place of 200", receipt="sglang-operations-pages-of-16"),
    ),
    pytest.param(
        {"page_size": 16, "tensor_parallel_size": 2},
        id="pages of 16 on two ranks",
        marks=pytest.mark.soak(
            "what holds on one rank, once more", receipt="sglang-operations-pages-of-16-on-two-ranks"
        ),
    ),
]


class TestSglangPressure(PressureTests):
    granule: ClassVar[int] = 16
    num_together: ClassVar[int] = 24
    num_operations: ClassVar[int] = 1000 if os.environ.get("THAW_SOAK") else 200
    operations: ClassVar[tuple[str, ...]] = (*PressureTests.operations, "flush")

    @pytest.fixture(scope="class", params=SHAPES)
    @classmethod
    def engine(cls, request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Iterator[SglangEngine]:
        model = str(tiny_model("llama", dtype="bfloat16", head_dim=64))
        room = {"max_model_len": 2048, "max_total_tokens": SLOTS, **request.param}
        with load_engine("sglang", model=model, **room) as loaded:
            assert isinstance(loaded, SglangEngine)
            yield loaded

    @pytest.fixture
    def reference(self, tiny_model: Callable[..., Path]) -> Reference:
        return Reference(tiny_model("llama", dtype="bfloat16", head_dim=64))

    @pytest.fixture
    def finished(self, engine: SglangEngine, soak_receipt: Callable[..., None]) -> Callable[[Counter[str]], None]:
        return lambda counts: soak_receipt(
            what=f"{self.num_operations} random operations on one SGLang whose pool holds two of its sessions",
            held="every turn equal to its replay bit for bit and as the model by itself has it, SGLang's own leak "
            "check clean, no record held by nobody",
            counts=dict(counts), engine=engine.stats(),
        )  # fmt: skip

    def num_pinned(self, engine: ServedEngine) -> int:
        stats = engine.stats()
        assert stats["pinned_tokens"] == stats["protected_tokens"]
        return stats["pinned_tokens"]

    def check_nothing_leaks(self, engine: ServedEngine) -> None:
        check_nothing_leaks(engine)

    def operate(
        self, kind: str, engine: ServedEngine, session: SessionRef, reference: Reference, dice: random.Random
    ) -> None:
        assert isinstance(engine, SglangEngine) and kind == "flush"
        engine.release_pins()
        if dice.random() < 0.3:
            engine.flush_cache()

    def test_more_children_than_fit_wait_and_all_come_through(self, engine: SglangEngine, lab: Lab) -> None:
        """Eight of 600 tokens, no page in common, in a pool of 3,072: SGLang queues and retracts, nobody recomputes."""
        sessions = [lab.begin(engine, 600, start=start) for start in range(8)]
        expected = [lab.one(engine, lab.twin(engine, session), greedy(40)).token_ids for session in sessions]
        outs = lab.run(engine, *sessions, sampling=greedy(40))
        assert [out.num_cached_tokens for out in outs] == [599] * 8
        assert [out.token_ids[:1] for out in outs] == [ids[:1] for ids in expected]

    def test_a_pin_ends_by_itself(self, engine: SglangEngine, lab: Lab) -> None:
        """Its budget leaves room for any one request, and its time ends, whoever forgot it."""
        session = lab.begin(engine, 700, start=9)
        held = engine.pin(session, 1.0).result(LIMIT_S)
        assert held and lab.one(engine, lab.begin(engine, 2000, start=10), greedy(40)).finish_reason == "length"
        ends = time.monotonic() + LIMIT_S
        while engine.stats()["protected_tokens"]:
            assert time.monotonic() < ends, "the pin did not end"
            time.sleep(0.1)
        assert engine.stats()["pinned_tokens"] == 0

    def test_sglangs_own_flush_works_with_sessions_parked_and_pinned(self, engine: SglangEngine, lab: Lab) -> None:
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
        self.check_nothing_leaks(engine)

    def test_sglangs_own_weight_updates_work_with_sessions_parked_and_pinned(
        self, engine: SglangEngine, lab: Lab, tiny_model: Callable[..., Path]
    ) -> None:
        """The same weights change nothing; others make every session of before stale, and no pin is in the way."""
        same_weights, others = (tiny_model("llama", dtype="bfloat16", head_dim=64, seed=seed) for seed in (0, 1))
        parked, pinned = lab.begin(engine, 500, start=2), lab.begin(engine, 400, start=3)
        expected = [lab.one(engine, lab.twin(engine, s), seeded(8)) for s in (parked, pinned)]
        engine.park(parked).result(LIMIT_S)
        assert engine.pin(pinned, 60).result(LIMIT_S)
        engine.update_weights(same_weights)
        assert self.num_pinned(engine) == 0
        for session, before in zip((parked, pinned), expected, strict=True):
            same(before, lab.one(engine, lab.twin(engine, session), seeded(8)))
        assert engine.pin(pinned, 60).result(LIMIT_S)
        engine.update_weights(others)
        for session in (parked, pinned):
            with pytest.raises(StaleSession, match="weights changed"):
                lab.one(engine, session, seeded(8))
        after = lab.begin(engine, 400, start=3)
        assert lab.one(engine, after, seeded(8)).token_ids != expected[1].token_ids
        engine.update_weights(same_weights)
        self.check_nothing_leaks(engine)

    def test_what_siblings_sampled_alike_in_other_batches_is_not_exchanged(
        self, engine: SglangEngine, lab: Lab
    ) -> None:
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

    def test_what_one_sibling_sampled_and_another_read_is_not_exchanged(self, engine: SglangEngine, lab: Lab) -> None:
        """Equal tokens, other bits: those of a prompt that is read and those of an answer that is decoded."""
        session = lab.begin(engine, 300, start=11)
        sampled, read = lab.twin(engine, session), lab.twin(engine, session)
        out = lab.one(engine, sampled, greedy(40))
        engine.append(read, out.token_ids).result(LIMIT_S)
        assert engine.view(sampled).tokens == engine.view(read).tokens
        assert blob_ids(lab.capture(engine, sampled)) != blob_ids(lab.capture(engine, read))
        for child in (sampled, read):
            captured = lab.capture(engine, child)
            live = lab.one(engine, child, greedy(6))
            moved = lab.hydrate(engine, lab.plan(captured)).session
            assert bits(lab.one(engine, moved, greedy(6)).logprobs) == bits(live.logprobs)

    def test_a_snapshot_taken_while_others_run_holds_nothing_of_them(self, engine: SglangEngine, lab: Lab) -> None:
        session, other = lab.begin(engine, 300, start=4), lab.begin(engine, 300, start=5)
        alone = lab.capture(engine, session)
        handle = lab.start(engine, other, sampling=seeded(150))
        next(iter(handle))
        beside = lab.capture(engine, session)
        handle.cancel()
        handle.result(LIMIT_S)
        assert beside.tokens == alone.tokens == ids(300, 4)
        assert [s.blobs for s in beside.segments] == [s.blobs for s in alone.segments]

    def test_many_threads_at_once(self, engine: SglangEngine, lab: Lab) -> None:
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
        self.check_nothing_leaks(engine)
