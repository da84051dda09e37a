"""What the GPU's benches look at in a worker, without one: the bytes in its blocks, and a mix-up of ranks."""

from __future__ import annotations

import importlib.util
import mmap
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from thaw.core.cache import FullKV
from thaw.engines.served.worker.host_cache import HostRecord, Piece
from thaw.engines.served.worker.rank_groups import RankGroups

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "in_worker.py"
HEADS, LAYERS, TOKENS, WIDTH = 4, 2, 40, 8


@pytest.fixture
def in_worker(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    found = importlib.util.spec_from_file_location("in_worker", FILE)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "in_worker", module)
    found.loader.exec_module(module)
    return module


class Copier:
    """Blocks of one strip; a load may be made to write something else than it was given."""

    def __init__(self, heads: int) -> None:
        self.blocks = torch.zeros(heads, LAYERS, 2, TOKENS, WIDTH, dtype=torch.bfloat16)
        self.damage = False

    def save(self, tables: Any, start: int, stop: int, caller: str) -> list[Piece]:
        return [Piece(start, stop - start, (self.blocks[:, :, :, start:stop].clone(),))]

    def load(self, tables: Any, record: HostRecord, start: int, stop: int) -> None:
        for a, b, view in record.spans(0, start, stop):
            self.blocks[:, :, :, a:b] = view
        if self.damage:
            self.blocks[-1, -1, -1, stop - 1, -1] += 1

    def load_aside(self, tables: Any, record: HostRecord, start: int, stop: int, since: Any) -> None:
        self.load(tables, record, start, stop)


def worker(module: ModuleType, monkeypatch: pytest.MonkeyPatch, heads: int) -> tuple[Any, Copier]:
    side = SimpleNamespace(_copier=Copier(heads))
    monkeypatch.setattr(module, "_side", lambda: side)
    asked = module.InWorker()
    asked.thaw_watch(True)
    return asked, side._copier


def kv() -> Any:
    return torch.randn(HEADS, LAYERS, 2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def loaded(asked: Any, copier: Copier, tensor: Any) -> list[str]:
    """In a background load and one in step, as a hydrate comes."""
    record = HostRecord((Piece(0, TOKENS, (tensor,)),), 0)
    copier.load_aside((), record, 0, 32, None)
    copier.load((), record, 32, TOKENS)
    found: list[str] = asked.thaw_seen(TOKENS - 1)
    asked.thaw_watch(False)
    return found


def test_heads_of_two_ranks_are_those_of_one(in_worker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kv()
    one = loaded(*worker(in_worker, monkeypatch, HEADS), whole)
    halves = [loaded(*worker(in_worker, monkeypatch, HEADS // 2), half) for half in (whole[:2], whole[2:])]
    assert one == [*halves[0], *halves[1]] and len(set(one)) == HEADS
    assert one != [*halves[1], *halves[0]]


def test_a_save_is_seen_as_what_it_took(in_worker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kv()
    one = loaded(*worker(in_worker, monkeypatch, HEADS), whole)
    asked, copier = worker(in_worker, monkeypatch, HEADS)
    copier.blocks = whole
    copier.save((), 0, 16, "somebody")
    copier.save((), 16, TOKENS, "somebody")
    assert asked.thaw_seen(TOKENS - 1) == one
    asked.thaw_watch(False)


def test_what_lies_in_the_blocks_counts_and_not_what_was_to_be(
    in_worker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = loaded(*worker(in_worker, monkeypatch, HEADS), kv())
    asked, copier = worker(in_worker, monkeypatch, HEADS)
    copier.damage = True
    assert [a == b for a, b in zip(good, loaded(asked, copier, kv()), strict=True)] == [True, True, True, False]


def test_tokens_that_were_not_copied_are_no_result(in_worker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, copier = worker(in_worker, monkeypatch, HEADS)
    copier.load((), HostRecord((Piece(0, TOKENS, (kv(),)),), 0), 16, 32)
    with pytest.raises(ValueError, match="0 to 16"):
        asked.thaw_seen(32)
    asked.thaw_watch(False)
    assert "save" not in vars(copier), "the copier is its own again"


def test_exchanged_ranks_read_the_next_ones_heads_and_then_their_own(
    in_worker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = FullKV(name="full", first_layer=0, num_layers=LAYERS, num_kv_heads=HEADS, head_dim=WIDTH, dtype="bfloat16")
    for rank, own, other in ((0, (0, 1), (2, 3)), (1, (2, 3), (0, 1))):
        groups = RankGroups((group,), rank, 2)
        side = SimpleNamespace(_packing=SimpleNamespace(_groups=groups))
        monkeypatch.setattr(in_worker, "_side", lambda side=side: side)
        asked = in_worker.InWorker()
        assert asked.thaw_exchange(True) == rank and tuple(groups.held(group)) == other
        asked.thaw_exchange(False)
        assert groups.held(group) == own


def test_the_memory_of_a_process_is_what_it_holds(in_worker: ModuleType) -> None:
    before = in_worker.resident()
    # Not by malloc, which may have as much to spare.
    held = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, len(held), mmap.PAGESIZE):
        held[page] = 1
    assert 60 << 20 < in_worker.resident() - before < 70 << 20
    held.close()
