"""Pages of 16 tokens: what ends inside a page comes back too, in a fresh engine, and nothing of it leaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from thaw.engines import load_engine
from thaw.engines.sglang.client.engine import SglangEngine
from thaw.testing.laws.kit import Lab, greedy, ids, same, seeded
from thaw.testing.plans import halves_swapped, mount_at, tampered

pytest.importorskip("sglang")

PAGE = 16


def boot(model: Path, **options: object) -> SglangEngine:
    room = {"page_size": PAGE, "max_model_len": 2048, "max_total_tokens": 8192}
    engine = load_engine("sglang", model=str(model), **room, **options)
    assert isinstance(engine, SglangEngine)
    return engine


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", dtype="bfloat16", head_dim=64)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[SglangEngine]:
    with boot(model) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def other(model: Path) -> Iterator[SglangEngine]:
    with boot(model) as loaded:
        yield loaded


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


@pytest.mark.parametrize("at", [300, 304, 305, 311, 319, 321])
def test_a_cut_inside_a_page_goes_on_with_the_parents_bits(
    engine: SglangEngine, other: SglangEngine, lab: Lab, at: int
) -> None:
    session = lab.begin(engine, 300)
    whole = lab.one(engine, session, seeded(24))
    restored = lab.move(engine, lab.twin(engine, session, at=at), other)
    resumed = lab.one(other, restored, seeded(24)) if at == 300 else lab.resume(other, restored)[0]
    same(whole, resumed)
    assert resumed.num_cached_tokens == at - 1 and resumed.usage.num_prefilled_tokens == 1


def test_a_prompt_after_a_cut_inside_a_page(engine: SglangEngine, other: SglangEngine, lab: Lab) -> None:
    session = lab.begin(engine, 313)
    restored = lab.move(engine, session, other)
    one, two = lab.one(engine, session, seeded(9), ids(40, 7)), lab.one(other, restored, seeded(9), ids(40, 7))
    same(one, two)
    assert one.num_cached_tokens == two.num_cached_tokens == 312


def test_children_share_pages_and_each_has_its_tail(engine: SglangEngine, other: SglangEngine, lab: Lab) -> None:
    session = lab.begin(engine, 1001)
    restored = lab.move(engine, session, other)
    here = lab.run(engine, *lab.fork(engine, session, 4), sampling=seeded(12))
    before = other.stats()["loaded_tokens"]
    there = lab.run(other, *lab.fork(other, restored, 4), sampling=seeded(12))
    for one, two in zip(here, there, strict=True):
        same(one, two)
    assert [out.num_cached_tokens for out in there] == [1000] * 4
    assert other.stats()["loaded_tokens"] - before <= 1000 + 4 * PAGE, "four children need one load and four tails"


def test_negative_control_a_wrong_tail_shows(engine: SglangEngine, other: SglangEngine, lab: Lab) -> None:
    session = lab.begin(engine, 269)
    plan = lab.plan(lab.capture(engine, session))
    assert plan.slices[-1].start == 256 and plan.num_kv == 268, "the last segment does not fill its page"
    right = lab.one(other, lab.hydrate(other, plan).session, greedy(4))
    wrong = lab.one(other, lab.hydrate(other, tampered(plan, halves_swapped, piece=1)).session, greedy(4))
    same(lab.one(engine, session, greedy(4)), right)
    assert wrong.logprobs != right.logprobs


def test_nothing_leaks(engine: SglangEngine, other: SglangEngine) -> None:
    for one in (engine, other):
        stats = one.stats()
        assert stats["free_tokens"] + stats["evictable_tokens"] + stats["protected_tokens"] == stats["tokens"]
        assert stats["protected_tokens"] == 0
