"""Push: what the remote lacks goes there first, as packs and manifests under names of their content; then refs move.

    read    the state of gc, then the remote's refs: what they reach need not be sent
    send    packs, two at a time and none held longer than it is sent; one that lies there already is left out
            manifests
    move    each ref: read it (a new one is made without a commit), see that gc's state is still the one that was read
            first, then compare-and-swap

If gc has begun something meanwhile, all is read again; what was sent and is not condemned still counts. Why no ref can
come to name what gc deletes: docs/design/0010-remotes.md. Killed at any point a push leaves the refs whole, and packs
that the next push finds by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from thaw.core.errors import Busy, CorruptBlob, NotFetched, NotFound, RefConflict, RemoteMissing
from thaw.core.ids import digest, short
from thaw.data.locations import BlobLocation
from thaw.remote import about, epochs, layout, manifest, packing, refs, tracking
from thaw.remote.history import RemoteHistory, walk
from thaw.remote.layout import Kind
from thaw.remote.local import LocalHistory
from thaw.remote.manifest import Manifest, PushedBlob, PushedObject, PushedPack, PushedParent
from thaw.remote.meter import TransferMeter
from thaw.remote.opened import OpenedRemote
from thaw.remote.packing import PackMember, PlannedPack, Tensors
from thaw.remote.parallel import SMALL_REQUESTS, mapped
from thaw.remote.refs import RemoteRef, StandingRef
from thaw.remote.report import Outcome, RefMoved, TransferReport
from thaw.store import Store

UPLOADS = 2
"""Packs that are sent at a time, each held in memory."""
ATTEMPTS = 20
"""How often gc may come in between."""


class PushWish(NamedTuple):
    """A ref to move. `target` None deletes it. `lease`: where the remote's must stand for a move that is no
    fast-forward (None: nowhere); "" allows fast-forwards only."""

    kind: Kind
    name: str
    target: str | None
    lease: str | None = ""


class Tuning(NamedTuple):
    """Sizes of a transfer. `workers` 1 makes all requests in order, on the caller's thread. `share`: blobs that other
    refs of the remote have are not sent either; the manifests of all of these refs are read for that."""

    pack_bytes: int = packing.PACK_BYTES
    uploads: int = UPLOADS
    workers: int = SMALL_REQUESTS
    share: bool = False


class _GcBetween(Exception):
    """gc's state is not the one that the push began with."""


class _Sent(NamedTuple):
    """What a push has to say of its data."""

    num_commits: int
    num_packs: int
    blob_nbytes: int


class _Move(NamedTuple):
    wish: PushWish
    old: str | None
    outcome: Outcome


def push(
    store: Store,
    remote: OpenedRemote,
    wishes: Sequence[PushWish],
    *,
    meter: TransferMeter | None = None,
    tuning: Tuning = Tuning(),  # noqa: B008 - a value
) -> TransferReport:
    """Moves the remote's refs as wished, after sending what they need; the tracking points follow.

    Nothing is sent where a ref would be refused. Each ref moves for itself: where one is lost to another writer, the
    others have moved. Raises `RefConflict`, `InvalidRequest`, `NotFound`, `Busy`.
    """
    meter = meter or TransferMeter()
    for wish in wishes:
        if wish.kind == "branch" and wish.target is not None:
            tracking.require_place(remote.name, wish.name)
    about.make(remote.whole, _head(store, wishes))
    work = _Push(store, remote, meter, tuning)
    with store.reading(*(wish.target for wish in wishes if wish.target is not None)):
        for _ in range(ATTEMPTS):
            try:
                return work.run(wishes)
            except _GcBetween:
                continue
            except (CorruptBlob, RemoteMissing):
                if not work.gc_between():
                    raise
    raise Busy(f"gc began {ATTEMPTS} times in {remote.url} while this push was under way. Try again when it is done.")


def _head(store: Store, wishes: Sequence[PushWish]) -> str:
    branches = [wish.name for wish in wishes if wish.kind == "branch"]
    return store.head if store.head in branches or not branches else branches[0]


class _Push:
    """One push, which may have to begin again. What was sent is remembered by its content."""

    def __init__(self, store: Store, remote: OpenedRemote, meter: TransferMeter, tuning: Tuning) -> None:
        self.store, self.remote, self.bucket = store, remote, remote.bucket
        self.meter, self.tuning = meter, tuning
        self.local = LocalHistory(store)
        self.tensors = Tensors(store)
        self.state, self.condemned = epochs.FIRST, frozenset[str]()
        self.moved: dict[tuple[Kind, str], RefMoved] = {}
        self.total = _Sent(0, 0, 0)

    def run(self, wishes: Sequence[PushWish]) -> TransferReport:
        self.meter.begin("looking at the remote")
        self.state, _ = epochs.read(self.bucket)
        self.condemned = epochs.read_list(self.bucket, self.state)
        standing = self._standing(wishes)
        moves = [move for wish in wishes if (move := self._judge(wish, standing)) is not None]
        keys = self._send([move.wish.target for move in moves if move.wish.target is not None], standing)
        self.meter.begin("moving branches")
        failed = [error for error in mapped(lambda move: self._move(move, keys), moves, self.tuning.workers) if error]
        for error in sorted(failed, key=lambda error: isinstance(error, RefConflict)):
            raise error
        return self._report(wishes)

    def gc_between(self) -> bool:
        """Whether gc has begun something since this push read its state."""
        return epochs.read(self.bucket)[0] != self.state

    # -- refs

    def _standing(self, wishes: Sequence[PushWish]) -> dict[tuple[Kind, str], StandingRef]:
        """The refs that are wished for, and all others, for what they reach."""
        named = [(wish.kind, wish.name) for wish in wishes]
        listed = [(kind, name) for kind in layout.KINDS for name in refs.names(self.bucket, kind)]
        return refs.read_all(self.bucket, [*named, *listed], self.tuning.workers)

    def _judge(self, wish: PushWish, standing: dict[tuple[Kind, str], StandingRef]) -> _Move | None:
        """What is to be done for a wish. Raises where it is refused; None where it is done."""
        found = standing.get((wish.kind, wish.name))
        old = None if found is None else found.ref.commit
        if (wish.kind, wish.name) in self.moved:
            return None
        if wish.target is None and old is None:
            raise NotFound(f"there is no {wish.kind} {wish.name!r} in {self.remote.name} to delete.")
        if wish.target == old:
            self._note(wish, "up-to-date", old)
            return None
        self._refuse_both_kinds(wish, standing)
        return _Move(wish, old, self._outcome(wish, old))

    def _refuse_both_kinds(self, wish: PushWish, standing: dict[tuple[Kind, str], StandingRef]) -> None:
        """A repository has one ref of a name: no clone could have both a branch and a tag of it."""
        other: Kind = "tag" if wish.kind == "branch" else "branch"
        found = standing.get((other, wish.name))
        if wish.target is not None and found is not None and found.ref.commit is not None:
            raise RefConflict(
                f"{self.remote.name} has a {other} {wish.name!r}, and a clone cannot have a {wish.kind} of that name "
                f"too. Give yours another name, or delete that one there first if nobody needs it."
            )

    def _outcome(self, wish: PushWish, old: str | None) -> Outcome:
        if wish.lease not in ("", old):
            raise RefConflict(_stale(self.remote.name, wish, old))
        if wish.target is None:
            return "deleted"
        if old is None:
            return "new"
        if wish.kind == "branch" and self.local.has(old) and self.local.descends(wish.target, old):
            return "moved"
        if wish.lease == "":
            ends = self.local.ends(wish.target)
            raise RefConflict(_not_forward(self.remote.name, wish, old, known=self.local.has(old), ends=ends))
        return "forced"

    def _move(self, move: _Move, keys: dict[str, str]) -> RefConflict | _GcBetween | None:
        """Errors are returned: the other refs go on moving."""
        try:
            self._swap(move, keys)
        except (RefConflict, _GcBetween) as error:
            return error
        return None

    def _swap(self, move: _Move, keys: dict[str, str]) -> None:
        wish = move.wish
        key = None if wish.target is None else keys[wish.target]
        while True:
            standing = refs.place(self.bucket, wish.kind, wish.name)
            if standing.ref.commit == wish.target:
                return self._note(wish, "up-to-date", move.old)
            if standing.ref.commit != move.old:
                raise RefConflict(_lost(self.remote.name, wish, move.old, standing.ref))
            if self.gc_between():
                raise _GcBetween
            if refs.move(self.bucket, standing, wish.target, key, f"push: {move.outcome}"):
                return self._note(wish, move.outcome, move.old)

    def _note(self, wish: PushWish, outcome: Outcome, old: str | None) -> None:
        """Remembers what became of a ref, and where it was seen."""
        self.moved[wish.kind, wish.name] = RefMoved(
            kind=wish.kind, name=wish.name, outcome=outcome, old=old, new=wish.target
        )
        if wish.kind == "branch":
            self._track(wish)

    def _track(self, wish: PushWish) -> None:
        name, why = self.remote.name, f"push to {self.remote.name}"
        if wish.target is None:
            updates = tracking.removal(self.store, name, wish.name, why)
        elif tracking.where(self.store, name, wish.name) == wish.target:
            updates = []
        else:
            updates = [tracking.update(name, wish.name, wish.target, why)]
        if updates:
            self.store.update_refs(*updates)

    # -- data

    def _send(self, tips: list[str], standing: dict[tuple[Kind, str], StandingRef]) -> dict[str, str]:
        """Sends what `tips` need and the remote has not; the keys of the manifests of all of them."""
        theirs = RemoteHistory(self.bucket, self.bucket.namespace, [found.ref for found in standing.values()])
        missing = self._missing(tips, theirs)
        if not missing:
            return theirs.keys
        plan = _Plan(self, missing, self._shared(theirs) if self.tuning.share else {})
        plan.place(self._keys(plan.packs))
        self.meter.begin("sending", sum(pack.nbytes for pack in plan.packs if pack.digest in plan.unsent))
        mapped(plan.send, [pack for pack in plan.packs if pack.digest in plan.unsent], self.tuning.uploads)
        self.meter.begin("sending manifests")
        written = plan.manifests(theirs)
        mapped(lambda one: self.bucket.put(*one), list(written.values()), self.tuning.workers)
        self.total = _Sent(
            max(self.total.num_commits, len(missing)), self.total.num_packs + len(plan.unsent), plan.blob_nbytes
        )
        return {**theirs.keys, **{commit: key for commit, (key, _) in written.items()}}

    def _missing(self, tips: list[str], theirs: RemoteHistory) -> list[str]:
        """The commits to send, parents first; the keys of what they build on are known to `theirs` then."""
        self._drop_condemned(theirs)
        known = [commit for commit in theirs.keys if self.local.has(commit)]
        missing = self.local.missing(tips, known)
        if missing and any(not self.local.has(commit) for commit in theirs.keys):
            theirs.back_to(list(theirs.keys), self.local.has)
            known = [commit for commit in theirs.keys if self.local.has(commit)]
            missing = self.local.missing(tips, known)
        inside = set(missing)
        below = {parent for commit in missing for parent in self.local.parents(commit) if parent not in inside}
        self._require_there(theirs, below)
        theirs.look_for(below | (set(tips) - inside))
        return missing

    def _require_there(self, theirs: RemoteHistory, below: set[str]) -> None:
        """Where history ends here, the remote must have what is older. Raises `NotFetched`."""
        absent = self.store.absent()
        lacking = theirs.lacking(below & absent.keys())
        if lacking:
            commit = min(lacking)
            raise NotFetched(
                f"{self.remote.name} lacks commit {short(commit)}, which this push builds on, and this repository is "
                f"shallow: its history begins after that commit. `thaw fetch --unshallow {absent[commit]}`, then push "
                "again."
            )

    def _drop_condemned(self, theirs: RemoteHistory) -> None:
        """While gc deletes, nothing that it may delete is built on, even if a ref still names it."""
        if self.state.phase == "sweeping":
            for commit, key in list(theirs.keys.items()):
                if self._rests_on_condemned(commit, key):
                    del theirs.keys[commit]

    def _rests_on_condemned(self, commit: str, key: str) -> bool:
        """Reads all of the commit's history in the remote."""
        reached = walk(self.bucket, self.bucket.namespace, [(commit, key)], self.tuning.workers)
        return any(at in self.condemned or any(pack.key in self.condemned for pack in one.packs) for at, one in reached)

    def _shared(self, theirs: RemoteHistory) -> dict[str, tuple[PushedPack, PushedBlob]]:
        """Where each blob lies that a ref of the remote has, but for what gc has written down."""
        found = theirs.manifests(list(theirs.keys))
        places = ((one.packs[blob.pack], blob) for one in found for blob in one.blobs)
        return {blob.id: (pack, blob) for pack, blob in places if pack.key not in self.condemned}

    def _keys(self, packs: Sequence[PlannedPack]) -> dict[str, tuple[str, bool]]:
        """For each pack, by its digest: under which key it lies or will lie, and whether it lies there already."""
        found = mapped(self._key, packs, self.tuning.workers)
        return {pack.digest: one for pack, one in zip(packs, found, strict=True)}

    def _key(self, pack: PlannedPack) -> tuple[str, bool]:
        epoch = self.state.epoch
        for at in (epoch, epoch - 1):
            key = layout.pack_key(at, pack.digest)
            if at >= 0 and key not in self.condemned and self.bucket.size(key) == pack.nbytes:
                return key, True
        return layout.pack_key(epoch, pack.digest), False

    def _report(self, wishes: Iterable[PushWish]) -> TransferReport:
        return TransferReport(
            remote=self.remote.name,
            url=self.remote.url,
            refs=tuple(self.moved[wish.kind, wish.name] for wish in wishes),
            num_commits=self.total.num_commits,
            num_packs=self.total.num_packs,
            num_skipped_packs=self.meter.num_skipped_packs,
            nbytes=self.meter.nbytes,
            blob_nbytes=self.total.blob_nbytes,
            seconds=self.meter.seconds,
        )


class _Plan:
    """The packs that hold what some commits add, and these commits' manifests."""

    def __init__(self, work: _Push, missing: Sequence[str], there: dict[str, tuple[PushedPack, PushedBlob]]) -> None:
        self._work, self._commits, self._there = work, missing, there
        self._own = {commit: work.local.own(commit) for commit in missing}
        objects = {one: nbytes for own in self._own.values() for one, nbytes in own.objects.items()}
        blobs = dict.fromkeys(blob for own in self._own.values() for blob in own.blobs if blob not in there)
        self._places: dict[str, BlobLocation] = work.store.locate(blobs)
        things = [PackMember(one, True, nbytes, "U8", (nbytes,)) for one, nbytes in objects.items()]
        things += [work.tensors.of(self._places[blob]) for blob in blobs]
        self.packs = [packing.plan(group) for group in packing.split(things, work.tuning.pack_bytes)]
        self.blob_nbytes = sum(self._places[blob].nbytes for blob in blobs)
        self.unsent: set[str] = set()
        self._keys: dict[str, str] = {}

    def place(self, keys: dict[str, tuple[str, bool]]) -> None:
        """Says where each pack lies or will lie."""
        self._keys = {pack: key for pack, (key, _) in keys.items()}
        self.unsent = {pack for pack, (_, there) in keys.items() if not there}
        for _ in range(len(keys) - len(self.unsent)):
            self._work.meter.skip()

    def send(self, pack: PlannedPack) -> None:
        whole = packing.make(pack, self._work.store, self._places, self._work.local.data)
        self._work.bucket.put(self._keys[pack.digest], memoryview(whole))
        self._work.meter.add(pack.nbytes)

    def manifests(self, theirs: RemoteHistory) -> dict[str, tuple[str, bytes]]:
        """commit -> (key, bytes) of its manifest."""
        inside = set(self._commits)
        first = {commit: parents[0] for commit in self._commits if (parents := self._work.local.parents(commit))}
        below = [parent for parent in dict.fromkeys(first.values()) if parent not in inside]
        made = dict(zip(below, theirs.manifests(below), strict=True))
        where = {(entry.is_object, entry.id): (n, entry) for n, pack in enumerate(self.packs) for entry in pack.entries}
        keys, out = dict(theirs.keys), dict[str, tuple[str, bytes]]()
        for commit in self._commits:
            own = self._own[commit]
            objects = [where[True, one] for one in own.objects]
            blobs = [where[False, one] for one in own.blobs if one not in self._there]
            used = sorted({n for n, _ in (*objects, *blobs)})
            at = {n: i for i, n in enumerate(used)}
            shared = [self._there[one] for one in own.blobs if one in self._there]
            theirs_at = {pack: len(used) + i for i, pack in enumerate(dict.fromkeys(pack for pack, _ in shared))}
            parent = made[first[commit]] if commit in first else None
            value = made[commit] = Manifest(
                commit=commit,
                namespace=self._work.bucket.namespace,
                parents=tuple(PushedParent(one, keys[one]) for one in self._work.local.parents(commit)),
                height=0 if parent is None else parent.height + 1,
                trail=() if parent is None else manifest.trail_after(parent),
                packs=(*(PushedPack(self._keys[self.packs[n].digest], self.packs[n].nbytes) for n in used), *theirs_at),
                objects=tuple(PushedObject(e.id, at[n], e.offset, e.nbytes) for n, e in objects),
                blobs=(
                    *(PushedBlob(e.id, at[n], e.offset, e.nbytes, e.dtype, e.shape) for n, e in blobs),
                    *(msgspec.structs.replace(blob, pack=theirs_at[pack]) for pack, blob in shared),
                ),
            )
            data = manifest.encode(value)
            keys[commit] = layout.manifest_key(self._work.state.epoch, digest(data))
            out[commit] = (keys[commit], data)
        return out


def _stale(remote: str, wish: PushWish, old: str | None) -> str:
    there = f"stands at {short(old)}" if old else "does not exist"
    seen = short(wish.lease) if wish.lease else "nothing"
    return (
        f"{wish.kind} {wish.name!r} of {remote} {there}, and was last seen at {seen}: somebody else moved it. "
        f"Look at it first (`thaw fetch {remote}`), then push again."
    )


def _not_forward(remote: str, wish: PushWish, old: str, *, known: bool, ends: str | None) -> str:
    name, new = wish.name, short(wish.target or "")
    if wish.kind == "tag":
        return (
            f"tag {name!r} of {remote} stands at {short(old)}, here at {new}; tags do not move. Delete it there first."
        )
    if ends is not None and not known:
        return (
            f"branch {name!r} of {remote} stands at {short(old)}, and whether {new} descends from it is not known "
            f"here: this repository is shallow, its history begins after {short(ends)}. `thaw fetch --unshallow` "
            "brings the rest; or replace the branch with --force-with-lease."
        )
    way = f"fork or `thaw adopt` on top of {remote}/{name}" if known else f"`thaw fetch {remote}` gets it"
    return (
        f"branch {name!r} of {remote} stands at {short(old)}, which {new} does not descend from: a push would lose it. "
        f"Keep both (`thaw branch -m {name} NAME`, then push NAME), {way}, or replace it with --force-with-lease."
    )


def _lost(remote: str, wish: PushWish, old: str | None, now: RemoteRef) -> str:
    there = f"now stands at {short(now.commit)}" if now.commit else "was deleted"
    seen = f"it stood at {short(old)}" if old else "it was not there"
    return (
        f"{wish.kind} {wish.name!r} of {remote} {there}; when this push began {seen}: somebody else was first. "
        f"`thaw fetch {remote}`, then push again."
    )
