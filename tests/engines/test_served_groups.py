"""The served path over cache groups: what a worker keeps, writes and reads is every group's, on every rank.

The packs of a fake engine are what a worker reads here; blobs are named by their bytes, so a pack that names the same
ones holds the same bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from thaw.core.cache import CacheGroup, FullKV, nbytes_at, point_groups, token_groups, token_nbytes
from thaw.core.errors import CorruptBlob, LawBroken, Unsupported
from thaw.engines import load_engine
from thaw.engines.base import Captured, Engine, HydratePlan
from thaw.engines.fake.shapes import SHAPES, WINDOW
from thaw.engines.served.budget import Shares
from thaw.engines.served.client.channel import worker_facts
from thaw.engines.served.mailbox import Mailbox
from thaw.engines.served.protocol import Answer, WorkerFacts, merge
from thaw.engines.served.worker.rank_groups import RankGroups
from thaw.testing.laws.groups_law import least
from thaw.testing.laws.kit import Lab
from thaw.testing.plans import mount_at

torch = pytest.importorskip("torch")
from thaw.engines.served.client.capturing import joined_segments  # noqa: E402
from thaw.engines.served.worker.host_cache import (  # noqa: E402 - it needs torch
    MAX_PIECES,
    HostCache,
    HostRecord,
    Piece,
)
from thaw.engines.served.worker.pack_io import PackIO  # noqa: E402
from thaw.engines.vllm import jobs  # noqa: E402
from thaw.engines.vllm.scheduler.content_ids import BlockContents  # noqa: E402
from thaw.engines.vllm.scheduler.records import SchedulerRecord as Known  # noqa: E402
from thaw.engines.vllm.settings import VllmSettings  # noqa: E402
from thaw.engines.vllm.worker.copier import Copier  # noqa: E402
from thaw.engines.vllm.worker.layout import cache_groups, make_layouts  # noqa: E402
from thaw.engines.vllm.worker.layout.base import layer_order  # noqa: E402
from thaw.engines.vllm.worker.layout.strided import TorchPages  # noqa: E402
from thaw.engines.vllm.worker.worker import WorkerSide  # noqa: E402

ME, LEFT, KEPT = "1" * 32, "2" * 32, "3" * 32
RANKS = [("one", 1), ("one", 2), ("two", 1), ("two", 3), ("hybrid", 1), ("hybrid", 2), ("hybrid", 4), ("latent", 3)]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


@pytest.fixture(params=[True, False], ids=["of-all-tokens", "of-the-end"])
def interior(request: pytest.FixtureRequest) -> bool:
    """Whether the engine keeps windows and states of all tokens."""
    return bool(request.param)


class Worker:
    """A rank's memory and its way to packs, without an engine."""

    def __init__(
        self, groups: Sequence[CacheGroup], rank: int, num_ranks: int, lab: Lab, nbytes: int = 1 << 24,
        *, interior: bool = False,
    ):  # fmt: skip
        own = RankGroups(groups, rank, num_ranks)
        mail: Any = SimpleNamespace(mount=lambda uuid: lab.mount)
        self.rank, self.arena = rank, HostCache(nbytes, None, own, spill_nbytes=0, shares=Shares())
        self.packing = PackIO(own, mail, self.arena, interior=interior)

    def read(self, plan: HydratePlan) -> HostRecord:
        found = self.packing.read(plan, ME)
        return HostRecord(found.pieces, 0, caller=ME, points=found.points)

    def write(self, record: HostRecord, base: int, num_kv: int, name: str) -> Answer:
        return self.packing.write(
            record, base, num_kv, store="s", pack=f"{name}-{self.rank}.safetensors", num_tokens=num_kv
        )


def workers(groups: Sequence[CacheGroup], num_ranks: int, lab: Lab, *, interior: bool = False) -> list[Worker]:
    return [Worker(groups, rank, num_ranks, lab, interior=interior) for rank in range(num_ranks)]


def captured_of(engine: Engine, lab: Lab, count: int = 600) -> tuple[Captured, HydratePlan]:
    captured = lab.capture(engine, lab.begin(engine, count))
    return captured, lab.plan(captured)


@pytest.mark.parametrize(("shape", "num_ranks"), RANKS)
def test_what_ranks_read_and_write_is_byte_for_byte_the_same(
    shape: str, num_ranks: int, interior: bool, lab: Lab
) -> None:
    with load_engine("fake", groups=shape, interior=interior) as engine:
        captured, plan = captured_of(engine, lab)
    ranks = workers(captured.identity.groups, num_ranks, lab, interior=interior)
    answers = [worker.write(worker.read(plan), 0, 600, "again") for worker in ranks]
    segments, locations = joined_segments(merge(answers), 0, captured.identity.groups)
    assert segments == captured.segments
    named = [one for segment in segments for one in (segment.blobs, *(point.blobs for point in segment.points))]
    assert [place.blob for place in locations] == [blob for one in named for ids in one.values() for blob in ids]
    assert len({place.pack for place in locations}) <= num_ranks


@pytest.mark.parametrize(("shape", "num_ranks"), RANKS)
def test_an_earlier_token_is_cut_in_every_group(shape: str, num_ranks: int, lab: Lab) -> None:
    """As the engine that has them all cuts it; from a token inside a segment on."""
    with load_engine("fake", groups=shape) as engine:
        session = lab.begin(engine, 600)
        plan = lab.plan(lab.capture(engine, session))
        (child,) = lab.fork(engine, session, at=400)
        expected = lab.capture(engine, child, 300)
    groups, num_kv = expected.identity.groups, expected.num_kv
    ranks = workers(groups, num_ranks, lab, interior=True)
    cut = [worker.read(plan).upto(num_kv) for worker in ranks]
    assert all(token <= num_kv for record in cut for token in record.points), "later tokens will be others"
    answers = [worker.write(record, 300, num_kv, "cut") for worker, record in zip(ranks, cut, strict=True)]
    assert joined_segments(merge(answers), 300, groups)[0] == expected.segments


@pytest.mark.parametrize("shape", SHAPES)
def test_many_small_pieces_are_joined_in_every_group(shape: str, lab: Lab) -> None:
    with load_engine("fake", groups=shape, interior=False) as engine:
        captured, plan = captured_of(engine, lab)
    worker = Worker(captured.identity.groups, 0, 1, lab)
    record = worker.read(plan)
    (whole,) = record.pieces
    record.pieces = tuple(_part(whole, at, min(at + 7, 600)) for at in range(0, 600, 7))
    assert len(record.pieces) > MAX_PIECES
    before = worker.write(record, 0, 600, "parts")
    record.pieces = worker.arena.joined(record.pieces, ME)
    assert len(record.pieces) == 1
    after = worker.write(record, 0, 600, "whole")
    told = [[(b.group, b.index, b.start, b.first, b.point, b.blob) for b in answer.blobs] for answer in (before, after)]
    assert told[0] == told[1]


def _part(whole: Piece, start: int, stop: int) -> Piece:
    tensors, late = [], []
    for strip in range(len(whole.tensors)):
        first = min(max(start, whole.first(strip)), stop)
        late.append(first - start)
        tensors.append(whole.view(strip, first, stop).clone() if first < stop else whole.tensors[strip][:, :, :, :0])
    return Piece(start, stop - start, tuple(tensors), late=tuple(late))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_that_lacks_a_group_is_refused_before_anything_is_kept(shape: str, lab: Lab) -> None:
    with load_engine("fake", groups=shape) as engine:
        captured, plan = captured_of(engine, lab)
    worker = Worker(captured.identity.groups, 0, 1, lab)
    for group in token_groups(captured.identity.groups):
        slices = tuple(
            msgspec.structs.replace(piece, blobs={g: p for g, p in piece.blobs.items() if g != group.name})
            for piece in plan.slices
        )
        with pytest.raises(CorruptBlob, match=group.name):
            worker.read(msgspec.structs.replace(plan, slices=slices))
    if point_groups(captured.identity.groups):
        with pytest.raises(CorruptBlob, match="600"):
            worker.read(msgspec.structs.replace(plan, points=plan.points[:-1]))
    strange = tuple(msgspec.structs.replace(piece, blobs={**piece.blobs, "more": ()}) for piece in plan.slices)
    with pytest.raises(CorruptBlob, match="more"):
        worker.read(msgspec.structs.replace(plan, slices=strange))
    assert worker.arena.used == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_memory_is_counted_for_all_groups_and_a_window_takes_its_own_tokens(shape: str, lab: Lab) -> None:
    with load_engine("fake", groups=shape) as engine:
        captured, plan = captured_of(engine, lab)
    groups = captured.identity.groups
    worker = Worker(groups, 0, 1, lab, nbytes=1000 * token_nbytes(groups))
    states = sum(group.nbytes for group in point_groups(groups))  # kept beside a request's tokens
    assert worker.arena.room(ME).num_tokens == 1000 - -(-states // token_nbytes(groups))
    record = worker.read(least(plan))
    stored = 600 // 256 * 256  # the segment in which a window begins is read whole
    windows = {g.name: stored if 0 not in g.covers(600) else 0 for g in token_groups(groups)}
    tokens = sum(group.token_nbytes * (600 - windows[group.name]) for group in token_groups(groups))
    assert worker.arena.used == tokens + states
    assert worker.arena.used >= nbytes_at(groups, 600) and 600 - stored > WINDOW
    del record
    assert worker.arena.used == 0


def test_a_blob_that_no_rank_or_that_two_ranks_wrote_breaks_the_law(lab: Lab) -> None:
    """Three heads on two ranks: no engine splits them so."""
    with load_engine("fake", groups="two") as engine:
        captured, plan = captured_of(engine, lab)
    groups = captured.identity.groups
    two = merge([worker.write(worker.read(plan), 0, 600, "two") for worker in workers(groups, 2, lab)])
    with pytest.raises(LawBroken, match=r"blobs \[0, 1\] of cache group wide in the segment at 0"):
        joined_segments(two, 0, groups)
    one = Worker(groups, 0, 1, lab)
    twice = one.write(one.read(plan), 0, 600, "one")
    with pytest.raises(LawBroken, match="cache group full"):
        joined_segments(merge([twice, twice]), 0, groups)
    with pytest.raises(LawBroken, match="nobody asked for"):
        joined_segments(twice, 256, groups)


def test_an_engine_whose_ranks_hold_other_heads_is_refused_at_boot() -> None:
    group = FullKV(name="full", first_layer=0, num_layers=2, num_kv_heads=4, head_dim=8, dtype="float32")
    RankGroups((group,), 1, 2).require([2])
    RankGroups((group,), 5, 8).require([1])
    with pytest.raises(Unsupported, match="rank 1 of 2 has 3 KV heads of cache group full, which are 4 in all"):
        RankGroups((group,), 1, 2).require([3])


def test_workers_of_unlike_groups_are_not_one_engine(tmp_path: Path) -> None:
    mail = Mailbox(tmp_path / "mail")
    transport: Any = SimpleNamespace(mail=mail, facts=SimpleNamespace(world_size=2))
    for shapes in (("two", "two"), ("two", "latent")):
        for rank, shape in enumerate(shapes):
            mail.post(rank, WorkerFacts(rank=rank, world_size=2, pid=1, groups=SHAPES[shape], layout={}))
        if shapes[0] == shapes[1]:
            assert [facts.groups for facts in worker_facts(transport)] == [SHAPES["two"]] * 2
    with pytest.raises(LawBroken, match=r"worker 0 has full: .*worker 1 has latent: "):
        worker_facts(transport)


# --- blocks of several KV cache groups


def pages(head_dim: int, layers: Sequence[int], seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {f"model.layers.{layer}.attn": torch.randn(9, 2, 16, 2 * head_dim, generator=generator) for layer in layers}


def test_each_group_is_copied_by_its_own_block_table(lab: Lab) -> None:
    """Two full groups of different head size, their layers not neighbours; blocks of one are never the other's."""
    caches = pages(8, (0, 2), 1), pages(4, (1, 3), 2)
    layouts = tuple(TorchPages(one) for one in caches)
    groups = cache_groups(layouts, 2)
    assert [str(group) for group in groups] == [
        "full: layers 0,2, 2 KV heads of 8, float32", "full.1: layers 1,3, 2 KV heads of 4, float32",
    ]  # fmt: skip
    arena = HostCache(1 << 24, None, RankGroups(groups), spill_nbytes=0, shares=Shares())
    copier = Copier(layouts, arena)
    here, there = ((3, 1, 4), (2, 7, 5)), ((0, 6, 8), (1, 0, 3))
    record = HostRecord(tuple(copier.save(here, 0, 40, ME)), 0)
    copier.load(there, record, 0, 40)
    for layout, source, target in zip(layouts, here, there, strict=True):
        read = [torch.empty(2, 2, 2, 40, layout.head_dim) for _ in range(2)]
        layout.gather(source, 0, 40, read[0])
        layout.gather(target, 0, 40, read[1])
        assert torch.equal(*read)
    copier.close()


def test_layouts_are_one_for_each_group_and_strange_caches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thaw.engines.vllm.worker.layout.make_layout", TorchPages)
    one, two = pages(8, (0, 2), 1), pages(4, (1, 3), 2)
    found = make_layouts({**one, **two}, [list(one), list(two)])
    assert [layout.layer_names for layout in found] == [layer_order(one), layer_order(two)]
    with pytest.raises(Exception, match=r"layers\.1\.attn.*no KV cache group"):
        make_layouts({**one, **two}, [["model.layers.0.attn"], ["model.layers.2.attn"]])


class Pool:
    """vLLM's block pool, as far as it is asked: a block of each group for a hash."""

    def __init__(self, blocks: dict[bytes, tuple[int, ...]]) -> None:
        self._of = blocks
        self.blocks = {
            b: SimpleNamespace(block_id=b, block_hash=(h, g)) for h, ids in blocks.items() for g, b in enumerate(ids)
        }

    def get_cached_block(self, block_hash: bytes, groups: list[int]) -> list[Any] | None:
        found = self._of.get(block_hash)
        return None if found is None else [self.blocks[found[group]] for group in groups]


def test_a_block_of_any_group_that_is_not_the_sessions_own_is_foreign() -> None:
    contents = BlockContents(2)
    tables = ((11, 12, 13), (21, 22, 23))
    mine = Known([0] * 48, 48, [])
    contents.note_computed(mine, tables, 3)
    request = SimpleNamespace(block_hashes=[b"a", b"b", b"c"])
    contents.pool = Pool(dict(zip(request.block_hashes, zip(*tables, strict=True), strict=True)))
    assert not contents.hits_foreign(request, mine.chain) and not contents.hits_foreign(request, mine.chain)
    assert contents.resident(mine) == [11, 21, 12, 22, 13, 23]
    contents.renew([22])  # of the second group alone
    assert contents.hits_foreign(request, mine.chain)
    assert contents.resident(mine) == [11, 21]
    contents.note_loaded(mine, tables, 1, 2)
    assert not contents.hits_foreign(request, mine.chain)
    contents.renew([22])
    contents.step_begins()
    other = Known([0] * 32, 32, [])
    contents.note_computed(other, ((11, 12), (21, 22)), 2)
    assert other.chain[0] == mine.chain[0] and other.chain[1] not in mine.chain, "half of it is another's"


# --- a worker's records


def worker_side(groups: Sequence[CacheGroup], mail: Mailbox) -> tuple[WorkerSide, TorchPages]:
    """A worker of one group, with 9 blocks of 16 tokens."""
    (group,) = groups
    assert isinstance(group, FullKV)
    numel = group.num_kv_heads * 9 * 16 * 2 * group.head_dim
    layers = {
        f"model.layers.{n}.attn": torch.zeros(numel).view(9, group.num_kv_heads, 16, -1)
        for n in range(group.num_layers)
    }
    facts, pages = WorkerFacts(rank=0, world_size=1, pid=1, groups=(group,), layout={}), TorchPages(layers)
    return WorkerSide((pages,), facts, VllmSettings(arena_nbytes=1 << 24), mail, None), pages


def test_a_record_that_is_let_go_of_while_a_plan_is_read_is_not_kept(tmp_path: Path, lab: Lab) -> None:
    """Its client went away meanwhile, so nobody would ever drop it."""
    with load_engine("fake", groups="one") as engine:
        captured, plan = captured_of(engine, lab)
    mail = Mailbox(tmp_path / "mail")
    mail.put_plan(LEFT, plan)
    mail.put_plan(KEPT, plan)
    side, _ = worker_side(captured.identity.groups, mail)
    gate, read = threading.Event(), side._packing.read

    def late(plan: HydratePlan, *more: Any) -> Any:
        gate.wait(10)
        return read(plan, *more)

    side._packing.read = late  # type: ignore[method-assign]
    side.run([jobs.ReadPlan(LEFT, LEFT, ME), jobs.ReadPlan(KEPT, KEPT, ME)])
    side.run([jobs.Forget((LEFT,))])
    gate.set()
    side.close()
    assert list(side._records) == [KEPT] and side._records[KEPT].num_kv == plan.num_kv
    side.run([jobs.Forget((KEPT,))])
    assert not side._records and side._reading == set()


def test_what_cannot_be_saved_while_the_cache_is_unmapped_costs_its_own_request(tmp_path: Path) -> None:
    """Its blocks go back at once. The control: where the cache is there they do once they are copied."""
    with load_engine("fake", groups="one") as engine:
        (group,) = engine.identity().groups
    side, pages = worker_side([msgspec.structs.replace(group, dtype="float32")], Mailbox(tmp_path / "mail"))
    save = [jobs.ForkRecord(KEPT, None, 0, ME), jobs.SaveBlocks(KEPT, ((1, 2),), 20, finished="r")]
    side.let_go()
    side.run(save)
    assert side.finished() == ({"r"}, set(), set())
    assert "asleep" in side._records[KEPT].broken and side._records[KEPT].num_kv == 0
    side.take_back((pages,), None)
    side.run(save)
    side._copier.settle()
    assert side.finished() == ({"r"}, set(), set())
    assert side._records[KEPT].num_kv == 20
    side.close()
