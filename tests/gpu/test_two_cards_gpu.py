"""What engines on one and on two cards make of each other's sessions: bytes equal, log probabilities close."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from thaw.engines import load_engine
from thaw.engines.base import Engine
from thaw.testing import CrossingTests
from thaw.testing.laws.kit import Lab, every_knob, ids, same, seeded
from thaw.testing.plans import mount_at

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")
if torch.cuda.device_count() < 2:
    pytest.skip("no two GPUs here", allow_module_level=True)

pytestmark = pytest.mark.gpu


def boot(folder: Path, ranks: int) -> Engine:
    usual = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30, "arena_nbytes": 1 << 30}
    return load_engine("vllm", model=str(folder), max_model_len=2048, tensor_parallel_size=ranks, **usual)


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", dtype="bfloat16", head_dim=64)


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[Engine]:
    with boot(folder, 2) as engine:
        yield engine


@pytest.fixture(scope="module")
def one(folder: Path) -> Iterator[Engine]:
    with boot(folder, 1) as engine:
        yield engine


def test_two_cards_go_on_bit_for_bit(two: Engine, tmp_path: Path) -> None:
    lab = Lab(mount_at(tmp_path / "packs"))
    parent = lab.begin(two, 700)
    lab.one(two, parent, seeded(8))
    child = lab.move(two, parent, two)
    same(lab.one(two, child, every_knob(), ids(4, 2)), lab.one(two, parent, every_knob(), ids(4, 2)))


class TestAcrossCards(CrossingTests):
    @pytest.fixture
    def here(self, two: Engine) -> Engine:
        return two

    @pytest.fixture
    def there(self, one: Engine) -> Engine:
        return one
