"""Laws of tiers and mounts: what is written is read again, from the first tier that has it; nothing unverified is
handed on, whatever a tier does; its errors are thaw's."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import distant_tier
from thaw.core.errors import CorruptBlob, InvalidRequest, NotFound, StorageFailed, ThawError, Unsupported
from thaw.data import tiers
from thaw.data.locations import BlobLocation, StoreMount, TierAddress
from thaw.data.pack import MissingPack, PackItem, read_blob, read_blobs, stream_blobs, write_pack
from thaw.data.tiers.base import ReadExtents, Requests, WritePack
from thaw.data.tiers.folder import folder_mount, folder_of
from thaw.data.tiers.mounted import Mounted

if TYPE_CHECKING:
    from distant.server import Vault

SIZES = (1, 63, 5000, 70_000, 1 << 20, (1 << 20) + 77, 3 << 20)
NAMES = ("a.safetensors", "b.safetensors")
NOWHERE = TierAddress(url="distant://127.0.0.1:1")
Blobs = dict[BlobLocation, bytes]
Read = Callable[[Mounted, list[BlobLocation]], list[bytes]]


@pytest.fixture(scope="module")
def server() -> Iterator[Vault]:
    with distant_tier.installed() as vault:
        yield vault


@pytest.fixture
def vault(server: Vault) -> Vault:
    server.packs.clear()
    server.forget()
    return server


@pytest.fixture(params=["folder", "distant"])
def mount(request: pytest.FixtureRequest, vault: Vault, tmp_path: Path) -> StoreMount:
    return folder_mount("7" * 32, tmp_path) if request.param == "folder" else distant_tier.mount_of(vault)


def item(data: bytes) -> PackItem:
    return PackItem("", "U8", (len(data),), len(data), lambda: data)


def fill(mount: StoreMount, number: int = 0) -> Blobs:
    """Blobs of all sizes in two packs."""
    found: Blobs = {}
    for i, name in enumerate(NAMES):
        data = [bytes((i + number + j + size) % 251 for j in range(1009)) * (size // 1009 + 1) for size in SIZES]
        data = [one[:size] for one, size in zip(data, SIZES, strict=True)]
        written = write_pack(Mounted(mount), name, [item(one) for one in data])
        found |= dict(zip(written.blobs, data, strict=True))
    return found


def into_place(mounted: Mounted, locations: list[BlobLocation]) -> list[bytes]:
    memory = [bytearray(location.nbytes) for location in locations]
    read_blobs(mounted, [(place, memoryview(data)) for place, data in zip(locations, memory, strict=True)])
    return [bytes(data) for data in memory]


def through_scratch(mounted: Mounted, locations: list[BlobLocation]) -> list[bytes]:
    found = [b""] * len(locations)
    stream_blobs(mounted, locations, lambda i, data: found.__setitem__(i, bytes(data)), threads=2)
    return found


def one_by_one(mounted: Mounted, locations: list[BlobLocation]) -> list[bytes]:
    return [read_blob(mounted, location) for location in locations]


@pytest.fixture(params=[into_place, through_scratch, one_by_one], ids=lambda read: read.__name__)
def read(request: pytest.FixtureRequest) -> Read:
    return request.param  # type: ignore[no-any-return]


# -- every tier


def test_what_is_written_is_read_again(mount: StoreMount, read: Read) -> None:
    blobs = fill(mount)
    wanted = [*blobs, *reversed(blobs)]
    assert read(Mounted(mount), wanted) == [blobs[location] for location in wanted]


def test_a_tier_reads_and_writes(mount: StoreMount) -> None:
    tier = tiers.open_tier(mount.tiers[0])
    assert isinstance(tier, ReadExtents) and isinstance(tier, WritePack)
    assert tiers.open_tier(mount.tiers[0]) is tier, "it is opened once"


def test_a_pack_that_is_there_is_never_replaced(mount: StoreMount, read: Read) -> None:
    blobs = fill(mount)
    with pytest.raises(StorageFailed, match=r"exists|is there"):
        write_pack(Mounted(mount), NAMES[0], [item(b"other")])
    assert read(Mounted(mount), list(blobs)) == list(blobs.values())


def test_a_pack_whose_writing_fails_is_not_there_and_the_error_stays_what_it_was(mount: StoreMount) -> None:
    def broken() -> bytes:
        raise ZeroDivisionError("no bytes")

    with pytest.raises(ZeroDivisionError, match="no bytes"):
        write_pack(Mounted(mount), NAMES[0], [item(b"first"), PackItem("", "U8", (3,), 3, broken)])
    with pytest.raises(MissingPack):
        Mounted(mount).open_pack(NAMES[0])
    assert fill(mount)


def test_a_missing_pack_and_one_that_is_cut_off_are_named(mount: StoreMount, read: Read) -> None:
    (first, *_), gone = fill(mount), "gone.safetensors"
    with pytest.raises(MissingPack, match=gone):
        read(Mounted(mount), [BlobLocation(blob=first.blob, pack=gone, offset=first.offset, nbytes=first.nbytes)])
    with pytest.raises(CorruptBlob, match="cut off"):
        read(Mounted(mount), [BlobLocation(blob=first.blob, pack=first.pack, offset=1 << 40, nbytes=first.nbytes)])


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "a/b.safetensors", "", "a.txt"])
def test_a_pack_is_a_plain_name(mount: StoreMount, read: Read, name: str) -> None:
    with pytest.raises(ThawError):
        read(Mounted(mount), [BlobLocation(blob="b3:" + "0" * 64, pack=name, offset=0, nbytes=4)])
    with pytest.raises(InvalidRequest):
        write_pack(Mounted(mount), name, [item(b"x")])


# -- in their order


def test_a_pack_comes_from_the_first_tier_that_has_it(vault: Vault, tmp_path: Path, read: Read) -> None:
    near = folder_mount("7" * 32, tmp_path)
    both = distant_tier.mount_of(vault, *near.tiers)
    blobs = fill(distant_tier.mount_of(vault))
    write_pack(Mounted(near), "c.safetensors", [item(b"near")])
    (tmp_path / NAMES[0]).write_bytes(vault.packs[NAMES[0]])
    vault.forget()
    assert read(Mounted(both), list(blobs)) == list(blobs.values())
    assert {pack for pack, _, _ in vault.ranges} == {NAMES[1]}
    with pytest.raises(MissingPack, match=rf"none of the store's tiers: file://.*, {vault.url}"):
        Mounted(both).open_pack("gone.safetensors")


def test_packs_are_written_into_the_first_tier_alone(vault: Vault, tmp_path: Path) -> None:
    fill(distant_tier.mount_of(vault, *folder_mount("7" * 32, tmp_path).tiers))
    assert not vault.packs and len(list(tmp_path.iterdir())) == len(NAMES)


def test_a_tier_that_only_reads_cannot_come_first_where_packs_are_written(vault: Vault, read: Read) -> None:
    blobs = fill(distant_tier.mount_of(vault))
    only = TierAddress(url=vault.url.replace("distant", "distant-read"))
    mounted = Mounted(StoreMount(uuid="7" * 32, tiers=(only, NOWHERE)))
    assert read(mounted, list(blobs)) == list(blobs.values())
    with pytest.raises(Unsupported, match=only.url):
        write_pack(mounted, "c.safetensors", [item(b"x")])


def test_a_tier_that_is_not_asked_is_not_opened_and_may_be_of_a_kind_that_nobody_has(
    tmp_path: Path, read: Read
) -> None:
    near = folder_mount("7" * 32, tmp_path)
    blobs = fill(near)
    both = StoreMount(uuid=near.uuid, tiers=(*near.tiers, TierAddress(url="tape://shelf/3")))
    assert read(Mounted(both), list(blobs)) == list(blobs.values())
    with pytest.raises(NotFound, match=r"tape://.*there are: .*file.*Install"):
        Mounted(both).open_pack("gone.safetensors")


def test_a_tier_that_fails_is_an_error_and_no_other_is_asked(vault: Vault) -> None:
    blobs = fill(distant_tier.mount_of(vault))
    vault.forget()
    with pytest.raises(StorageFailed, match=f"{NOWHERE.url}.*refused"):
        into_place(Mounted(distant_tier.mount_of(vault, NOWHERE)), list(blobs))
    assert not vault.ranges


# -- what a tier does wrong


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("down", StorageFailed), ("cut", StorageFailed), ("short", StorageFailed), ("silent", StorageFailed),
        ("flip", CorruptBlob),
    ],
)  # fmt: skip
def test_what_it_does_wrong_is_thaws_error_with_its_address(
    vault: Vault, read: Read, fault: str, error: type[ThawError]
) -> None:
    blobs = fill(distant_tier.mount_of(vault))
    mount = distant_tier.mount_of(vault)
    vault.fault = fault
    with pytest.raises(error, match="hashes to" if error is CorruptBlob else vault.url):
        read(Mounted(distant_tier.hasty(mount) if fault == "silent" else mount), list(blobs))
    vault.fault = ""
    assert read(Mounted(mount), list(blobs)) == list(blobs.values())


def test_a_pack_that_could_not_be_put_is_an_error(vault: Vault) -> None:
    vault.fault = "down"
    with pytest.raises(StorageFailed, match=f"cannot write {vault.url}.*503"):
        fill(distant_tier.mount_of(vault))
    assert not vault.packs


def test_one_that_says_nonsense_of_how_it_is_read_is_named(
    vault: Vault, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distant.tier import Distant

    blobs = fill(distant_tier.mount_of(vault))
    monkeypatch.setattr(Distant, "open_pack", lambda self, name: SimpleNamespace(nbytes=9, requests=Requests(0, 0)))
    with pytest.raises(StorageFailed, match=f"{vault.url}: it asks to be read 0 bytes at a time"):
        read(Mounted(distant_tier.mount_of(vault)), list(blobs))


@pytest.mark.parametrize("which", range(len(SIZES)))
def test_a_changed_byte_is_never_handed_on(vault: Vault, which: int) -> None:
    blobs = fill(distant_tier.mount_of(vault))
    bad, seen = list(blobs)[which], list[int]()
    data = bytearray(vault.packs[bad.pack])
    data[bad.offset + bad.nbytes // 2] ^= 1
    vault.packs[bad.pack] = bytes(data)
    mounted = Mounted(distant_tier.mount_of(vault))
    with pytest.raises(CorruptBlob, match=bad.blob):
        stream_blobs(mounted, list(blobs), lambda i, data: seen.append(i), threads=3)
    assert which not in seen
    with pytest.raises(CorruptBlob, match=bad.blob):
        into_place(mounted, list(blobs))


# -- how a tier is read


def test_it_gets_as_many_requests_at_a_time_as_it_takes_and_neighbours_are_one(vault: Vault, read: Read) -> None:
    blobs = fill(distant_tier.mount_of(vault))
    vault.forget()
    vault.delay_s = 0.1
    assert read(Mounted(distant_tier.mount_of(vault, num_parallel=5)), list(blobs)) == list(blobs.values())
    if read is one_by_one:
        return
    assert 2 <= vault.under_way_at_most <= 5
    small = [end - begin for _, begin, end in vault.ranges if begin < min(place.offset for place in blobs) + 5000]
    assert len(small) == len(NAMES) and min(small) > 63 + 5000, "the small ones came together"


def test_nothing_is_written_into_memory_any_more_when_a_read_has_failed(vault: Vault) -> None:
    """Requests that were under way have ended: the memory may be somebody else's by now."""
    blobs = fill(distant_tier.mount_of(vault))
    bad = max(blobs, key=lambda place: place.nbytes if place.pack == NAMES[0] else 0)
    data = bytearray(vault.packs[bad.pack])
    data[bad.offset] ^= 1
    vault.packs[bad.pack] = bytes(data)
    vault.delay_s = 0.2
    memory = [bytearray(place.nbytes) for place in blobs]
    with pytest.raises(CorruptBlob):
        read_blobs(
            Mounted(distant_tier.mount_of(vault, num_parallel=3)),
            [(place, memoryview(one)) for place, one in zip(blobs, memory, strict=True)],
        )
    then = [bytes(one) for one in memory]
    time.sleep(1.0)
    assert [bytes(one) for one in memory] == then
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("thaw-read")]


def test_an_error_of_a_request_holds_nobodys_memory_once_it_is_handled(vault: Vault) -> None:
    blobs = fill(distant_tier.mount_of(vault))
    mounted = Mounted(distant_tier.mount_of(vault))

    class Memory(bytearray):
        pass

    def failed() -> weakref.ref[Memory]:
        memory = Memory(max(place.nbytes for place in blobs))
        place = max(blobs, key=lambda place: place.nbytes)
        vault.fault = "down"
        try:
            read_blobs(mounted, [(place, memoryview(memory))])
        except StorageFailed:
            return weakref.ref(memory)
        raise AssertionError("it was read")

    gc.disable()
    try:
        assert failed()() is None
    finally:
        gc.enable()


# -- addresses and kinds


@pytest.mark.parametrize("name", ["plain", "with a space", "ä%20#?;", "\udcff not UTF-8"])
def test_a_folder_is_found_again_by_its_address(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    os.mkdir(os.fsencode(folder))
    mount = folder_mount("7" * 32, folder)
    assert folder_of(mount.tiers[0]) == folder and mount.tiers[0].url.isascii()
    blobs = fill(mount)
    assert into_place(Mounted(mount), list(blobs)) == list(blobs.values())


@pytest.mark.parametrize("url", ["file://elsewhere/packs", "file:relative", "file://", "relative", "file:"])
def test_what_names_no_folder_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match=r"names no folder|no tier is called"):
        Mounted(StoreMount(uuid="7" * 32, tiers=(TierAddress(url=url),))).open_pack(NAMES[0])


def test_a_mount_has_a_tier() -> None:
    with pytest.raises(InvalidRequest, match="names no tier"):
        Mounted(StoreMount(uuid="7" * 32, tiers=()))


def test_two_packages_with_one_kind_and_one_that_cannot_be_imported_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"twice": ["one:open", "two:open"], "broken": ["no_such_module:open"]}

    def points(*, group: str, name: str = "") -> list[EntryPoint]:
        assert group == "thaw.tiers"
        return [EntryPoint(name, value, group) for value in said.get(name, [])]

    monkeypatch.setattr("importlib.metadata.entry_points", points)
    with pytest.raises(InvalidRequest, match="two packages provide a tier twice://: one:open and two:open"):
        tiers.open_tier(TierAddress(url="twice://x"))
    with pytest.raises(NotFound, match="no_such_module"):
        tiers.open_tier(TierAddress(url="broken://x"))


def test_what_has_no_right_shape_is_no_tier(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind that raises as it is opened, whatever that is."""
    monkeypatch.setitem(tiers.OWN, "odd", "distant.tier:open_tier")
    with pytest.raises(StorageFailed, match="cannot open odd://no-port"):
        Mounted(StoreMount(uuid="7" * 32, tiers=(TierAddress(url="odd://no-port"),))).open_pack(NAMES[0])


def test_a_read_only_disk_says_so_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(StorageFailed, match=f"cannot read {tmp_path}.*permission denied"):
        Mounted(folder_mount("7" * 32, tmp_path)).open_pack(NAMES[0])
