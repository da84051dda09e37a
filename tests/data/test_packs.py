"""Laws of packs: valid safetensors, no holes, aligned, hashed, atomic, and nothing from outside is believed."""

from __future__ import annotations

import os
import resource
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from thaw.core.errors import CorruptBlob, InvalidRequest, StorageFailed, ThawError
from thaw.core.ids import digest
from thaw.data.header import BIG, OBJECT, align, build, parse
from thaw.data.locations import BlobLocation
from thaw.data.pack import MissingPack, PackItem, read_blob, read_blobs, read_header, write_pack

NAME = "p.safetensors"


def item(data: bytes, *, dtype: str = "U8", prefix: str = "") -> PackItem:
    size = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4}[dtype]
    return PackItem(prefix, dtype, (len(data) // size,), len(data), lambda: data)


_ITEMS = st.lists(
    st.builds(
        item,
        st.integers(1, 400)
        .map(lambda n: bytes(range(256)) * 2 * n)
        .flatmap(lambda b: st.binary(max_size=9).map(b.__add__)),
        prefix=st.sampled_from(["", OBJECT]),
    ),
    max_size=12,
)
_QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@_QUICK
@given(items=_ITEMS)
def test_what_was_packed_is_read_again_and_the_safetensors_library_agrees(
    items: list[PackItem], tmp_path: Path
) -> None:
    (tmp_path / NAME).unlink(missing_ok=True)
    result = write_pack(tmp_path, NAME, items, metadata={"who": "test"})
    assert result.nbytes == (tmp_path / NAME).stat().st_size
    with safe_open(tmp_path / NAME, "numpy") as library:
        names = set(library.keys())
        for one, place in zip(items, result.blobs, strict=True):
            assert place.blob == digest(one.read())
            assert library.get_tensor(one.name_prefix + place.blob).tobytes() == one.read()
            assert read_blob(tmp_path, place) == one.read()
        assert library.metadata()["who"] == "test"
    header = read_header(tmp_path / NAME)
    assert len(header.entries) == len(names)
    cursor = header.data_start
    for entry in header.entries:
        assert entry.offset == cursor, "no holes"
        assert entry.is_pad or entry.offset == align(entry.offset, entry.nbytes)
        cursor += entry.nbytes
    assert cursor == result.nbytes


def test_large_blobs_begin_at_pages_and_small_ones_at_lines(tmp_path: Path) -> None:
    result = write_pack(tmp_path, NAME, [item(b"a" * 5), item(b"b" * BIG), item(b"c" * 70), item(b"d" * (BIG + 1))])
    small, big, third, last = result.blobs
    assert big.offset % 4096 == last.offset % 4096 == 0
    assert small.offset % 64 == third.offset % 64 == 0
    with safe_open(tmp_path / NAME, "numpy") as library:
        assert library.get_tensor(last.blob).tobytes() == b"d" * (BIG + 1)


def test_equal_content_is_stored_once(tmp_path: Path) -> None:
    data = os.urandom(BIG)
    result = write_pack(tmp_path, NAME, [item(data), item(b"x"), item(data), item(b"y"), item(data)])
    assert result.blobs[0] == result.blobs[2] == result.blobs[4]
    assert result.nbytes < BIG + 8192
    assert read_blob(tmp_path, result.blobs[3]) == b"y"


def test_a_buffer_may_be_reused_for_the_next_item(tmp_path: Path) -> None:
    buffer = bytearray(300_000)

    def fill(value: int) -> PackItem:
        def read() -> bytearray:
            buffer[:] = bytes([value]) * len(buffer)
            return buffer

        return PackItem("", "U8", (len(buffer),), len(buffer), read)

    result = write_pack(tmp_path, NAME, [fill(value) for value in range(20)])
    for value, place in enumerate(result.blobs):
        assert read_blob(tmp_path, place) == bytes([value]) * len(buffer)


def test_items_are_read_once_in_order_on_the_calling_thread(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def one(number: int) -> PackItem:
        def read() -> bytes:
            seen.append((number, threading.get_ident()))
            return bytes([number]) * 100_000

        return PackItem("", "U8", (100_000,), 100_000, read)

    write_pack(tmp_path, NAME, [one(number) for number in range(9)])
    assert seen == [(number, threading.get_ident()) for number in range(9)]


def test_writing_holds_one_item_and_not_the_session(tmp_path: Path) -> None:
    import tracemalloc

    tracemalloc.start()
    write_pack(
        tmp_path,
        NAME,
        [PackItem("", "U8", (BIG,), BIG, lambda n=n: n.to_bytes(4, "little") * (BIG // 4)) for n in range(64)],
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * BIG


def test_a_pack_is_private_and_has_no_temporary_beside_it(tmp_path: Path) -> None:
    write_pack(tmp_path, NAME, [item(b"abc")])
    assert os.listdir(tmp_path) == [NAME]
    assert stat.S_IMODE((tmp_path / NAME).stat().st_mode) == 0o600


def test_a_pack_is_on_disk_before_it_has_its_name_and_its_name_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut leaves depends on this order: the bytes, the name, the folder that holds it."""
    done: list[tuple[str, Path]] = []
    fsync, rename = os.fsync, os.rename

    def synced(fd: int) -> None:
        fsync(fd)
        done.append(("synced", Path(os.readlink(f"/proc/self/fd/{fd}"))))

    def renamed(source: Any, target: Any) -> None:
        rename(source, target)
        done.append(("renamed", Path(target)))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    write_pack(tmp_path, NAME, [item(bytes(9))])
    assert done == [("synced", tmp_path / f"{NAME}.tmp"), ("renamed", tmp_path / NAME), ("synced", tmp_path)]


def test_a_failing_read_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="device is gone"):
        write_pack(tmp_path, NAME, [item(b"a" * BIG), PackItem("", "U8", (4,), 4, fail)])
    assert os.listdir(tmp_path) == []


def test_a_pack_is_never_overwritten(tmp_path: Path) -> None:
    write_pack(tmp_path, NAME, [item(b"first")])
    with pytest.raises(StorageFailed, match="exists already"):
        write_pack(tmp_path, NAME, [item(b"second")])
    assert os.listdir(tmp_path) == [NAME]


@pytest.mark.parametrize("name", ["../x.safetensors", "a/b.safetensors", "", "x", ".safetensors", "x.safetensors\n"])
def test_no_path_comes_from_outside(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest):
        write_pack(tmp_path, name, [])
    with pytest.raises(InvalidRequest):
        read_blobs(tmp_path, [(BlobLocation(blob="b3:" + "0" * 64, pack=name, offset=0, nbytes=1), None)])


def test_a_wrong_size_or_dtype_is_refused(tmp_path: Path) -> None:
    for bad in (PackItem("", "U8", (4,), 5, lambda: b"12345"), PackItem("", "I64", (1,), 8, lambda: b"12345678")):
        with pytest.raises(InvalidRequest):
            write_pack(tmp_path, NAME, [bad])
    with pytest.raises(InvalidRequest, match="announced"):
        write_pack(tmp_path, NAME, [PackItem("", "U8", (4,), 4, lambda: b"12345")])
    assert os.listdir(tmp_path) == []


def test_reads_verify_every_blob_and_name_the_bad_one(tmp_path: Path) -> None:
    places = write_pack(tmp_path, NAME, [item(os.urandom(200_000)) for _ in range(5)]).blobs
    with open(tmp_path / NAME, "r+b") as file:
        file.seek(places[2].offset + 7)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 16]))
    with pytest.raises(CorruptBlob, match=places[2].blob):
        read_blobs(tmp_path, [(place, None) for place in places])
    for place in (*places[:2], *places[3:]):
        read_blob(tmp_path, place)


def test_a_missing_or_cut_pack_is_named(tmp_path: Path) -> None:
    places = write_pack(tmp_path, NAME, [item(os.urandom(200_000)) for _ in range(5)]).blobs
    os.truncate(tmp_path / NAME, places[4].offset + 10)
    with pytest.raises(CorruptBlob, match=r"p\.safetensors.*cut off"):
        read_blob(tmp_path, places[4])
    read_blob(tmp_path, places[3])
    with pytest.raises(CorruptBlob, match="cut off"):
        read_header(tmp_path / NAME)
    (tmp_path / NAME).unlink()
    with pytest.raises(MissingPack, match=r"p\.safetensors is missing"):
        read_blob(tmp_path, places[0])


def test_a_target_must_fit(tmp_path: Path) -> None:
    (place,) = write_pack(tmp_path, NAME, [item(b"12345")]).blobs
    for bad in (memoryview(bytearray(4)), memoryview(b"12345")):
        with pytest.raises(InvalidRequest):
            read_blobs(tmp_path, [(place, bad)])


def _header() -> bytes:
    entries = []
    return build(entries, 512, {})


@_QUICK
@given(data=st.binary(max_size=300), size=st.integers(0, 1 << 62))
def test_a_hostile_header_raises_only_our_errors(data: bytes, size: int, tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(size.to_bytes(8, "little") + data)
    with pytest.raises(ThawError):
        read_header(path)


@settings(_QUICK, max_examples=200)
@given(st.data())
def test_a_header_that_signs_a_lie_raises_only_our_errors(tmp_path: Path, data: st.DataObject) -> None:
    """The digest is right, the JSON says anything: what an attacker can make."""
    leaf = st.one_of(st.integers(-(1 << 70), 1 << 70), st.floats(), st.text(max_size=5), st.none(), st.booleans())
    tensor = st.fixed_dictionaries(
        {
            "dtype": st.one_of(st.sampled_from(["U8", "F32", "BF16", "I64"]), leaf),
            "shape": st.one_of(st.lists(st.integers(0, 1 << 60), max_size=9), leaf),
            "data_offsets": st.one_of(st.lists(st.integers(0, 1 << 60), min_size=2, max_size=2), leaf),
        }
    )
    names = st.sampled_from(["b3:" + "a" * 64, "object b3:" + "b" * 64, "__pad_0", "x", "b3:A"])
    fields = data.draw(st.dictionaries(names, st.one_of(tensor, leaf), max_size=3))
    whole = _signed(fields)
    try:
        header = parse(whole, data.draw(st.integers(0, 1 << 40)), "pack x")
    except ThawError:
        return
    assert header.nbytes >= header.data_start == len(whole)


def _signed(fields: dict[str, object]) -> bytes:
    import json

    text = json.dumps(
        {"__metadata__": {"thaw.header": "b3:" + "0" * 64, "thaw.format": "1"}, **fields}, separators=(",", ":")
    )
    whole = bytearray(len(text).to_bytes(8, "little") + text.encode())
    start = whole.index(b"b3:" + b"0" * 64) + 3
    whole[start : start + 64] = digest(whole)[3:].encode()
    return bytes(whole)


def test_a_newer_pack_says_so(tmp_path: Path) -> None:
    whole = bytearray(_signed({}))
    whole = whole.replace(b'"thaw.format":"1"', b'"thaw.format":"9"')
    start = whole.index(b"b3:") + 3
    whole[start : start + 64] = b"0" * 64
    whole[start : start + 64] = digest(whole)[3:].encode()
    (tmp_path / NAME).write_bytes(whole)
    with pytest.raises(ThawError, match="newer thaw"):
        read_header(tmp_path / NAME)


@_QUICK
@given(st.data())
def test_any_flipped_bit_is_detected(tmp_path: Path, data: st.DataObject) -> None:
    """Header, padding or data: every bit of a pack is accounted for."""
    from thaw.store.scan import scan_pack

    path = tmp_path / NAME
    path.unlink(missing_ok=True)
    write_pack(tmp_path, NAME, [item(b"abc"), item(b"d" * 1000), item(b"{}", prefix=OBJECT)])
    assert scan_pack(path, deep=True).problems == []
    whole = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, len(whole) * 8 - 1))
    whole[bit // 8] ^= 1 << bit % 8
    path.write_bytes(whole)
    assert scan_pack(path, deep=True).problems


def test_a_file_size_limit_is_a_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            write_pack(tmp_path, NAME, [item(os.urandom(3 << 20))])
        except StorageFailed as error:
            os._exit(0 if "ulimit -f" in str(error) and NAME in str(error) else 2)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert os.listdir(tmp_path) == []
