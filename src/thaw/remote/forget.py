"""Forget: branches or tags of a remote are deleted with all that they alone reach, at once.

    look      what is reached from them, their reflogs included, and from no other branch or tag, is to be forgotten
    delete    the refs, by tombstones
    rewrite   packs that hold some of it and something else: what else there is goes into packs and manifests anew, and
              the refs that reach these move to them, each to the same commit
    drop      reflog entries that would keep it
    gc        without a grace period, in two runs: what is reached no more is deleted

The rules of `push.py` and `gc.py` hold: data is written under gc's epoch, and no ref moves where gc's state has changed
meanwhile. A push that builds on what is rewritten keeps it, and all is done again. Killed at any point, the same call
goes on: until the end the reflogs say what is to be forgotten.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from thaw.core.errors import Busy, Conflict, CorruptBlob, NotFound, RefConflict
from thaw.core.ids import digest, short
from thaw.remote import about, epochs, layout, manifest, packing, refs, values
from thaw.remote.gc import KEEP_REFLOG_S, GcWish, collect
from thaw.remote.layout import Kind
from thaw.remote.manifest import Manifest, PushedParent
from thaw.remote.opened import OpenedRemote
from thaw.remote.packing import PackMember, PlannedPack
from thaw.remote.parallel import SMALL_REQUESTS, mapped
from thaw.remote.refs import RemoteRef, StandingRef

ATTEMPTS = 10
"""How often pushes may come in between."""
Named: TypeAlias = tuple[Kind, str]
Members: TypeAlias = "dict[str, tuple[PackMember, int]]"
"""By id: what stands in a pack, and its offset there."""


class ForgetReport(msgspec.Struct, frozen=True, kw_only=True):
    """`num_commits`: of which nothing is left. `old_versions`: whether the bucket keeps deleted objects as older
    versions ("unknown": the store does not say); thaw does not delete those."""

    remote: str
    names: tuple[str, ...]
    num_commits: int
    num_rewritten_packs: int
    num_deleted: int
    deleted_nbytes: int
    num_reflog_deleted: int
    old_versions: Literal["none", "kept", "unknown"]


class _Sight(NamedTuple):
    """What there is. `goes`: keys of manifests that are to be forgotten; `stays`: those that other refs reach.
    `mixed`: packs with something that stays and something that does not."""

    goes: frozenset[str]
    stays: frozenset[str]
    mixed: frozenset[str]


class _Again(Exception):
    """Something moved meanwhile."""


def forget(remote: OpenedRemote, names: Sequence[Named], *, workers: int = SMALL_REQUESTS) -> ForgetReport:
    """Deletes refs of the remote and what they alone reach. Raises `NotFound`, `Conflict` where another ref reaches
    the commit of one, `RefConflict` where one moves meanwhile, `Busy`."""
    about.require(remote.whole, remote.url)
    return _Forget(remote, tuple(dict.fromkeys(names)), workers).run()


class _Forget:
    def __init__(self, remote: OpenedRemote, names: Sequence[Named], workers: int) -> None:
        self.remote, self.bucket, self.names, self.workers = remote, remote.bucket, names, workers
        self._read: dict[str, Manifest] = {}
        self._named = set[str]()  # keys of manifests that the named refs reached, now or before
        self.commits: set[str] = set()
        self.num_packs = self.num_deleted = self.nbytes = self.num_reflog = 0

    def run(self) -> ForgetReport:
        self._delete_refs()
        for _ in range(ATTEMPTS):
            with contextlib.suppress(_Again):
                seen = self._once()
                if not any(mapped(self._is_there, self._doomed(seen), self.workers)):
                    return self._report()
        raise Busy(
            f"pushes to {self.remote.url} build on what is to be forgotten, again and again. The branches are deleted; "
            "forget them once more when the pushes are done."
        )

    def _once(self) -> _Sight:
        self._drop_lost()
        self._collect()
        state = epochs.read(self.bucket)[0]
        seen = self._look(refs.read_listed(self.bucket, self.workers))
        self.commits |= {self._read[key].commit for key in seen.goes}
        if seen.mixed:
            self._rewrite(seen, state)
        self._drop_reflogs(seen)
        self._collect()
        return seen

    def _is_there(self, key: str) -> bool:
        return self.bucket.size(key) is not None

    def _doomed(self, seen: _Sight) -> list[str]:
        """Keys under which nothing is to be left."""
        packs = {pack.key for key in seen.goes for pack in self._read[key].packs}
        return sorted(seen.goes | packs)

    def _report(self) -> ForgetReport:
        found = self.remote.whole.read(layout.ABOUT)
        version = None if found is None else found.version.version
        kept = version not in (None, "null")
        unknown = self.remote.url.startswith("gs:")  # its generations are there with and without versions
        return ForgetReport(
            remote=self.remote.name, names=tuple(name for _, name in self.names), num_commits=len(self.commits),
            num_rewritten_packs=self.num_packs, num_deleted=self.num_deleted, deleted_nbytes=self.nbytes,
            num_reflog_deleted=self.num_reflog,
            old_versions="unknown" if unknown else "kept" if kept else "none",
        )  # fmt: skip

    # -- refs

    def _delete_refs(self) -> None:
        standing = refs.read_listed(self.bucket, self.workers)
        for kind, name in self.names:
            if (kind, name) not in standing:
                raise NotFound(f"there is no {kind} {name!r} in {self.remote.name}, and there never was one.")
        self._refuse_shared(standing)
        for kind, name in self.names:
            there = standing[kind, name]
            if there.ref.commit is not None and not refs.move(self.bucket, there, None, None, "forget"):
                raise RefConflict(
                    f"{kind} {name!r} of {self.remote.name} was moved meanwhile by somebody else. Look at it, then "
                    "forget it again."
                )

    def _refuse_shared(self, standing: dict[Named, StandingRef]) -> None:
        for named in self.names:
            commit = standing[named].ref.commit
            for other, there in standing.items():
                if commit is None or other in self.names:
                    continue
                if commit in {self._read[one].commit for one in self._reach([there.ref])}:
                    raise Conflict(
                        f"{other[0]} {other[1]!r} of {self.remote.name} has commit {short(commit)} too, so forgetting "
                        f"{named[1]!r} would not forget it. Forget both, or delete {named[1]!r} alone "
                        "(thaw push --delete)."
                    )

    def _reach(self, tips: Iterable[RemoteRef]) -> set[str]:
        """Keys of the manifests that these lead to. Raises `CorruptBlob` where one is missing."""
        waiting = {ref.manifest: ref.commit for ref in tips if ref.manifest is not None and ref.commit is not None}
        seen = set[str]()
        while waiting:
            seen.update(waiting)
            unread = [one for one in waiting.items() if one[0] not in self._read]
            found = mapped(lambda one: manifest.read(self.bucket, *one, self.bucket.namespace), unread, self.workers)
            self._read.update(zip((key for key, _ in unread), found, strict=True))
            before = [one for key in waiting for one in (*self._read[key].parents, *self._read[key].trail)]
            waiting = {one.manifest: one.commit for one in before if one.manifest not in seen}
        return seen

    # -- what goes and what stays

    def _look(self, standing: dict[Named, StandingRef]) -> _Sight:
        stays = self._reach(there.ref for there in standing.values())
        for kind, name in self.names:
            for _, entry in self._entries(kind, name):
                with contextlib.suppress(CorruptBlob):  # an earlier call deleted it
                    self._named |= self._reach([entry])
        kept = {self._read[key].commit for key in stays}
        goes = {key for key in self._named if self._read[key].commit not in kept}
        mixed = self._packs(goes) & self._packs(stays) | self._with_leftovers(stays)
        return _Sight(frozenset(goes), frozenset(stays), frozenset(mixed))

    def _with_leftovers(self, stays: set[str]) -> set[str]:
        """Packs with bytes that nothing reaches: of branches that were deleted, and whose reflogs gc took since."""
        reached = set(stays)
        for kind, name in self._others():
            for _, entry in self._entries(kind, name):
                with contextlib.suppress(CorruptBlob):
                    reached |= self._reach([entry])
        sizes = {pack.key: pack.nbytes for key in stays for pack in self._read[key].packs}
        members = self._members(sizes, reached)
        return {
            pack for pack, nbytes in sizes.items()
            if packing.plan([member for member, _ in members[pack].values()]).nbytes != nbytes
        }  # fmt: skip

    def _others(self) -> list[Named]:
        named = [(kind, name) for kind in layout.KINDS for name in refs.names(self.bucket, kind)]
        return [one for one in named if one not in self.names]

    def _packs(self, keys: Iterable[str]) -> set[str]:
        return {pack.key for key in keys for pack in self._read[key].packs}

    def _entries(self, kind: Kind, name: str) -> list[tuple[str, RemoteRef]]:
        """The reflog of a ref, with the keys of its objects."""
        folder = layout.reflog_key(kind, name, 0).rpartition("/")[0]
        keys = [entry.key for entry in self.bucket.entries(f"{folder}/")]
        found = mapped(self.bucket.read, keys, self.workers)
        return [
            (key, values.decode(one.data, RemoteRef, f"{key} of the remote"))
            for key, one in zip(keys, found, strict=True)
            if one is not None
        ]

    def _drop_reflogs(self, seen: _Sight) -> None:
        """All of the named refs, and of others what reaches something that goes or lies beside it."""
        gone, commits = list[str](), {self._read[key].commit for key in seen.goes}
        for kind in layout.KINDS:
            for name in refs.names(self.bucket, kind):
                for key, entry in self._entries(kind, name):
                    if (kind, name) in self.names or self._keeps(entry, commits, seen.mixed):
                        gone.append(key)
        self.bucket.delete(gone)
        self.num_reflog += len(gone)

    def _drop_lost(self) -> None:
        """Reflog entries of the named refs that lead to something damaged: they would stop every gc, and tell nothing
        of what is to be forgotten that gc does not find."""
        entries = [one for kind, name in self.names for one in self._entries(kind, name)]
        lost = [key for key, entry in entries if not self._can_be_followed(entry)]
        self.bucket.delete(lost)
        self.num_reflog += len(lost)

    def _can_be_followed(self, entry: RemoteRef) -> bool:
        try:
            self._reach([entry])
        except CorruptBlob:
            return False
        return True

    def _keeps(self, entry: RemoteRef, commits: set[str], mixed: frozenset[str]) -> bool:
        try:
            reach = self._reach([entry])
        except CorruptBlob:
            return True
        return any(self._read[key].commit in commits for key in reach) or bool(self._packs(reach) & mixed)

    # -- rewriting

    def _rewrite(self, seen: _Sight, state: epochs.GcState) -> None:
        members = self._members(seen.mixed, seen.stays)
        packs = {key: packing.plan([one for one, _ in some.values()]) for key, some in members.items()}
        for key, plan in packs.items():
            self._copy(key, plan, layout.pack_key(state.epoch, plan.digest), members[key])
        fresh = self._manifests(seen, packs, state.epoch)
        mapped(lambda one: self.bucket.put(*one), list(fresh.values()), self.workers)
        for there in refs.read_listed(self.bucket, self.workers).values():
            if there.ref.manifest in fresh:
                if epochs.read(self.bucket)[0] != state:
                    raise _Again
                new = fresh[there.ref.manifest][0]
                if not refs.move(self.bucket, there, there.ref.commit, new, "forget: rewritten"):
                    raise _Again
        self.num_packs += len(packs)

    def _members(self, packs: Iterable[str], keys: Iterable[str]) -> dict[str, Members]:
        """What of each pack these manifests list, in the order in which it lies there."""
        found: dict[str, Members] = {pack: {} for pack in packs}
        for key in keys:
            one = self._read[key]
            for place in one.objects:
                if (pack := one.packs[place.pack].key) in found:
                    found[pack][place.id] = (
                        PackMember(place.id, True, place.nbytes, "U8", (place.nbytes,)),
                        place.offset,
                    )
            for blob in one.blobs:
                if (pack := one.packs[blob.pack].key) in found:
                    found[pack][blob.id] = PackMember(blob.id, False, blob.nbytes, blob.dtype, blob.shape), blob.offset
        return {pack: dict(sorted(some.items(), key=lambda one: one[1][1])) for pack, some in found.items()}

    def _copy(self, pack: str, plan: PlannedPack, key: str, members: Members) -> None:
        """Writes the new pack: each piece is read from the old one and hashed."""
        entries = [entry for entry in plan.entries if not entry.is_pad]
        data = self.bucket.read_ranges(pack, [(members[entry.id][1], entry.nbytes) for entry in entries])
        whole = bytearray(plan.nbytes)
        whole[: len(plan.header)] = plan.header
        for entry, piece in zip(entries, data, strict=True):
            if digest(piece) != entry.id:
                raise CorruptBlob(
                    f"{entry.id} in {pack} of {self.remote.url} is damaged, and a branch that stays needs it. No data "
                    "was deleted: forget all branches that need it, then push them again from where they still are."
                )
            whole[entry.offset : entry.offset + entry.nbytes] = piece
        self.bucket.put(key, memoryview(whole))

    def _manifests(self, seen: _Sight, packs: dict[str, PlannedPack], epoch: int) -> dict[str, tuple[str, bytes]]:
        """old key -> (key, bytes) of the manifests that lie in rewritten packs, and of all that lead to these."""
        offsets = {(pack, entry.id): entry.offset for pack, plan in packs.items() for entry in plan.entries}
        fresh: dict[str, tuple[str, bytes]] = {}

        def led(before: tuple[PushedParent, ...]) -> tuple[PushedParent, ...]:
            return tuple(
                PushedParent(p.commit, fresh[p.manifest][0] if p.manifest in fresh else p.manifest) for p in before
            )

        for key in self._parents_first(seen.stays):
            old = self._read[key]
            keys = [pack.key for pack in old.packs]
            parents, trail = led(old.parents), led(old.trail)
            if not packs.keys() & set(keys) and (parents, trail) == (old.parents, old.trail):
                continue
            new = msgspec.structs.replace(
                old, parents=parents, trail=trail,
                packs=tuple(
                    pack if pack.key not in packs
                    else manifest.PushedPack(layout.pack_key(epoch, packs[pack.key].digest), packs[pack.key].nbytes)
                    for pack in old.packs
                ),
                objects=tuple(
                    msgspec.structs.replace(one, offset=offsets.get((keys[one.pack], one.id), one.offset))
                    for one in old.objects
                ),
                blobs=tuple(
                    msgspec.structs.replace(one, offset=offsets.get((keys[one.pack], one.id), one.offset))
                    for one in old.blobs
                ),
            )  # fmt: skip
            data = manifest.encode(new)
            fresh[key] = layout.manifest_key(epoch, digest(data)), data
        return fresh

    def _parents_first(self, keys: Iterable[str]) -> list[str]:
        order, seen = list[str](), set[str]()
        waiting = [(key, False) for key in sorted(keys)]
        while waiting:
            key, done = waiting.pop()
            if done:
                order.append(key)
            elif key not in seen:
                seen.add(key)
                waiting.append((key, True))
                waiting += [(one.manifest, False) for one in (*self._read[key].parents, *self._read[key].trail)]
        return order

    # -- gc

    def _collect(self) -> None:
        """Runs gc until nothing is condemned."""
        wish = GcWish(grace_s=0.0, keep_reflog_s=KEEP_REFLOG_S, workers=self.workers)
        for _ in range(ATTEMPTS):
            done = collect(self.remote, wish)
            self.num_deleted += done.num_deleted
            self.nbytes += done.deleted_nbytes
            self.num_reflog += done.num_reflog_deleted
            if done.phase == "done":
                return
        raise Busy(f"gc of {self.remote.url} does not come to its end: another one runs. Try again when it is done.")
