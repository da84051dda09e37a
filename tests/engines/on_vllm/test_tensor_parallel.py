"""Two ranks, each with half of the heads: what they write together one rank reads, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

import thaw.repo
from thaw.core.errors import StaleSession
from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.testing import CrossingTests, EngineTests
from thaw.testing.laws.kit import Lab, every_knob, greedy, ids, same, seeded
from thaw.testing.plans import mount_at

pytest.importorskip("vllm")

from thaw.engines.vllm.client.engine import VllmEngine

THREADS = ("VLLM_CPU_OMP_THREADS_BIND", "0|1")
"""Without it vLLM wants a NUMA node for each rank."""

OPTIONS = {"enforce_eager": True, "max_model_len": 2048, "tensor_parallel_size": 2}


def boot(folder: Path, ranks: int) -> VllmEngine:
    return cast(VllmEngine, load_engine("vllm", **{**OPTIONS, "model": str(folder), "tensor_parallel_size": ranks}))


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", dtype="bfloat16", head_dim=64)


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[VllmEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*THREADS)
        engine = boot(folder, 2)
    with engine:
        yield engine


@pytest.fixture(scope="module")
def one(folder: Path) -> Iterator[VllmEngine]:
    with boot(folder, 1) as engine:
        yield engine


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


def test_each_rank_writes_a_pack_of_its_own(two: VllmEngine, lab: Lab) -> None:
    captured = lab.capture(two, lab.begin(two, 700))
    assert two.info.num_packs == len(captured.packs) == 2
    heads = captured.identity.groups[0].num_kv_heads
    assert all(len(segment.blobs["full"]) == heads for segment in captured.segments)
    for written in captured.packs:
        mine = [blob for blob in captured.blobs if blob.pack == written.name]
        assert len(mine) == len(captured.blobs) // 2
        assert (lab.packs / written.name).stat().st_size == written.nbytes


def test_two_ranks_go_on_bit_for_bit(two: VllmEngine, lab: Lab) -> None:
    parent = lab.begin(two, 700)
    lab.one(two, parent, seeded(8))
    child = lab.move(two, parent, two)
    same(lab.one(two, child, every_knob(), ids(4, 2)), lab.one(two, parent, every_knob(), ids(4, 2)))


def test_captured_while_it_decodes(two: VllmEngine, lab: Lab) -> None:
    parent = lab.begin(two, 300)
    captured, whole = lab.captured_amid(two, parent)
    same(whole, lab.resume(two, lab.hydrate(two, lab.plan(captured)).session)[0])


class TestAcrossRankCounts(CrossingTests):
    @pytest.fixture
    def here(self, two: VllmEngine) -> Engine:
        return two

    @pytest.fixture
    def there(self, one: VllmEngine) -> Engine:
        return one


def test_a_repository_keeps_both_packs(two: VllmEngine, one: VllmEngine, tmp_path: Path) -> None:
    with thaw.repo.init(tmp_path / "repo", engine=two) as repo:
        session = repo.session()
        session.append(token_ids=ids(600))
        commit = session.commit("two ranks").commit
        report = repo.fsck()
        assert report.ok and len(list((tmp_path / "repo").rglob("*.safetensors"))) == 3, (
            "two packs of KV, one of objects"
        )
    with thaw.repo.open(tmp_path / "repo", engine=one) as repo:
        child = repo.session(commit)
        assert child.proof is not None and child.proof.hit


def test_weights_that_change_on_every_rank_are_noticed(two: VllmEngine, lab: Lab, tiny_model: Callable[..., Path],
                                                       folder: Path) -> None:  # fmt: skip
    session = lab.begin(two, 300)
    try:
        other = tiny_model("llama", dtype="bfloat16", head_dim=64, seed=1)
        two.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        with pytest.raises(StaleSession):
            lab.one(two, session, greedy(2), (1,))
    finally:
        two.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})


@pytest.mark.soak(
    "the whole law book once more",
    receipt="vllm-law-book-on-two-ranks",
    covers=("src/thaw/engines/vllm", "src/thaw/engines/served", "src/thaw/data", "src/thaw/testing/laws"),
)
class TestTwoRanks(EngineTests):
    """The whole law book, where each rank has half of the heads."""

    @pytest.fixture(scope="class")
    @classmethod
    def engine_factory(cls, tiny_model: Callable[..., Path]) -> Callable[..., Engine]:
        folder = str(tiny_model("llama", dtype="bfloat16", head_dim=64))
        return lambda **changes: load_engine("vllm", **{**OPTIONS, "model": folder, "max_model_len": 4096, **changes})

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def threads(cls) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(*THREADS)
            yield
