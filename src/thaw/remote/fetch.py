"""Fetch: commits that the namespace has not, with all that they need, straight into packs of the local store.

Manifests are read from the remote's refs back to commits that are here. Objects come first; what they name is followed
from each commit, so nothing is taken in that is not whole, and nothing that another namespace stored counts as here. KV
is then read ahead in long ranges and written into local packs, hashed on the way; a byte that is wrong is an error that
names blob and pack. Commits become visible parents first, about 1 GiB at a time, and tracking points at the end: an
interrupted fetch continues with the commits that it lacks.

With a depth only the commits near the tips are brought, each with all that it needs, wherever that lies in the remote.
Their parents that stay there are noted in the transaction that stores them (`thaw.store.shallow`).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from thaw.core.errors import Busy, CorruptBlob, NotFound, RemoteMissing
from thaw.core.ids import CommitId, digest, short
from thaw.core.objects import AnyObject, Commit, decode
from thaw.data.pack import PackItem, PackResult, write_pack
from thaw.remote import about, layout, refs, settings, tracking
from thaw.remote.arriving import Announced, Arrival, LandingPacks
from thaw.remote.errors import REPAIR
from thaw.remote.history import RemoteHistory
from thaw.remote.layout import Kind
from thaw.remote.local import LocalHistory, require_of
from thaw.remote.manifest import Manifest, PushedBlob, PushedObject
from thaw.remote.meter import TransferMeter
from thaw.remote.opened import OpenedRemote
from thaw.remote.parallel import SMALL_REQUESTS, ahead, mapped
from thaw.remote.refs import RemoteRef
from thaw.remote.report import Outcome, RefMoved, TransferReport
from thaw.store import RefUpdate, Store
from thaw.store.links import links

T = TypeVar("T")
RUN_BYTES, GAP_BYTES = 4 << 20, 1 << 20
"""One request reads so much, and along with it what lies between two pieces up to so far apart."""
AHEAD_BYTES = 48 << 20
"""Read and not yet written, at most (or two blobs for each writer). A process holds two to three times that: memory of
this size that was freed in one thread's heap is not used for another's."""
WRITERS = 2
"""Local packs that are written at a time: while one is synced, the other goes on."""
LOCAL_PACK_BYTES, LOCAL_PACK_ENTRIES = 256 << 20, 1 << 14
SHARED_BYTES = 16 << 20
"""What is no more than this is one local pack; more is shared by all writers."""
ATTEMPTS = 10
"""How often what was to be fetched may be gone, because refs moved on."""
GROUP_BYTES = 1 << 30
"""KV that becomes visible together, about."""


class FetchWish(NamedTuple):
    """Which of the remote's branches (None: all), which of its tags (True: all), and whether tracking points of
    branches that were deleted there go. `depth`: of each only so many commits, counted from its tip; what is here
    stays. None: back to commits that are here, wherever history ends there. `unshallow`: back to the beginning."""

    branches: tuple[str, ...] | None = None
    tags: bool | tuple[str, ...] = True
    prune: bool = False
    depth: int | None = None
    unshallow: bool = False


class _Piece(NamedTuple):
    """Something to read: where it lies."""

    id: str
    key: str
    offset: int
    nbytes: int


class _Run(NamedTuple):
    """Pieces of one pack that are read by one request."""

    key: str
    start: int
    stop: int
    pieces: tuple[_Piece, ...]

    def holds(self, piece: _Piece) -> bool:
        inside = self.start <= piece.offset and piece.offset + piece.nbytes <= self.stop
        return piece.key == self.key and inside


class _Group(NamedTuple):
    """Commits that become visible together, parents first."""

    objects: dict[str, AnyObject]
    blobs: dict[str, tuple[PushedBlob, str]]
    """id -> (place, key of its pack)"""
    tips: list[str]


def fetch(
    store: Store,
    remote: OpenedRemote,
    wish: FetchWish = FetchWish(),  # noqa: B008 - a value
    *,
    meter: TransferMeter | None = None,
    workers: int = SMALL_REQUESTS,
    group_bytes: int = GROUP_BYTES,
    announce: Callable[[Announced], None] | None = None,
) -> TransferReport:
    """Brings commits here and moves the tracking points (`REMOTE/BRANCH`); tags become tags. Nothing of a local branch
    changes. Raises `NotFound`, `CorruptBlob` naming what is damaged, `Conflict` where a local gc came in between.

    `announce` is called when all objects are known and before the first byte of KV: unless nothing is missing, and once
    more each time that the fetch has to begin again. It must not wait for KV; whoever reads it closes the arrival.
    """
    meter = meter or TransferMeter()
    about.require(remote.whole, remote.url)
    work = _Fetch(store, remote, wish, meter, workers, group_bytes, announce)
    moved = work.run()
    return TransferReport(
        remote=remote.name,
        url=remote.url,
        refs=tuple(moved),
        num_commits=work.num_commits,
        num_packs=work.num_packs,
        nbytes=meter.nbytes,
        blob_nbytes=work.blob_nbytes,
        seconds=meter.seconds,
    )


def _wanted(remote: OpenedRemote, wish: FetchWish, workers: int) -> list[RemoteRef]:
    """The remote's refs that are asked for. Raises `NotFound` for a branch that it has not."""
    if wish.branches is None:
        asked: list[tuple[Kind, str]] = [("branch", name) for name in refs.names(remote.bucket, "branch")]
    else:
        asked = [("branch", name) for name in wish.branches]
    if wish.tags:
        names = list(wish.tags) if isinstance(wish.tags, tuple) else refs.names(remote.bucket, "tag")
        asked += [("tag", name) for name in names]
    found = refs.read_all(remote.bucket, asked, workers)
    for name in wish.branches or ():
        tracking.require_place(remote.name, name)
        there = found.get(("branch", name))
        if there is None or there.ref.commit is None:
            some = ", ".join(refs.names(remote.bucket, "branch")[:8])
            raise NotFound(
                f"there is no branch {name!r} in {remote.name} ({remote.url}); names in it: {some or 'none'}."
            )
    return [standing.ref for standing in found.values()]


def _placed(store: Store, remote: str, found: Sequence[RemoteRef]) -> tuple[list[RemoteRef], list[RemoteRef]]:
    """Those whose names have a place here, and the others. A tag has none that would be taken for something else: for
    one of the branches, for a tracking point, or for HEAD."""
    book = settings.read(store)
    branches = {ref.name for ref in found if ref.kind == "branch" and ref.commit is not None}
    taken = branches.union(settings.RESERVED)

    def has_place(ref: RemoteRef) -> bool:
        if ref.commit is None:
            return True
        if ref.kind == "branch":
            return tracking.has_place(remote, ref.name)
        return ref.name not in taken and not tracking.is_tracking(ref.name, book)

    placed, others = list[RemoteRef](), list[RemoteRef]()
    for ref in found:
        (placed if has_place(ref) else others).append(ref)
    return placed, others


def _left_out(ref: RemoteRef) -> RefMoved:
    return RefMoved(kind=ref.kind, name=ref.name, outcome="left-out", old=None, new=ref.commit)


def _move(store: Store, remote: str, found: Sequence[RemoteRef], wish: FetchWish) -> list[RefMoved]:
    """Moves tracking points and makes tags; says what became of each."""
    moved, updates = list[RefMoved](), list[RefUpdate]()
    for ref in found:
        done = _branch(store, remote, ref, wish) if ref.kind == "branch" else _tag(store, ref)
        if done is not None:
            moved.append(done[0])
            updates += done[1]
    if updates:
        store.update_refs(*updates)
    return moved


def _branch(store: Store, remote: str, ref: RemoteRef, wish: FetchWish) -> tuple[RefMoved, list[RefUpdate]] | None:
    old = tracking.where(store, remote, ref.name)
    why = f"fetch from {remote}"
    if ref.commit is None:
        gone = tracking.removal(store, remote, ref.name, why) if wish.prune else []
        return (_moved(ref, "deleted", old, remote), gone) if gone else None
    if old == ref.commit:
        return _moved(ref, "up-to-date", old, remote), []
    forward = old is None or LocalHistory(store).descends(ref.commit, old)
    outcome: Outcome = "new" if old is None else "moved" if forward else "forced"
    return _moved(ref, outcome, old, remote), [tracking.update(remote, ref.name, ref.commit, why)]


def _tag(store: Store, ref: RemoteRef) -> tuple[RefMoved, list[RefUpdate]] | None:
    """A tag that is here already stays as it is."""
    if ref.commit is None:
        return None
    here = store.ref(ref.name)
    if here is not None:
        same = here.kind == "tag" and here.target == ref.commit
        return _moved(ref, "up-to-date" if same else "kept", here.target), []
    return _moved(ref, "new", None), [RefUpdate(ref.name, "tag", CommitId(ref.commit), None, "fetch")]


def _moved(ref: RemoteRef, outcome: Outcome, old: str | None, remote: str = "") -> RefMoved:
    """Of a branch, what became of its tracking point."""
    name = tracking.name_of(remote, ref.name) if remote else ref.name
    return RefMoved(kind=ref.kind, name=name, outcome=outcome, old=old, new=ref.commit)


class _Fetch:
    """One fetch."""

    def __init__(
        self,
        store: Store,
        remote: OpenedRemote,
        wish: FetchWish,
        meter: TransferMeter,
        workers: int,
        group_bytes: int,
        announce: Callable[[Announced], None] | None,
    ) -> None:
        self.store, self.remote, self.bucket, self.meter = store, remote, remote.bucket, meter
        self.workers, self.group_bytes, self.announce = workers, group_bytes, announce
        self.wish = wish
        self.arrival: Arrival | None = None
        self.absent: dict[str, str] = {}
        """Parents of commits that are brought which stay in the remote, with its name."""
        self.local = LocalHistory(store)
        self.num_commits = self.num_packs = self.blob_nbytes = 0

    def run(self) -> list[RefMoved]:
        """Where something is gone, and refs have moved since they were read, gc took what they had: once more."""
        wish = self.wish
        self.meter.begin("looking at the remote")
        found = _wanted(self.remote, wish, self.workers)
        for _ in range(ATTEMPTS):
            try:
                placed, others = _placed(self.store, self.remote.name, found)
                with self.bring([ref for ref in placed if ref.commit is not None]):
                    return [*_move(self.store, self.remote.name, placed, wish), *map(_left_out, others)]
            except (CorruptBlob, RemoteMissing):
                before, found = found, _wanted(self.remote, wish, self.workers)
                if [ref.commit for ref in found] == [ref.commit for ref in before]:
                    raise
        raise Busy(f"{self.remote.url} changed {ATTEMPTS} times while it was fetched. Try again.")

    @contextlib.contextmanager
    def bring(self, wanted: Sequence[RemoteRef]) -> Iterator[None]:
        """Makes every commit of `wanted` stored here, with its history; for the block, gc leaves what came."""
        theirs = RemoteHistory(self.bucket, self.bucket.namespace, wanted)
        tips = [ref.commit for ref in wanted if ref.commit is not None]
        self.local, self.absent = LocalHistory(self.store), {}
        missing, known = self._missing(theirs, tips)
        manifests = dict(zip(missing, theirs.manifests(missing), strict=True))
        if missing:
            self.meter.begin("fetching objects")
        with contextlib.ExitStack() as held:
            if used := known.used():
                held.enter_context(self.store.reading(*used))
            groups = self._groups(missing, manifests, known)
            if missing and self.announce is not None:
                whole = list(groups)
                self.arrival = Arrival(self._order(whole))
                held.callback(self.arrival.fail)
                self.announce(self._announced(whole, wanted, self.arrival))
                groups = iter(whole)
            for group in groups:
                self._store(group)
                held.enter_context(self.store.reading(*group.tips))
            yield

    def _missing(self, theirs: RemoteHistory, tips: Sequence[str]) -> tuple[list[str], _Known]:
        """The commits to bring, parents first, and what is known of what they need."""
        wish, here = self.wish, self.local.has
        if wish.depth is None and not wish.unshallow:
            return theirs.back_to(tips, here)[::-1], _Known(self.local)
        older = theirs.back_to(tips, self.local.is_whole)[::-1]
        near = set(older) if wish.depth is None else theirs.within(tips, wish.depth)
        missing = [commit for commit in older if commit in near and not here(commit)]
        inside = set(missing)
        parents = {parent.commit for one in theirs.manifests(missing) for parent in one.parents}
        self.absent = {one: self.remote.name for one in parents if one not in inside and not here(one)}
        known = _Known(self.local, self.absent, theirs.manifests(older))
        for commit in older:
            if here(commit):
                known.use(commit)
        return missing, known

    def _order(self, groups: Sequence[_Group]) -> list[tuple[str, int]]:
        """The KV in about the order in which it comes: of packs that are written side by side, in turns."""
        parts = [list(_parts(_pieces(group))) for group in groups]
        share = min(WRITERS, self.workers)
        side_by_side = [some[at : at + share] for some in parts for at in range(0, len(some), share)]
        turns = [turn for some in side_by_side for turn in itertools.zip_longest(*some)]
        return [(piece.id, piece.nbytes) for turn in turns for piece in turn if piece is not None]

    def _announced(self, groups: Sequence[_Group], wanted: Sequence[RemoteRef], arrival: Arrival) -> Announced:
        objects = {id: value for group in groups for id, value in group.objects.items()}
        points = {
            tracking.name_of(self.remote.name, ref.name): ref.commit
            for ref in wanted
            if ref.kind == "branch" and ref.commit is not None
        }
        return Announced(objects, points, arrival)

    # -- what is needed

    def _groups(self, missing: Sequence[str], manifests: dict[str, Manifest], known: _Known) -> Iterator[_Group]:
        """The commits' objects, read and followed, cut where enough KV has come together."""
        group = _Group({}, {}, [])
        nbytes = 0
        for some in _batches(missing, manifests):
            listed = [_piece(place, one) for commit in some for one in (manifests[commit],) for place in one.objects]
            data = self._objects(piece for piece in listed if piece.id not in known.objects)
            for commit in some:
                while older := known.lacking(commit, data):
                    data |= self._objects(older)
                nbytes += known.follow(commit, manifests[commit], data, group, self.bucket.namespace)
                if nbytes >= self.group_bytes:
                    yield group
                    group, nbytes = _Group({}, {}, []), 0
        if group.tips:
            yield group

    def _objects(self, pieces: Iterable[_Piece]) -> dict[str, bytes]:
        """The bytes of these objects, each hashed."""
        out = dict[str, bytes]()
        for run, data in self._read({piece.id: piece for piece in pieces}.values()):
            for piece in run.pieces:
                out[piece.id] = bytes(data[piece.offset - run.start :][: piece.nbytes])
                _compare(self.remote, piece, digest(out[piece.id]), "object")
            del data  # it may be released before the next one is read
        return out

    # -- reading and writing

    def _read(self, pieces: Iterable[_Piece], share: int = 1) -> Iterator[tuple[_Run, memoryview]]:
        """Runs of pieces in the order in which they lie, read ahead: by one of `share` that read at a time."""

        def read(run: _Run) -> tuple[_Run, memoryview]:
            (data,) = self.bucket.read_ranges(run.key, [(run.start, run.stop - run.start)])
            self.meter.add(len(data))
            return run, data

        room, workers = AHEAD_BYTES // share, -(-self.workers // share)
        return ahead(read, _runs(pieces), lambda run: run.stop - run.start, room, workers)

    def _store(self, group: _Group) -> None:
        """Writes a group's KV into local packs, and makes all of it visible."""
        self.meter.begin("fetching KV", sum(place.nbytes for place, _ in group.blobs.values()))
        parents = [one for tip in group.tips for one in self._parents_here(group, tip)]
        with self.store.begin(*parents) as writing:
            parts = [(writing.lease_pack(), part) for part in _parts(_pieces(group))]
            share = min(WRITERS, len(parts), self.workers)
            for pack in mapped(lambda one: self._pack(*one, group, share), parts, share):
                writing.add_pack(pack.name, pack.nbytes, pack.blobs)
                self.num_packs += 1
                self.blob_nbytes += sum(blob.nbytes for blob in pack.blobs)
            for obj in group.objects.values():
                writing.put(obj)
            writing.leave_out(self.absent)
            writing.commit()
        self.num_commits += len(group.tips)

    def _parents_here(self, group: _Group, tip: str) -> Iterator[str]:
        commit = group.objects[tip]
        assert isinstance(commit, Commit)
        return (one for one in commit.parents if one not in group.objects and one not in self.absent)

    def _pack(self, name: str, part: Sequence[_Piece], group: _Group, share: int) -> PackResult:
        """One local pack. What was written is compared with what was asked for: the hash is taken once."""
        source, items = _Source(self._read(part, share)), []
        landing = None if self.arrival is None else LandingPacks(self.arrival, self.store.packs)

        def take(piece: _Piece) -> memoryview:
            if landing is not None:
                landing.next = piece.id
            return source.take(piece)

        for piece in part:
            place = group.blobs[piece.id][0]
            items.append(PackItem("", place.dtype, place.shape, place.nbytes, lambda piece=piece: take(piece)))  # type: ignore[misc]
        try:
            result = write_pack(landing or self.store.packs, name, items)
        finally:
            source.close()
        for piece, written in zip(part, result.blobs, strict=True):
            _compare(self.remote, piece, written.blob, "blob")
        return result


class _Known:
    """What commits that were followed need, and what those here have that they build on."""

    def __init__(self, local: LocalHistory, absent: Collection[str] = (), older: Iterable[Manifest] = ()) -> None:
        self._local, self._absent = local, absent
        self.objects: set[str] = set()
        self.blobs: set[str] = set()
        self._here: set[str] = set()
        self._older_objects, self._older_blobs = dict[str, _Piece](), dict[str, tuple[PushedBlob, str]]()
        if absent:
            for one in older:
                self._older_objects.update((place.id, _piece(place, one)) for place in one.objects)
                self._older_blobs.update(_blob_places(one))

    def used(self) -> tuple[str, ...]:
        """The commits that are here whose data counts as here."""
        return tuple(self._here)

    def lacking(self, commit: str, data: dict[str, bytes]) -> list[_Piece]:
        """What is to be read next of what `commit` needs and a manifest before its own lists: level by level."""
        if not self._absent:
            return []
        found, seen, waiting = list[_Piece](), set[str](), [commit]
        while waiting:
            at = waiting.pop()
            if at in seen or at in self.objects:
                continue
            seen.add(at)
            if at in data:
                waiting.extend(links(data[at]).without(self._absent))
            elif at in self._older_objects:
                found.append(self._older_objects[at])
        return found

    def use(self, commit: str) -> None:
        """Counts in what a commit that is here has."""
        if commit not in self._here:
            self._here.add(commit)
            reach = self._local.reach(commit)
            self.objects.update(reach.objects)
            self.blobs.update(reach.blobs)
            self.objects.add(commit)

    def follow(self, commit: str, manifest: Manifest, data: dict[str, bytes], group: _Group, namespace: str) -> int:
        """Adds what `commit` needs to the group; bytes of its KV. Raises `CorruptBlob` where the manifests do not give
        something that it needs."""
        for parent in manifest.parents:
            if self._local.has(parent.commit):
                self.use(parent.commit)
        places = {**self._older_blobs, **_blob_places(manifest)}
        waiting, nbytes = [commit], 0
        while waiting:
            at = waiting.pop()
            if at in self.objects:
                continue
            raw = _given(data, at, commit)
            value, of = decode(raw, at), links(raw)
            if isinstance(value, Commit):
                require_of(namespace, value, at)
            self.objects.add(at)
            group.objects[at] = value
            waiting.extend(of.without(self._absent))
            for blob in of.blobs:
                if blob not in self.blobs:
                    self.blobs.add(blob)
                    group.blobs[blob] = _given(places, blob, commit)
                    nbytes += group.blobs[blob][0].nbytes
        group.tips.append(commit)
        return nbytes


def _piece(place: PushedObject, manifest: Manifest) -> _Piece:
    return _Piece(place.id, manifest.packs[place.pack].key, place.offset, place.nbytes)


def _blob_places(manifest: Manifest) -> dict[str, tuple[PushedBlob, str]]:
    """Each blob's place, and the key of its pack."""
    return {blob.id: (blob, manifest.packs[blob.pack].key) for blob in manifest.blobs}


def _given(places: dict[str, T], identifier: str, commit: str) -> T:
    if identifier not in places:
        raise CorruptBlob(
            f"commit {short(commit)} of the remote needs {identifier}, which its manifests do not list. {REPAIR}"
        )
    return places[identifier]


def _compare(remote: OpenedRemote, piece: _Piece, found: str, what: str) -> None:
    if found != piece.id:
        raise CorruptBlob(
            f"{what} {piece.id} of the remote {remote.name} hashes to {found}: bytes {piece.offset} to "
            f"{piece.offset + piece.nbytes} of {layout.prefix(remote.bucket.namespace)}{piece.key} at {remote.url} are "
            f"not what was pushed. Nothing of it was kept. {REPAIR}"
        )


OBJECTS_AT_A_TIME = 64 << 20


def _batches(missing: Sequence[str], manifests: dict[str, Manifest]) -> Iterator[list[str]]:
    """Commits whose objects are read together."""
    batch, nbytes = list[str](), 0
    for commit in missing:
        batch.append(commit)
        nbytes += sum(place.nbytes for place in manifests[commit].objects)
        if nbytes >= OBJECTS_AT_A_TIME:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


def _runs(pieces: Iterable[_Piece]) -> Iterator[_Run]:
    """Pieces that lie near each other together, in order."""
    some, stop = list[_Piece](), 0
    for piece in sorted(pieces, key=lambda piece: (piece.key, piece.offset)):
        end = piece.offset + piece.nbytes
        near = bool(some) and piece.key == some[0].key and piece.offset - stop <= GAP_BYTES
        if some and not (near and end - some[0].offset <= RUN_BYTES):
            yield _Run(some[0].key, some[0].offset, stop, tuple(some))
            some, stop = [], 0
        some.append(piece)
        stop = max(stop, end)
    if some:
        yield _Run(some[0].key, some[0].offset, stop, tuple(some))


def _pieces(group: _Group) -> list[_Piece]:
    """A group's KV in the order in which it lies in the remote."""
    pieces = [_Piece(place.id, key, place.offset, place.nbytes) for place, key in group.blobs.values()]
    return sorted(pieces, key=lambda piece: (piece.key, piece.offset))


def _parts(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """What goes into one local pack."""
    share = -(-sum(piece.nbytes for piece in pieces) // WRITERS)
    limit = min(LOCAL_PACK_BYTES, max(SHARED_BYTES, share))
    part, nbytes = list[_Piece](), 0
    for piece in pieces:
        if part and (nbytes + piece.nbytes > limit or len(part) >= LOCAL_PACK_ENTRIES):
            yield part
            part, nbytes = [], 0
        part.append(piece)
        nbytes += piece.nbytes
    if part:
        yield part


class _Source:
    """The pieces of runs that are read ahead, in order, one at a time."""

    def __init__(self, runs: Iterator[tuple[_Run, memoryview]]) -> None:
        self._runs = runs
        self._run: _Run | None = None
        self._data = memoryview(b"")

    def take(self, piece: _Piece) -> memoryview:
        """The piece's bytes, not verified; valid until the next one is taken."""
        while self._run is None or not self._run.holds(piece):
            self._data = memoryview(b"")  # it may be released before the next one is read
            self._run, self._data = next(self._runs)
        start = piece.offset - self._run.start
        return self._data[start : start + piece.nbytes]

    def close(self) -> None:
        self._data = memoryview(b"")
        if (close := getattr(self._runs, "close", None)) is not None:
            close()
