"""Packs read by processes beside a worker: the bytes are those that threads read, nothing unverified is laid into the
arena, the worker waits twice a load, and whoever is killed takes no load and no memory along."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from thaw.core.errors import CorruptBlob
from thaw.data.fresh_process import with_this_thaw
from thaw.data.locations import TierAddress
from thaw.data.readers.orders import BlobRows, ReadOrder
from thaw.data.readers.reader import carry_out
from thaw.engines import load_engine
from thaw.engines.base import HydratePlan
from thaw.engines.served.budget import Shares
from thaw.engines.served.worker.rank_groups import RankGroups
from thaw.testing.laws.groups_law import least
from thaw.testing.laws.kit import Lab
from thaw.testing.plans import flip_byte, mount_at

torch = pytest.importorskip("torch")
from thaw.engines.served.worker.host_cache import HostCache  # noqa: E402 - it needs torch
from thaw.engines.served.worker.pack_io import PackIO, Read  # noqa: E402
from thaw.engines.served.worker.reader_processes import ReaderProcesses, readable  # noqa: E402

ME = "1" * 32
SHAPES = [("one", 1), ("two", 1), ("two", 3), ("hybrid", 1), ("hybrid", 2), ("latent", 3)]
LIMIT_S = 20.0


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(mount_at(tmp_path / "packs"))


def plan_of(lab: Lab, shape: str = "two", count: int = 600) -> HydratePlan:
    with load_engine("fake", groups=shape) as engine:
        return lab.plan(lab.capture(engine, lab.begin(engine, count)))


def packing(plan: HydratePlan, rank: int = 0, num_ranks: int = 1, *, readers: int = 2, nbytes: int = 1 << 24) -> PackIO:
    groups = RankGroups(plan.identity.groups, rank, num_ranks)
    arena = HostCache(nbytes, None, groups, spill_nbytes=1 << 24, shares=Shares(), shared=readers > 0)
    mail: Any = SimpleNamespace()
    return PackIO(groups, mail, arena, readers=readers)


@pytest.fixture
def plan(lab: Lab) -> HydratePlan:
    return plan_of(lab)


@pytest.fixture
def by_readers(plan: HydratePlan) -> Iterator[PackIO]:
    made = packing(plan)
    yield made
    made.close()


def readers_of(made: PackIO) -> ReaderProcesses:
    assert made.readers is not None
    return made.readers


def same(one: Read, other: Read) -> bool:
    """All bytes of a load."""
    left = [*one.pieces[0].tensors, *(t for token in sorted(one.points) for t in one.points[token])]
    right = [*other.pieces[0].tensors, *(t for token in sorted(other.points) for t in other.points[token])]
    return len(left) == len(right) and all(torch.equal(_bytes(a), _bytes(b)) for a, b in zip(left, right, strict=True))


def _bytes(tensor: Any) -> Any:
    return tensor.contiguous().view(-1).view(torch.uint8)


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_there(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(what: Callable[[], bool]) -> None:
    ends = time.monotonic() + LIMIT_S
    while not what():
        assert time.monotonic() < ends, "it did not come about"
        time.sleep(0.01)


@pytest.mark.parametrize(("shape", "num_ranks"), SHAPES)
def test_readers_lay_the_bytes_that_threads_read(shape: str, num_ranks: int, lab: Lab) -> None:
    plan = plan_of(lab, shape)
    for rank in range(num_ranks):
        own, threads = packing(plan, rank, num_ranks), packing(plan, rank, num_ranks, readers=0)
        for wanted in (plan, least(plan)):
            found = own.read(wanted, ME)
            assert same(found, threads.read(wanted, ME))
            assert own.counts()["reader_loads"] > 0
        found.pieces[0].tensors[0].view(torch.uint8).view(-1)[-1] ^= 1
        assert not same(found, threads.read(wanted, ME)), "one byte would be seen"
        own.close()


def test_the_worker_waits_twice_a_load_whatever_its_blobs(lab: Lab) -> None:
    waits = []
    for count in (300, 6000):
        plan = plan_of(lab, count=count)
        own = packing(plan, nbytes=1 << 26)
        own.read(plan, ME)
        waits.append(own.counts()["reader_waits"])
        own.close()
    assert waits == [2, 2]


@pytest.mark.parametrize("readers", [0, 1, 2])
def test_a_changed_byte_is_refused_by_name_and_the_next_load_works(lab: Lab, plan: HydratePlan, readers: int) -> None:
    own, victim = packing(plan, readers=readers), plan.slices[1].blobs["full"][0]
    before = own.read(plan, ME)
    flip_byte(lab.packs, victim, victim.nbytes // 2)
    with pytest.raises(CorruptBlob, match=rf"pack {victim.pack}: blob {victim.blob} .* hashes to b3:") as caught:
        own.read(plan, ME)
    del caught
    flip_byte(lab.packs, victim, victim.nbytes // 2)
    assert same(own.read(plan, ME), before)
    own.close()


def test_nothing_unverified_is_laid_into_the_arena(lab: Lab, plan: HydratePlan) -> None:
    victim = plan.slices[0].blobs["full"][0]
    flip_byte(lab.packs, victim)
    rows = BlobRows(1, 1, victim.nbytes, 0, 0, 0, 0, 0)
    arena = memoryview(bytearray(victim.nbytes))
    order = ReadOrder(lab.mount, ((victim, (rows,)),), 1)
    assert carry_out(order, arena).kind == CorruptBlob.kind
    assert not any(arena)
    flip_byte(lab.packs, victim)
    assert carry_out(order, arena).kind == "" and any(arena)


def test_a_place_behind_the_arena_is_an_error(lab: Lab, plan: HydratePlan) -> None:
    blob = plan.slices[0].blobs["full"][0]
    rows = BlobRows(1, 1, blob.nbytes, 0, 0, 0, 1, 0)
    found = carry_out(ReadOrder(lab.mount, ((blob, (rows,)),), 1), memoryview(bytearray(blob.nbytes)))
    assert found.kind == "storage-failed"


def test_a_missing_pack_is_named(lab: Lab, plan: HydratePlan, by_readers: PackIO) -> None:
    name = plan.slices[0].blobs["full"][0].pack
    (lab.packs / name).rename(lab.packs / "gone")
    with pytest.raises(CorruptBlob, match=f"pack {name} is missing") as caught:
        by_readers.read(plan, ME)
    assert caught.value.kind == "missing-pack"


def test_a_load_whose_reader_is_killed_is_read_by_threads(plan: HydratePlan, by_readers: PackIO) -> None:
    readers, expected = readers_of(by_readers), by_readers.read(plan, ME)
    assert readers.pid is not None
    while not readers.lost:  # the head may see the death before it sees the order
        found, before = list[Read](), readers._line.waits  # type: ignore[union-attr]
        victim = children(readers.pid)[0]
        os.kill(victim, signal.SIGSTOP)
        load = threading.Thread(target=lambda found=found: found.append(by_readers.read(plan, ME)))
        load.start()
        until(lambda before=before: readers._line.waits >= before + 2)  # type: ignore[misc,union-attr]
        time.sleep(0.02)
        os.kill(victim, signal.SIGKILL)
        load.join(LIMIT_S)
        assert same(found[0], expected)
    done = readers.loads
    until(lambda: len(children(readers.pid or 0)) == 2)
    assert same(by_readers.read(plan, ME), expected) and readers.loads == done + 1


def test_a_load_whose_head_is_killed_is_read_by_threads_once_no_reader_writes(
    plan: HydratePlan, by_readers: PackIO
) -> None:
    readers, expected, found = readers_of(by_readers), by_readers.read(plan, ME), list[Read]()
    assert readers.pid is not None
    head, before = readers.pid, readers._line.waits  # type: ignore[union-attr]
    others = children(head)
    os.kill(head, signal.SIGSTOP)
    load = threading.Thread(target=lambda: found.append(by_readers.read(plan, ME)))
    load.start()
    until(lambda: readers._line.waits >= before + 2)  # type: ignore[union-attr]
    os.kill(head, signal.SIGKILL)
    load.join(LIMIT_S)
    assert same(found[0], expected) and readers.lost == 1
    assert not any(map(is_there, [head, *others]))
    done = readers.loads
    assert same(by_readers.read(plan, ME), expected) and readers.loads == done + 1


def test_a_head_that_is_killed_between_loads_is_replaced(plan: HydratePlan, by_readers: PackIO) -> None:
    readers, expected = readers_of(by_readers), by_readers.read(plan, ME)
    head = readers.pid
    assert head is not None
    os.kill(head, signal.SIGKILL)
    until(lambda: not is_there(head))
    assert same(by_readers.read(plan, ME), expected)
    assert readers.pid != head and (readers.loads, readers.lost) == (2, 0)


def test_a_reader_that_is_killed_between_loads_is_replaced(plan: HydratePlan, by_readers: PackIO) -> None:
    readers, expected = readers_of(by_readers), by_readers.read(plan, ME)
    assert readers.pid is not None
    before = children(readers.pid)
    os.kill(before[0], signal.SIGKILL)
    until(lambda: len({*children(readers.pid or 0)} - {*before}) == 1)
    assert same(by_readers.read(plan, ME), expected) and readers.lost == 0


def test_what_is_spilled_or_far_away_is_read_by_threads(lab: Lab, plan: HydratePlan) -> None:
    small = packing(plan, nbytes=4096)
    assert same(small.read(plan, ME), packing(plan, readers=0).read(plan, ME))
    assert small.counts() == {"reader_loads": 0, "reader_waits": 0}
    small.close()
    far = type(lab.mount)(uuid=lab.mount.uuid, tiers=(*lab.mount.tiers, TierAddress(url="landing:///x")))
    assert readable(lab.mount) and not readable(far)


def test_nothing_is_left_after_close(plan: HydratePlan) -> None:
    def arenas() -> int:
        return sum("memfd:thaw-arena" in os.readlink(f"/proc/self/fd/{fd}") for fd in _open_files())

    before, own = arenas(), packing(plan)
    readers = readers_of(own)
    own.read(plan, ME)
    assert readers.pid is not None and arenas() > before
    processes = [readers.pid, *children(readers.pid)]
    assert len(processes) == 3
    own.close()
    own.close()
    assert not any(map(is_there, processes)) and readers.pid is None
    assert same(own.read(plan, ME), packing(plan, readers=0).read(plan, ME)) and readers.pid is None
    del own, readers
    assert arenas() == before


def _open_files() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


WORKER = """
import sys, time
from thaw.engines.served.worker.pinned_buffer import PinnedBuffer
from thaw.engines.served.worker.reader_processes import ReaderProcesses
readers = ReaderProcesses(2, PinnedBuffer(1 << 20, pin=False, shared=True))
print(readers.pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.slow("starts a process that imports torch")
def test_readers_end_with_a_worker_that_is_killed() -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER], stdout=subprocess.PIPE, env=with_this_thaw(os.environ), text=True
    )
    assert worker.stdout is not None
    head = int(worker.stdout.readline())
    processes = [head, *children(head)]
    assert len(processes) == 3 and all(map(is_there, processes))
    worker.kill()
    worker.wait()
    until(lambda: not any(map(is_there, processes)))


def test_the_head_knows_no_torch_and_no_engine(plan: HydratePlan, by_readers: PackIO) -> None:
    by_readers.read(plan, ME)
    head = readers_of(by_readers).pid
    assert head is not None
    for pid in (head, *children(head)):
        mapped = Path(f"/proc/{pid}/maps").read_text()
        assert "thaw-arena" in mapped and "libtorch" not in mapped and "numpy" not in mapped
