"""KV on its way: a tier from which an engine of this process reads what a fetch writes, while it is written.

A fetch says what it will bring, in the order in which it comes (`Arrival`), and of each blob when it lies in the local
pack that is being written. Whoever reads one that has not landed waits for it, so a session hydrates while it is
downloaded, and each byte is downloaded once. As from every tier, bytes are verified by who reads them. Engines of other
processes of this host read the same through a progress file (`thaw.remote.landing`).

To an engine it is one pack, with blobs at offsets in the order of their arrival: engines read a pack from its start on.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from thaw.core.errors import StorageFailed
from thaw.core.ids import CommitId
from thaw.core.objects import AnyObject
from thaw.data import tiers
from thaw.data.locations import BlobLocation, TierAddress
from thaw.data.tiers.base import MissingPack, NewPack
from thaw.data.tiers.folder import Folder, open_file
from thaw.remote.landing import PREFIX, REQUESTS, EndToEnd, ProgressFile, folder_address, read_landed
from thaw.store import Ref, Store
from thaw.store.objects import expect

T = TypeVar("T")
SCHEME = "arriving"
_OPEN: dict[str, Arrival] = {}
tiers.OWN[SCHEME] = "thaw.remote.arriving:open_arriving"
"""Here and not an entry point: an address means something in this process alone, and while the fetch runs."""


class Arrival:
    """What one fetch brings. `landed` and `fail` are called by the fetch's threads, all else by any. Close it."""

    def __init__(self, blobs: Sequence[tuple[str, int]]) -> None:
        """`blobs`: (id, bytes) in the order in which they arrive."""
        self._token = secrets.token_hex(8)
        self.pack = f"{PREFIX}{self._token}.safetensors"
        self._numbers = {blob: number for number, (blob, _) in enumerate(blobs)}
        self._layout = EndToEnd([nbytes for _, nbytes in blobs])
        self.nbytes = self._layout.nbytes
        self.places = {
            blob: BlobLocation(blob=blob, pack=self.pack, offset=start, nbytes=nbytes)
            for (blob, nbytes), start in zip(blobs, self._layout.starts, strict=True)
        }
        self._landed = dict[int, tuple[int, int]]()
        self._began, self._nbytes_landed = time.monotonic(), 0
        self._files: list[int] = []
        self._failed = False
        self._progress: ProgressFile | None = None
        self._changed = threading.Condition()
        _OPEN[self._token] = self

    @property
    def address(self) -> TierAddress:
        return TierAddress(url=f"{SCHEME}://{self._token}")

    @property
    def is_whole(self) -> bool:
        """Whether all has landed."""
        with self._changed:
            return len(self._landed) == len(self._numbers)

    def post(self, packs: Path) -> TierAddress:
        """Tells the processes of this host, too, what lands in this folder of packs; the tier from which they read it.
        Before anything has landed, and once. Raises `StorageFailed`."""
        progress = ProgressFile(packs, self.pack, self._layout.sizes)
        with self._changed:
            self._progress = progress
        return folder_address(packs)

    def wait_until_near(self, seconds: float) -> None:
        """Returns when the rest will have landed in about so many seconds, by the rate so far; or when none will."""
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._seconds_left() <= seconds)

    def _seconds_left(self) -> float:
        if not self._nbytes_landed:
            return float("inf") if self.nbytes else 0.0
        spent = time.monotonic() - self._began
        return spent * (self.nbytes / self._nbytes_landed - 1)

    def keep(self, file: int) -> None:
        """A descriptor of a file that blobs land in, to be closed with this."""
        with self._changed:
            self._files.append(file)

    def landed(self, blob: str, pack: str, file: int, offset: int) -> None:
        """A blob lies in the local pack `pack`, which is `file`. Raises `StorageFailed`."""
        number = self._numbers[blob]
        with self._changed:
            if self._progress is not None:
                self._progress.landed(number, pack, offset)
            self._landed[number] = file, offset
            self._nbytes_landed += self._layout.sizes[number]
            self._changed.notify_all()

    def fail(self) -> None:
        """What has not landed never will: who waits for it is told so. Idempotent."""
        with self._changed:
            if self._progress is not None and not self._failed:
                self._progress.end()
            self._failed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Once nobody reads any more. Idempotent."""
        self.fail()
        _OPEN.pop(self._token, None)
        with self._changed:
            progress, self._progress = self._progress, None
            if progress is not None:
                progress.close()
            while self._files:
                os.close(self._files.pop())

    def fill(self, view: memoryview, offset: int) -> None:
        """Fills `view` with what lies at `offset`, once it is there."""
        for part in self._layout.parts(view, offset):
            file, begin = self._wait_for(part.number)
            read_landed(file, part.view, begin + part.begin)

    def _wait_for(self, number: int) -> tuple[int, int]:
        with self._changed:
            self._changed.wait_for(lambda: self._failed or number in self._landed)
            if number not in self._landed:
                blob = next(blob for blob, one in self._numbers.items() if one == number)
                raise StorageFailed(f"blob {blob} did not arrive: the fetch that was to bring it ended before.")
            return self._landed[number]


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
            yield _LandingPack(self, self._arrival, pack, name, file)


class _LandingPack:
    def __init__(self, packs: LandingPacks, arrival: Arrival, pack: NewPack, name: str, file: int) -> None:
        self._packs, self._arrival, self._pack, self._name, self._file = packs, arrival, pack, name, file

    def write(self, data: memoryview, offset: int) -> None:
        self._pack.write(data, offset)
        blob, self._packs.next = self._packs.next, None
        if blob is not None:
            self._arrival.landed(blob, self._name, self._file, offset)

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
