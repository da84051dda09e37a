"""Three ranks, each with a third of the heads: what they write one rank reads, and back; and they decide alike.

A rank that failed alone, or whose clock ran ahead, and whose tree then held something else than the others', would run
another batch soon: all would wait for ever. So what these tests ask after each fault is that the engine continues with
the right bits.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from faults import Faults
from leaks import check_nothing_leaks

from thaw.core.errors import CorruptBlob, EngineDied, NotFound, StaleSession, StorageFailed, Unsupported
from thaw.engines import load_engine
from thaw.engines.base import Engine, HydratePlan
from thaw.engines.sglang import support
from thaw.engines.sglang.client.engine import SglangEngine
from thaw.engines.sglang.settings import cpu_environment, ranks_in
from thaw.testing import CrossingTests, EngineTests
from thaw.testing.laws.crossing_law import largest, top
from thaw.testing.laws.kit import LIMIT_S, Lab, every_knob, greedy, ids, same, seeded, wait_for
from thaw.testing.plans import flip_byte, mount_at

pytest.importorskip("sglang")

RANKS, TOKENS = 3, 4096
OPTIONS = {"max_model_len": 2048, "max_total_tokens": TOKENS}
SHAPE = {
    "head_dim": 64, "hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 6, "num_key_value_heads": 3,
}  # fmt: skip


def boot(folder: Path, ranks: int) -> SglangEngine:
    engine = load_engine("sglang", model=str(folder), tensor_parallel_size=ranks, **OPTIONS)
    assert isinstance(engine, SglangEngine)
    return engine


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", dtype="bfloat16", **SHAPE)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def three(folder: Path, faults: Faults) -> Iterator[SglangEngine]:
    with faulty(folder, faults) as engine:
        yield engine


@pytest.fixture(scope="module")
def again(folder: Path, faults: Faults) -> Iterator[SglangEngine]:
    """Three ranks of another life."""
    with faulty(folder, faults) as engine:
        yield engine


@pytest.fixture(scope="module")
def one(folder: Path) -> Iterator[SglangEngine]:
    with boot(folder, 1) as engine:
        yield engine


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


def faulty(folder: Path, faults: Faults) -> SglangEngine:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in faults.environment.items():
            patch.setenv(name, value)
        return boot(folder, RANKS)


def cycle(engine: SglangEngine, lab: Lab) -> None:
    """Other sessions' prompts through the whole pool."""
    for start in range(100, 104):
        engine.close_session(lab.begin(engine, 1500, start=start))


# -- the same as with one rank


def test_each_rank_writes_a_pack_of_its_own(three: SglangEngine, lab: Lab) -> None:
    captured = lab.capture(three, lab.begin(three, 700))
    assert three.info.num_packs == len(captured.packs) == RANKS
    assert all(len(segment.blobs["full"]) == 3 for segment in captured.segments)
    for written in captured.packs:
        assert len([blob for blob in captured.blobs if blob.pack == written.name]) == len(captured.blobs) // RANKS
        assert (lab.packs / written.name).stat().st_size == written.nbytes


def test_a_hydrated_session_has_the_bits_of_the_engines_own_hit(three: SglangEngine, lab: Lab) -> None:
    parent = lab.begin(three, 700)
    lab.one(three, parent, seeded(8))
    child = lab.move(three, parent, three)
    own = lab.one(three, parent, every_knob(), ids(4, 2))
    restored = lab.one(three, child, every_knob(), ids(4, 2))
    same(own, restored)
    assert restored.num_cached_tokens == 707


def test_captured_while_it_decodes(three: SglangEngine, lab: Lab) -> None:
    parent = lab.begin(three, 300)
    captured, whole = lab.captured_amid(three, parent)
    same(whole, lab.resume(three, lab.hydrate(three, lab.plan(captured)).session)[0])


def test_forks_park_and_share(three: SglangEngine, lab: Lab) -> None:
    session = lab.begin(three, 900)
    expected = lab.run(three, *lab.fork(three, session, 4, seeds=range(4)), sampling=seeded(10))
    three.park(session).result(LIMIT_S)
    cycle(three, lab)
    before = three.stats()["loaded_tokens"]
    found = lab.run(three, *lab.fork(three, session, 4, seeds=range(4)), sampling=seeded(10))
    for one, two in zip(expected, found, strict=True):
        same(one, two)
    assert [out.num_cached_tokens for out in found] == [899] * 4
    assert three.stats()["loaded_tokens"] - before == 899, "four children need one load"


def test_more_than_fit_wait_and_all_come_through(three: SglangEngine, lab: Lab) -> None:
    sessions = [lab.begin(three, 800, start=start) for start in range(6)]
    expected = [lab.one(three, lab.twin(three, session), greedy(1)).token_ids for session in sessions]
    outs = lab.run(three, *sessions, sampling=greedy(24))
    assert [out.num_cached_tokens for out in outs] == [799] * 6
    assert [out.token_ids[:1] for out in outs] == expected
    check_nothing_leaks(three)


def test_a_cancelled_one_ends_alone(three: SglangEngine, lab: Lab) -> None:
    doomed, other = lab.begin(three, 200, start=1), lab.begin(three, 200, start=2)
    running = lab.start(three, doomed, sampling=seeded(1500))
    wait_for(running, 3)
    running.cancel()
    assert len(lab.one(three, other, seeded(6)).token_ids) == 6
    assert running.result(LIMIT_S)[0].finish_reason == "abort"
    check_nothing_leaks(three)


# -- across rank counts


class TestAcrossRankCounts(CrossingTests):
    @pytest.fixture
    def here(self, again: SglangEngine) -> Engine:
        return again

    @pytest.fixture
    def there(self, one: SglangEngine) -> Engine:
        return one

    def wrong(self, plan: HydratePlan) -> dict[str, HydratePlan]:
        return {**super().wrong(plan), "two heads exchanged": exchanged(plan)}


def test_three_ranks_of_another_life_go_on_bit_for_bit(three: SglangEngine, again: SglangEngine, lab: Lab) -> None:
    parent = lab.begin(three, 700, start=50)
    lab.one(three, parent, seeded(8))
    child = lab.move(three, parent, again)
    restored = lab.one(again, child, every_knob(), ids(4, 2))
    same(lab.one(three, parent, every_knob(), ids(4, 2)), restored)
    assert restored.num_cached_tokens == 707


def test_a_rank_killed_in_the_middle_of_a_load_ends_the_engine_and_nothing_else(
    three: SglangEngine, again: SglangEngine, faults: Faults, lab: Lab
) -> None:
    session = lab.begin(three, 700, start=60)
    plan = lab.plan(lab.capture(three, session))
    facts = again._transport.mail.worker_facts(1)
    assert facts is not None and facts.pid != again._transport.facts.pid
    with faults.on("hang", 1), ThreadPoolExecutor(1) as pool:
        doing = pool.submit(again.hydrate(plan).result, LIMIT_S)
        while not (faults.folder / "hanging.1").exists():
            assert not doing.done()
            time.sleep(0.01)
        os.kill(facts.pid, signal.SIGKILL)
        with pytest.raises(EngineDied):
            doing.result(LIMIT_S)
    same(lab.one(three, session, seeded(8)), lab.one(three, lab.hydrate(three, plan).session, seeded(8)))
    check_nothing_leaks(three)


# -- one rank alone


@pytest.mark.parametrize("rank", [0, 2])
def test_what_one_rank_cannot_load_fails_that_request_alone(
    three: SglangEngine, lab: Lab, faults: Faults, rank: int
) -> None:
    session, other = lab.begin(three, 700, start=rank), lab.begin(three, 300, start=5)
    expected = lab.one(three, lab.twin(three, session), seeded(8))
    three.flush_cache()
    plain = lab.start(three, other, sampling=seeded(100))
    wait_for(plain, 5)
    before, child = three.stats(), lab.twin(three, session)
    with faults.on("load", rank), pytest.raises(StorageFailed, match="fault: load"):
        lab.one(three, child, seeded(8))
    assert three.view(child).tokens == three.view(session).tokens, "no token came of it"
    assert len(plain.result(LIMIT_S)[0].token_ids) == 100
    assert three.stats()["loaded_tokens"] == before["loaded_tokens"], "nothing was inserted, nothing read again instead"
    check_nothing_leaks(three)
    for retried in (child, session):
        again = lab.one(three, retried, seeded(8))
        same(expected, again)
        assert again.num_cached_tokens == 699


def test_among_siblings_each_fails_with_its_own_error_and_none_is_half_there(
    three: SglangEngine, lab: Lab, faults: Faults
) -> None:
    session = lab.begin(three, 700, start=7)
    children = lab.fork(three, session, 3)
    three.flush_cache()
    with faults.on("load", 1), pytest.raises(StorageFailed, match="fault: load"):
        lab.run(three, *children, sampling=seeded(8))
    outs = lab.run(three, *lab.fork(three, session, 3), sampling=seeded(8))
    assert [out.num_cached_tokens for out in outs] == [699] * 3
    check_nothing_leaks(three)


def test_a_blob_damaged_for_one_rank_is_refused_and_the_engine_goes_on(three: SglangEngine, lab: Lab) -> None:
    session = lab.begin(three, 700, start=11)
    captured = lab.capture(three, session)
    plan = lab.plan(captured)
    victim = plan.slices[0].blobs["full"][1]
    flip_byte(lab.packs, victim, at=100)
    with pytest.raises(CorruptBlob):
        lab.hydrate(three, plan)
    flip_byte(lab.packs, victim, at=100)
    same(lab.one(three, session, seeded(8)), lab.one(three, lab.hydrate(three, plan).session, seeded(8)))
    check_nothing_leaks(three)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_could_not_keep_is_refused_on_all(
    three: SglangEngine, lab: Lab, faults: Faults, rank: int
) -> None:
    session = lab.begin(three, 300, start=20 + rank)
    lab.capture(three, session)  # what it has read is kept on all ranks by now
    with faults.on("keep", rank):
        lab.one(three, session, seeded(4))
    with pytest.raises(StorageFailed, match="fault: keep"):
        lab.one(three, session, seeded(4), (1,))
    with pytest.raises(StorageFailed, match="fault: keep"):
        lab.capture(three, session)
    assert len(lab.one(three, lab.begin(three, 300, start=30), seeded(4)).token_ids) == 4
    check_nothing_leaks(three)


def test_time_is_the_first_ranks(three: SglangEngine, lab: Lab, faults: Faults) -> None:
    """A clock that runs ahead ends what is over by it, on all ranks or on none."""
    session = lab.begin(three, 600, start=40)
    held = three.pin(session, 60).result(LIMIT_S)
    with faults.on("clock", 2):
        assert lab.one(three, lab.twin(three, session), greedy(2)).num_cached_tokens == 599
        cycle(three, lab)
        assert three.stats()["pinned_tokens"] == held == three.stats()["protected_tokens"]
        before = three.stats()["loaded_tokens"]
        assert lab.one(three, lab.twin(three, session), greedy(2)).num_cached_tokens == 599
        assert three.stats()["loaded_tokens"] == before, "what was pinned was hit"
    with faults.on("clock", 0):
        ends = time.monotonic() + LIMIT_S
        while three.stats()["records"]:
            assert time.monotonic() < ends
    assert three.stats()["pinned_tokens"] == 0
    with pytest.raises(NotFound, match="let go"):
        lab.one(three, session, greedy(2), (1,))
    assert len(lab.one(three, lab.begin(three, 200), greedy(2)).token_ids) == 2
    check_nothing_leaks(three)


def test_weights_that_one_rank_sees_changed_are_changed_for_all(three: SglangEngine, lab: Lab, faults: Faults) -> None:
    session = lab.begin(three, 300)
    with faults.on("weights", 1):
        with pytest.raises(StaleSession):
            lab.one(three, session, greedy(2), (1,))
        fresh = lab.begin(three, 300)
        assert lab.one(three, fresh, greedy(2), (1,)).num_cached_tokens >= 299
    with pytest.raises(StaleSession):
        lab.one(three, fresh, greedy(2), (1,))


def test_weights_that_change_on_every_rank_are_noticed(
    three: SglangEngine, lab: Lab, tiny_model: Callable[..., Path], folder: Path
) -> None:
    session = lab.begin(three, 300)
    three.update_weights(tiny_model("llama", dtype="bfloat16", seed=1, **SHAPE))
    with pytest.raises(StaleSession):
        lab.one(three, session, greedy(2), (1,))
    three.update_weights(folder)
    assert lab.one(three, lab.begin(three, 300), greedy(2)).num_cached_tokens == 299
    check_nothing_leaks(three)


# -- what stays refused


@pytest.mark.parametrize("name", ["pp_size", "dp_size", "attn_dp_size", "attn_cp_size", "dcp_size", "nnodes"])
def test_other_ways_to_use_several_ranks_are_refused_by_name(name: str) -> None:
    def context(**sizes: int) -> SimpleNamespace:
        return SimpleNamespace(
            server_args=SimpleNamespace(tp_size=4, **sizes),
            is_hybrid_swa=False,
            is_hybrid_ssm=False,
            model_config=SimpleNamespace(is_multimodal=False, hf_text_config=SimpleNamespace()),
        )

    support.require(context(**{name: 1}))
    with pytest.raises(Unsupported, match=f"{name}=2"):
        support.require(context(**{name: 2}))


def test_on_a_cpu_every_rank_gets_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for cores, bound in (({0, 1}, "0|1|0"), ({0, 2, 4, 6, 8, 10}, "0,2|4,6|8,10")):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        found = cpu_environment(3)
        assert found["SGLANG_CPU_OMP_THREADS_BIND"] == bound
        assert found["OMP_NUM_THREADS"] == str(max(1, len(cores) // 3))
    assert cpu_environment()["SGLANG_CPU_OMP_THREADS_BIND"] == "all"
    assert [ranks_in(line.split()) for line in ("--tp 3", "--tp-size=2 --page-size 16", "--page-size 16")] == [3, 2, 1]


def exchanged(plan: HydratePlan) -> HydratePlan:
    """The blobs of two heads in each other's place: every byte is right, and lies where another rank looks."""
    slices = []
    for piece in plan.slices:
        first, second, *rest = piece.blobs["full"]
        slices.append(msgspec.structs.replace(piece, blobs={"full": (second, first, *rest)}))
    return msgspec.structs.replace(plan, slices=tuple(slices))


@pytest.mark.soak(
    "the whole law book once more",
    receipt="sglang-law-book-on-three-ranks",
    covers=("src/thaw/engines/sglang", "src/thaw/engines/served", "src/thaw/data", "src/thaw/testing/laws"),
)
class TestThreeRanks(EngineTests):
    """The whole law book, where each rank has a third of the heads."""

    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls, tiny_model: Callable[..., Path]) -> Callable[..., Engine]:
        folder = str(tiny_model("llama", dtype="bfloat16", **SHAPE))
        options = {"model": folder, "chunked_prefill_size": 512, "tensor_parallel_size": RANKS}
        return lambda **changes: load_engine("sglang", **{**options, **changes})


@pytest.mark.soak("three boots of the real model", receipt="sglang-real-model-across-rank-counts")
def test_the_real_model_across_rank_counts(demo_model: Path, lab: Lab) -> None:
    """SmolLM2 has three KV heads: one for each rank."""
    with boot(demo_model, RANKS) as three:
        session = lab.begin(three, 700)
        plan = lab.plan(lab.capture(three, session), at=700)
        own = lab.one(three, lab.twin(three, session), greedy(16, logprobs=20))
        same(own, lab.one(three, lab.hydrate(three, plan).session, greedy(16, logprobs=20)))
    with boot(demo_model, 1) as one:
        hydrated = lab.hydrate(one, plan)
        assert hydrated.proof.hit and hydrated.proof.num_cached_tokens == 699
        there = lab.one(one, hydrated.session, greedy(16, logprobs=20))
        back = lab.plan(lab.capture(one, lab.begin(one, 700)), at=700)
        alone = lab.one(one, lab.hydrate(one, back).session, greedy(16, logprobs=20))
    with boot(demo_model, RANKS) as three:
        same(own, lab.one(three, lab.hydrate(three, plan).session, greedy(16, logprobs=20)))
        here = lab.one(three, lab.hydrate(three, back).session, greedy(16, logprobs=20))
    for way, first, second in (("three to one", own, there), ("one to three", alone, here)):
        equal = next((i for i, (a, b) in enumerate(zip(first.token_ids, second.token_ids, strict=True)) if a != b), 16)
        difference = largest(top(first), top(second))
        print(f"{way}: largest difference of log probabilities {difference:.4f}; {equal} of 16 greedy tokens equal")
        assert difference < CrossingTests.tolerance
