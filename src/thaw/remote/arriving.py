"""KV on its way: a tier from which an engine of this process reads what a fetch writes, while it is written.

A fetch says what it will bring, in the order in which it comes (`Arrival`), and of each blob when it lies in the local
pack that is being written. Whoever reads one that has not landed waits for it, so a session hydrates while it is
downloaded, and each byte is downloaded once. As from every tier, bytes are verified by who reads them.

To an engine it is one pack, with blobs at offsets in the order of their arrival: engines read a pack from its start on.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from thaw.core.errors import CorruptBlob, StorageFailed
from thaw.core.ids import CommitId
from thaw.core.objects import AnyObject
from thaw.data import tiers
from thaw.data.files import storage_errors
from thaw.data.locations import BlobLocation, TierAddress
from thaw.data.tiers.base import MissingPack, NewPack, Requests
from thaw.data.tiers.folder import Folder, open_file
from thaw.store import Ref, Store
from thaw.store.objects import expect

T = TypeVar("T")
SCHEME = "arriving"
REQUESTS = Requests(nbytes=4 << 20, gap_nbytes=0)
_OPEN: dict[str, Arrival] = {}
tiers.OWN[SCHEME] = "thaw.remote.arriving:open_arriving"
"""Here and not an entry point: an address means something in this process alone, and while the fetch runs."""


class Arrival:
    """What one fetch brings. `landed` and `fail` are called by the fetch's threads, all else by any. Close it."""

    def __init__(self, blobs: Sequence[tuple[str, int]]) -> None:
        """`blobs`: (id, bytes) in the order in which they arrive."""
        self._token = secrets.token_hex(8)
        self.pack = f"zz-{SCHEME}-{self._token}.safetensors"
        """Sorts behind names of local packs: what is here already is read first."""
        self.places: dict[str, BlobLocation] = {}
        self._ids, self._starts, self.nbytes = [blob for blob, _ in blobs], list[int](), 0
        for blob, nbytes in blobs:
            self._starts.append(self.nbytes)
            self.places[blob] = BlobLocation(blob=blob, pack=self.pack, offset=self.nbytes, nbytes=nbytes)
            self.nbytes += nbytes
        self._landed: dict[str, tuple[int, int]] = {}
        self._files: list[int] = []
        self._failed = False
        self._changed = threading.Condition()
        _OPEN[self._token] = self

    @property
    def address(self) -> TierAddress:
        return TierAddress(url=f"{SCHEME}://{self._token}")

    @property
    def is_whole(self) -> bool:
        """Whether all has landed."""
        with self._changed:
            return len(self._landed) == len(self._ids)

    def keep(self, file: int) -> None:
        """A descriptor of a file that blobs land in, to be closed with this."""
        with self._changed:
            self._files.append(file)

    def landed(self, blob: str, file: int, offset: int) -> None:
        with self._changed:
            self._landed[blob] = file, offset
            self._changed.notify_all()

    def fail(self) -> None:
        """What has not landed never will: who waits for it is told so."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Once nobody reads any more. Idempotent."""
        self.fail()
        _OPEN.pop(self._token, None)
        with self._changed:
            while self._files:
                os.close(self._files.pop())

    def fill(self, view: memoryview, offset: int) -> None:
        """Fills `view` with what lies at `offset`, once it is there."""
        while len(view):
            at = bisect_right(self._starts, offset) - 1
            place = self.places[self._ids[at]]
            file, begin = self._wait_for(place.blob)
            inside = offset - place.offset
            part = view[: place.nbytes - inside]
            _read(file, part, begin + inside)
            view, offset = view[len(part) :], offset + len(part)

    def _wait_for(self, blob: str) -> tuple[int, int]:
        with self._changed:
            self._changed.wait_for(lambda: self._failed or blob in self._landed)
            if blob not in self._landed:
                raise StorageFailed(f"blob {blob} did not arrive: the fetch that was to bring it ended before.")
            return self._landed[blob]


def _read(file: int, view: memoryview, offset: int) -> None:
    while len(view):
        with storage_errors("a pack that is being fetched", "read"):
            got = os.preadv(file, [view], offset)
        if not got:
            raise CorruptBlob(f"a pack that is being fetched ends at byte {offset}: it was cut")
        view, offset = view[got:], offset + got


class ArrivingPack:
    """See `OpenPack`."""

    requests = REQUESTS

    def __init__(self, arrival: Arrival) -> None:
        self._arrival, self.nbytes = arrival, arrival.nbytes

    def read_into(self, views: Sequence[memoryview], offset: int) -> None:
        for view in views:
            self._arrival.fill(view, offset)
            offset += len(view)

    def close(self) -> None:
        """It is closed with its arrival."""


class ArrivingPacks:
    """See `ReadExtents`."""

    def __init__(self, arrival: Arrival) -> None:
        self._arrival = arrival

    def open_pack(self, name: str) -> ArrivingPack:
        if name != self._arrival.pack:
            raise MissingPack(f"pack {name} is none that is being fetched")
        return ArrivingPack(self._arrival)


def open_arriving(address: TierAddress) -> ArrivingPacks:
    token = address.url.partition("://")[2]
    if token not in _OPEN:
        raise MissingPack(f"{address.url}: this fetch has ended, or it is another process's")
    return ArrivingPacks(_OPEN[token])


class LandingPacks:
    """A folder of packs that tells an arrival what is written into it. For one thread. See `WritePack`."""

    def __init__(self, arrival: Arrival, folder: Path) -> None:
        self._arrival, self._folder = arrival, folder
        self.next: str | None = None
        """The blob that is written next."""

    @contextlib.contextmanager
    def new_pack(self, name: str) -> Iterator[NewPack]:
        with Folder(self._folder).new_pack(name) as pack:
            file = open_file(self._folder / f"{name}.tmp")
            self._arrival.keep(file)
            yield _LandingPack(self, self._arrival, pack, file)


class _LandingPack:
    def __init__(self, packs: LandingPacks, arrival: Arrival, pack: NewPack, file: int) -> None:
        self._packs, self._arrival, self._pack, self._file = packs, arrival, pack, file

    def write(self, data: memoryview, offset: int) -> None:
        self._pack.write(data, offset)
        blob, self._packs.next = self._packs.next, None
        if blob is not None:
            self._arrival.landed(blob, self._file, offset)

    def end(self, nbytes: int) -> None:
        self._pack.end(nbytes)


class ArrivingStore(Store):
    """A store with what a fetch is bringing: its objects and points as if they were there, its blobs where they land.

    To read only, while the fetch runs; made by `over`.
    """

    _objects: Mapping[str, AnyObject]
    _points: Mapping[str, Ref]
    _arrival: Arrival

    @classmethod
    def over(
        cls, store: Store, objects: Mapping[str, AnyObject], points: Mapping[str, str], arrival: Arrival
    ) -> ArrivingStore:
        """`points`: commits by the names that they will have here."""
        view = object.__new__(cls)
        refs = {name: Ref(name=name, kind="tag", target=CommitId(commit)) for name, commit in points.items()}
        view.__dict__.update(store.__dict__, namespace=store.namespace, _objects=objects, _points=refs)
        view._arrival = arrival
        return view

    def get(self, id: str) -> AnyObject:
        return self._objects[id] if id in self._objects else super().get(id)

    def get_as(self, id: str, kind: type[T]) -> T:
        return expect(self._objects[id], id, kind) if id in self._objects else super().get_as(id, kind)

    def ref(self, name: str) -> Ref | None:
        return self._points.get(name) or super().ref(name)

    def locate(self, blobs: Iterable[str]) -> dict[str, BlobLocation]:
        wanted, places = list(blobs), self._arrival.places
        here = super().locate(blob for blob in wanted if blob not in places)
        return {**here, **{blob: places[blob] for blob in wanted if blob in places}}

    @contextlib.contextmanager
    def reading(self, *roots: str) -> Iterator[None]:
        """The fetch holds a lease on all that it brings and builds on."""
        yield


class Announced(NamedTuple):
    """What a fetch says before it brings KV. `points`: commits by the names of their tracking points."""

    objects: Mapping[str, AnyObject]
    points: Mapping[str, str]
    arrival: Arrival
