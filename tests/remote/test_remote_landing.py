"""An engine in another process reads local packs while a fetch writes them; what it waits for comes, or it is told."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from hosts import kv_of, tree

import thaw
from entry import found
from thaw.core.errors import CorruptBlob, RemoteUnreachable, StorageFailed
from thaw.data.locations import StoreMount
from thaw.data.tiers.base import MissingPack
from thaw.remote import landing
from thaw.remote.arriving import Announced, Arrival
from thaw.remote.fetch import FetchWish, fetch
from thaw.remote.folder import FolderBucket
from thaw.remote.landing import EndToEnd, LandingFolder, ProgressFile, folder_address
from thaw.remote.opened import over
from thaw.repo import Repository

CHILD = Path(__file__).parent / "landing_child.py"
PACK = "zz-arriving-0.safetensors"
TEXT = "a document that is long enough to be shared. " * 60


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RUN_BYTES": 8192, "GAP_BYTES": 0, "SHARED_BYTES": 16384, "LOCAL_PACK_BYTES": 20000}.items():
        monkeypatch.setattr(f"thaw.remote.fetch.{name}", value)


@pytest.fixture
def entry(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "entry").mkdir()
    with found(tmp_path / "entry", "thaw.tiers", "landing", "thaw.remote.landing:open_landing"):
        yield


@contextmanager
def child(*words: str) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, str(CHILD), *words], text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


class Held(FolderBucket):
    """What lies behind 60 % of a pack is read only once `go` is set; `dead` ends the download there instead."""

    def __init__(self, root: Path, go: threading.Event, dead: bool = False) -> None:
        super().__init__(root)
        self._go, self._dead, self.begun, self.late = go, dead, threading.Event(), list[int]()

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        if self.begun.is_set() and ranges[0][0] > 0.6 * (self.size(key) or 1):
            if not self._go.wait(20):
                self.late.append(ranges[0][0])
            if self._dead:
                raise RemoteUnreachable("the line is dead")
        return super().read_ranges(key, ranges)


class Reader:
    """Starts a child on what is announced; sets `go` once it has read a blob, or failed."""

    def __init__(self, repo: Repository, bucket: Held, go: threading.Event, verb: str = "read") -> None:
        self._repo, self._bucket, self._go, self._verb = repo, bucket, go, verb
        self.arrival: Arrival | None = None
        self.said = list[str]()
        self._thread: threading.Thread | None = None

    def announce(self, told: Announced) -> None:
        self.arrival = told.arrival
        address = told.arrival.post(self._repo.store.packs)
        mount = StoreMount(uuid="0", tiers=(address,))
        words = [msgspec.json.encode(one).decode() for one in (mount, list(told.arrival.places.values()))]
        self._thread = threading.Thread(target=self._run, args=words)
        self._thread.start()
        self._bucket.begun.set()

    def _run(self, mount: str, places: str) -> None:
        with child(self._verb, mount, places) as process:
            assert process.stdout is not None and process.stderr is not None
            self.said.append(process.stdout.readline().strip())
            self._go.set()
            self.said += [*process.stdout.read().split(), process.stderr.read()]

    def close(self) -> None:
        assert self._thread is not None and self.arrival is not None
        self._thread.join(30)
        self.arrival.close()


def test_another_process_reads_while_the_last_bytes_are_still_to_come(
    here: Repository, bucket: Path, tmp_path: Path, entry: None
) -> None:
    tree(here, TEXT, 1)
    here.push(all=True)
    go = threading.Event()
    with thaw.open(tmp_path / "there", create=True) as there:
        held = Held(bucket, go)
        reader = Reader(there, held, go)
        fetch(there.store, over("origin", "", held, ""), FetchWish(("main",)), announce=reader.announce)
        reader.close()
        assert reader.arrival is not None
        assert reader.said == ["read", str(len(reader.arrival.places)), ""], "each blob was verified there"
        assert not held.late, "it read before the last bytes came"
        assert kv_of(there.store, there.resolve("origin/main").commit).keys() <= reader.arrival.places.keys()
        assert not list(there.store.packs.glob("*.tmp"))
        with pytest.raises(MissingPack):
            LandingFolder(there.store.packs).open_pack(reader.arrival.pack)


def test_a_wrong_byte_is_found_by_who_reads_it(here: Repository, bucket: Path, tmp_path: Path, entry: None) -> None:
    """The negative control: the child flips a bit of what it read. The fetch itself is whole."""
    tree(here, TEXT, 1)
    here.push(all=True)
    go = threading.Event()
    with thaw.open(tmp_path / "there", create=True) as there:
        held = Held(bucket, go)
        reader = Reader(there, held, go, "spoil")
        fetch(there.store, over("origin", "", held, ""), FetchWish(("main",)), announce=reader.announce)
        reader.close()
        assert "CorruptBlob" in reader.said[-1] and "read" not in reader.said
        assert there.fsck().ok


def test_it_is_told_where_the_download_ends_before(here: Repository, bucket: Path, tmp_path: Path, entry: None) -> None:
    tree(here, TEXT, 1)
    here.push(all=True)
    go = threading.Event()
    with thaw.open(tmp_path / "there", create=True) as there:
        held = Held(bucket, go, dead=True)
        reader = Reader(there, held, go)
        with pytest.raises(RemoteUnreachable):
            fetch(there.store, over("origin", "", held, ""), FetchWish(("main",)), announce=reader.announce)
        reader.close()
        assert reader.said[0] == "read" and "did not arrive: the fetch that was to bring it ended" in reader.said[-1]
        assert there.store.ref("origin/main") is None and there.fsck().ok


def progress_of(folder: Path, landed: bytes) -> ProgressFile:
    """Of a blob that has landed and one that has not."""
    progress = ProgressFile(folder, PACK, [len(landed), 4])
    (folder / "local.safetensors.tmp").write_bytes(b"xx" + landed)
    progress.landed(0, "local.safetensors", 2)
    return progress


def test_a_reader_is_not_held_by_a_download_that_stalls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landing, "STALL_S", 0.3)
    progress = progress_of(tmp_path, b"good")
    pack = LandingFolder(tmp_path).open_pack(PACK)
    data = bytearray(4)
    pack.read_into([memoryview(data)], 0)
    assert data == b"good" and pack.nbytes == 8
    with pytest.raises(StorageFailed, match=r"nothing has for 0\.3 s"):
        pack.read_into([memoryview(data)], 4)
    (tmp_path / "local.safetensors.tmp").rename(tmp_path / "local.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"late")
    progress.landed(1, "other.safetensors", 0)
    pack.read_into([memoryview(data)], 4)
    assert data == b"late", "it can be read once it is there"
    pack.close()
    progress.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_reader_notices_that_the_fetch_was_killed(tmp_path: Path, how: signal.Signals) -> None:
    with child("write", str(tmp_path), PACK) as process:
        assert process.stdout is not None and process.stdout.readline() == "written\n"
        pack = LandingFolder(tmp_path).open_pack(PACK)
        data = bytearray(4)
        pack.read_into([memoryview(data)], 0)
        assert data == b"good"
        threading.Timer(0.2, os.kill, (process.pid, how)).start()
        began = time.monotonic()
        with pytest.raises(StorageFailed, match="ended before"):
            pack.read_into([memoryview(data)], 4)
        assert 0.1 < time.monotonic() - began < landing.STALL_S / 2
        pack.close()


@pytest.mark.parametrize(
    "line",
    ["x", "1 2", "-1 0 local.safetensors", "1 0 ../local.safetensors", "1 0 /etc/passwd", "1 0 local.safetensors x"],
)
def test_a_progress_file_that_is_none_is_refused(tmp_path: Path, line: str) -> None:
    progress = progress_of(tmp_path, b"good")
    progress._add(line)
    pack = LandingFolder(tmp_path).open_pack(PACK)
    with pytest.raises(CorruptBlob, match="not what a fetch writes"):
        pack.read_into([memoryview(bytearray(4))], 4)
    pack.close()
    progress.close()


@pytest.mark.parametrize("data", [b"", b"\n", b"[]\n", b"[0]\n", b"{}\n", b"[1, -1]\n", b"[1", b"\xff\n", b'["1"]\n'])
def test_a_progress_file_without_sizes_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / f"{PACK}.tmp").write_bytes(data)
    with pytest.raises(CorruptBlob, match="not what a fetch writes"):
        LandingFolder(tmp_path).open_pack(PACK)
    with pytest.raises(MissingPack):
        LandingFolder(tmp_path).open_pack("local.safetensors")


def test_any_range_of_blobs_end_to_end_is_found() -> None:
    sizes = [3, 1, 5, 2]
    layout, whole = EndToEnd(sizes), bytes(range(sum(sizes)))
    for start, stop in itertools.combinations(range(len(whole) + 1), 2):
        out = memoryview(bytearray(stop - start))
        for number, begin, view in layout.parts(out, start):
            at = layout.starts[number] + begin
            assert begin + len(view) <= sizes[number]
            view[:] = whole[at : at + len(view)]
        assert bytes(out) == whole[start:stop]


def test_a_folder_with_any_name_is_found_by_its_address(tmp_path: Path) -> None:
    folder = tmp_path / "a b%20ü?#"
    folder.mkdir()
    progress = progress_of(folder, b"good")
    tier = landing.open_landing(folder_address(folder))
    tier.open_pack(PACK).close()
    progress.close()


def test_an_engine_is_asked_when_the_rest_will_soon_be_here(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count()
    monkeypatch.setattr("thaw.remote.arriving.time.monotonic", lambda: float(next(now)))
    arrival = Arrival([(str(n), 10) for n in range(10)])  # a second each
    left = [arrival._seconds_left()]
    for n in range(10):
        arrival.landed(str(n), "x", 0, 0)
        left.append(arrival._seconds_left())
    assert left[0] == float("inf") and left[1:] == pytest.approx([9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    arrival.close()
    waiting = Arrival([("a", 1)])
    thread = threading.Thread(target=waiting.wait_until_near, args=(5.0,))
    thread.start()
    waiting.close()
    thread.join(10)
    assert not thread.is_alive(), "nobody waits for a fetch that has ended"
