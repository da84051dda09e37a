"""Laws of streamed blobs: each is handed on once, whole and verified; what is wrong is never handed on."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import pytest
from msgspec.structs import replace

from thaw.core.errors import CorruptBlob, ThawError
from thaw.data.locations import BlobLocation
from thaw.data.pack import MissingPack, PackItem, stream_blobs, write_pack

NAMES = ("a.safetensors", "b.safetensors")
SIZES = (1, 63, 5000, 1 << 20, 70_000)


@pytest.fixture
def blobs(tmp_path: Path) -> dict[BlobLocation, bytes]:
    """Blobs of all sizes in two packs."""
    found = {}
    for number, name in enumerate(NAMES):
        data = [bytes((i + number + j) % 251 for j in range(1009)) * (size // 1009 + 1) for i, size in enumerate(SIZES)]
        items = [PackItem("", "U8", (len(d),), len(d), lambda d=d: d) for d in data]  # type: ignore[misc]
        found |= dict(zip(write_pack(tmp_path, name, items).blobs, data, strict=True))
    return found


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_each_is_handed_on_once_and_whole(blobs: dict[BlobLocation, bytes], tmp_path: Path, threads: int) -> None:
    wanted, got, lock = [*blobs, *blobs], list[tuple[int, bytes]](), threading.Lock()

    def use(i: int, data: memoryview) -> None:
        with lock:
            got.append((i, bytes(data)))

    stats = stream_blobs(tmp_path, wanted, use, threads=threads)
    assert sorted(got) == [(i, blobs[location]) for i, location in enumerate(wanted)]
    assert stats.nbytes == sum(location.nbytes for location in wanted)


def test_nothing_asked_for_is_nothing_read(tmp_path: Path) -> None:
    assert stream_blobs(tmp_path, [], lambda i, data: pytest.fail("nobody asked"), threads=4).nbytes == 0


@pytest.mark.parametrize("which", range(len(SIZES)))
def test_a_changed_byte_is_found_and_never_handed_on(
    blobs: dict[BlobLocation, bytes], tmp_path: Path, which: int
) -> None:
    bad = list(blobs)[which]
    with open(tmp_path / bad.pack, "r+b") as file:
        file.seek(bad.offset + bad.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    seen: list[int] = []
    with pytest.raises(CorruptBlob, match=bad.blob):
        stream_blobs(tmp_path, list(blobs), lambda i, data: seen.append(i), threads=3)
    assert which not in seen


def test_a_pack_that_is_missing_cut_off_or_outside_is_refused_before_anything_is_read(
    blobs: dict[BlobLocation, bytes], tmp_path: Path
) -> None:
    def never(i: int, data: memoryview) -> None:
        pytest.fail("handed on")

    some = list(blobs)
    for wrong, error in (
        (replace(some[0], pack="gone.safetensors"), MissingPack),
        (replace(some[0], offset=1 << 40), CorruptBlob),
        (replace(some[0], offset=-1), CorruptBlob),
        (replace(some[0], nbytes=0), CorruptBlob),
        (replace(some[0], pack="../a.safetensors"), ThawError),
    ):
        with pytest.raises(error):
            stream_blobs(tmp_path, [*some, wrong], never, threads=2)


def test_who_uses_them_may_fail_and_the_others_end(blobs: dict[BlobLocation, bytes], tmp_path: Path) -> None:
    seen: list[int] = []

    def use(i: int, data: memoryview) -> None:
        seen.append(i)
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        stream_blobs(tmp_path, list(blobs) * 50, use, threads=2)
    assert len(seen) <= 2


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_holds_nobodys_memory_once_it_is_handled(
    blobs: dict[BlobLocation, bytes], tmp_path: Path, threads: int
) -> None:
    """Not even until Python's collector comes by, which may be long after in an engine that is idle."""

    class Memory:
        pass

    def read(memory: Memory) -> None:
        def use(i: int, data: memoryview) -> None:
            raise OSError(f"no room in {memory}")

        stream_blobs(tmp_path, list(blobs), use, threads=threads)

    memory = Memory()
    gone = weakref.ref(memory)
    gc.disable()
    try:
        try:
            read(memory)
        except OSError:
            failed = True
        del memory
        assert failed
        assert gone() is None
    finally:
        gc.enable()
