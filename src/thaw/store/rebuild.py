"""Making the database again from packs and refs.json (and what the old database still says).

Objects and blob places come from the packs. Refs, reflog, HEAD and settings come from refs.json, brought up by rows of
the old database that match their checksums. A commit that is newer than its branch and descends from it
(`Commit.branch` is the hint) moves the branch forward. A ref whose commit is lost goes back to the newest one in its
reflog that is there. Commits that nothing names are kept from gc by a reflog entry.
Packs that a running process is only writing are left to it. The old file is kept aside.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
import uuid as uuids
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from thaw.core.canonical import MAX_OBJECT_BYTES
from thaw.core.errors import CorruptBlob, Damaged, NewerFormat, ThawError
from thaw.core.ids import CommitId
from thaw.core.namespaces import qualify, split
from thaw.core.objects import Commit, decode
from thaw.data.files import storage_errors
from thaw.data.header import OBJECT
from thaw.data.locations import BlobLocation
from thaw.data.pack import PackItem, write_pack
from thaw.store import backup, boundary, leases, objects, refs, refslog, shallow, windows
from thaw.store.db import BUSY_S, Database, creating, remove_strangers
from thaw.store.filesystem import refuse_network
from thaw.store.links import Links, links
from thaw.store.locks import locked
from thaw.store.refs import Ref, ReflogEntry
from thaw.store.salvage import Salvage, salvage
from thaw.store.saving import Saver
from thaw.store.scan import PackFiles, PackScan, list_packs, scan_packs
from thaw.store.schema import DATABASE, PACKS, SHALLOW
from thaw.store.settings import admit, admit_namespaces, set_setting
from thaw.store.windows import Windows


@dataclass
class _Found:
    """What the packs hold."""

    packs: dict[str, int] = field(default_factory=dict)
    blobs: dict[str, BlobLocation] = field(default_factory=dict)
    objects: dict[str, tuple[BlobLocation, bytes]] = field(default_factory=dict)
    links: dict[str, Links] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    uuid: str = ""
    absent: set[str] = field(default_factory=set)
    """Commits that were not fetched."""

    def read(self, identifier: str) -> bytes:
        """The bytes of an object. Raises `CorruptBlob` where it is lost."""
        if identifier not in self.objects:
            raise CorruptBlob(f"object {identifier[:80]} is lost")
        return self.objects[identifier][1]


def rebuild(path: Path, scans: dict[str, PackScan], *, deep: bool = True) -> list[str]:
    """Replaces the database of the repository in `path`, atomically; returns what is worth telling.

    `scans` say which bytes are good; packs that came since are scanned as well. Others may go on: what they committed
    is in the new database, their leases too, and who writes to the database waits while it is exchanged.

    Raises `Busy` when gc or another rebuild runs, `NewerFormat`, `StorageFailed`; then the old database is still there.
    """
    refuse_network(path)
    with storage_errors(path / PACKS, "make"):
        (path / PACKS).mkdir(mode=0o700, exist_ok=True)
    notes: list[str] = []
    busy = f"gc or another rebuild is running in {path}. Try again when it is done."
    with locked(path / "gc.lock", wait_s=0, busy=busy):
        scans = _scan_on(path / PACKS, scans, deep)
        busy = f"another process has been writing to {path} for {BUSY_S:.0f} s. Try again when it is done."
        with locked(path, wait_s=BUSY_S, busy=busy):
            remove_strangers(path / DATABASE)
            old = salvage(path / DATABASE)
            scans = _scan_on(path / PACKS, scans, deep)
            found = _collect(path / PACKS, {name: scan for name, scan in scans.items() if name not in old.held()})
            _rescue(path / PACKS, old, found)
            saved = _merge(_saved(path), old)
            with creating(path, saved.uuid or found.uuid or str(uuids.uuid4())) as connection:
                _fill(connection, found)
                _restore_refs(connection, saved, found, notes)
                for lease in old.leases:
                    leases.put(connection, lease)
        with contextlib.closing(Database(path / DATABASE)) as database:
            Saver(path, database).save(anew=True)
    counts = f"{len(found.packs)} packs, {len(found.blobs)} blobs, {len(found.objects)} objects"
    return [f"the database was made again: {counts}, {len(found.commits)} commits", *notes]


def _scan_on(folder: Path, scans: dict[str, PackScan], deep: bool) -> dict[str, PackScan]:
    """The scans of the packs that are there now; what came meanwhile is scanned, what is gone left out."""
    names = list_packs(folder)
    new = scan_packs(folder, [name for name in names if name not in scans], deep=deep)
    return {name: scans[name] if name in scans else new[name] for name in names}


def _saved(path: Path) -> backup.Backup | None:
    try:
        return refslog.read(path)[0]
    except Damaged:
        return None


def _merge(saved: backup.Backup | None, old: Salvage) -> backup.Backup:
    """refs.json, or the old database's rows where they are newer; the reflog of both."""
    base = saved or backup.Backup(digest="", sequence=0, uuid="", head="main", refs=(), reflog=(), settings={})
    rows = old.as_backup()
    newest, other = (rows, base) if saved is None or old.sequence > base.sequence else (base, rows)
    entries = {entry: None for entry in sorted((*newest.reflog, *other.reflog), key=lambda entry: entry.time_ns)}
    known = {ref.name: ref for ref in (newest.refs or other.refs)}
    return backup.Backup(
        digest="",
        sequence=max(newest.sequence, other.sequence),
        uuid=newest.uuid or other.uuid,
        head=newest.head or other.head or "main",
        refs=tuple(known.values()),
        reflog=tuple(reversed(entries)),
        settings={**other.settings, **newest.settings},
    )


def _collect(folder: Path, scans: dict[str, PackScan]) -> _Found:
    found = _Found()
    with PackFiles(folder) as files:
        for name, scan in scans.items():
            if scan.header is None:
                continue
            found.packs[name] = scan.header.nbytes
            found.uuid = found.uuid or scan.header.metadata.get("thaw.store", "")
            for entry in scan.good():
                place = BlobLocation(blob=entry.id, pack=name, offset=entry.offset, nbytes=entry.nbytes)
                if entry.is_object:
                    _take_object(files, place, found)
                else:
                    found.blobs.setdefault(entry.id, place)
    return found


def _take_object(files: PackFiles, place: BlobLocation, found: _Found) -> None:
    """Objects that do not verify or decode are left out; the scan or the next check names them. Raises `NewerFormat`:
    a database without what a newer thaw wrote would be taken for the whole."""
    try:
        if place.nbytes <= MAX_OBJECT_BYTES:
            _keep_object(place, files.read(place.pack, place.offset, place.nbytes), found)
    except NewerFormat:
        raise
    except ThawError:
        return


def _keep_object(place: BlobLocation, data: bytes, found: _Found) -> None:
    """Raises `CorruptBlob`, `NewerFormat`."""
    value = decode(data, place.blob)
    found.links[place.blob] = links(data)
    found.objects[place.blob] = (place, data)
    if isinstance(value, Commit):
        found.commits[place.blob] = value


def _rescue(folder: Path, old: Salvage, found: _Found) -> None:
    """Objects that only the old database still has are written into a pack again."""
    lost = {i: data for i, data in old.objects.items() if i not in found.objects and _is_object(data, i)}
    if not lost:
        return
    items = [PackItem(OBJECT, "U8", (len(data),), len(data), lambda data=data: data) for data in lost.values()]  # type: ignore[misc]
    result = write_pack(folder, leases.new_pack_name(), items)
    found.packs[result.name] = result.nbytes
    for place, data in zip(result.blobs, lost.values(), strict=True):
        _keep_object(place, data, found)


def _is_object(data: bytes, identifier: str) -> bool:
    try:
        return decode(data, identifier) is not None
    except NewerFormat:
        raise
    except ThawError:
        return False


def _fill(connection: sqlite3.Connection, found: _Found) -> None:
    for name, nbytes in found.packs.items():
        objects.insert_pack(connection, name, nbytes)
    objects.insert_blobs(connection, found.blobs.values())
    for identifier in sorted(found.objects, key=lambda i: int(found.commits[i].time_ns) if i in found.commits else -1):
        place, data = found.objects[identifier]
        objects.insert_object(connection, place, found.links[identifier], data)
    windows.insert(connection, Windows(found.read).rows(objects.homes(_oldest_first(found)), whole=False))


def _oldest_first(found: _Found) -> dict[str, Links]:
    """The links, those of states as they were committed: a segment's home is the state that it was made for again."""
    states = [found.commits[one].state for one in sorted(found.commits, key=lambda i: int(found.commits[i].time_ns))]
    return {**{state: found.links[state] for state in states if state in found.links}, **found.links}


def _restore_refs(connection: sqlite3.Connection, saved: backup.Backup, found: _Found, notes: list[str]) -> None:
    for key, value in {**saved.settings, "head": saved.head, "sequence": str(saved.sequence)}.items():
        set_setting(connection, key, value)
    if _has_namespaces(saved, found):
        admit_namespaces(connection)
    if shallow.KEY in saved.settings:
        admit(connection, SHALLOW)
        found.absent = set(shallow.decode(saved.settings[shallow.KEY])) - found.links.keys()
        boundary.add(connection, {})
    refs.log_moves(connection, reversed(saved.reflog))
    tips = {ref.name: ref for ref in saved.refs}
    for ref in saved.refs:
        if ref.target not in found.commits:
            _fall_back(tips, ref, saved.reflog, found, notes)
    _advance(tips, saved, found, notes)
    before = {ref.name: ref for ref in saved.refs}
    for ref in tips.values():
        refs.write_ref(connection, ref)
        if ref != before.get(ref.name):
            old = before[ref.name].target if ref.name in before else None
            move = ReflogEntry(ref.name, old, ref.target, "fsck --rebuild", time.time_ns(), ref.kind)
            refs.log_moves(connection, [move])
    _keep_unnamed(connection, tips.values(), saved, found, notes)
    refs.bump_sequence(connection)


def _has_namespaces(saved: backup.Backup, found: _Found) -> bool:
    named = [*(ref.name for ref in saved.refs), *(entry.name for entry in saved.reflog)]
    return (
        any(split(name)[0] for name in named)
        or any(key.startswith("user.namespaces.") for key in saved.settings)
        or any(commit.of_namespace for commit in found.commits.values())
    )


def _fall_back(tips: dict[str, Ref], ref: Ref, reflog: Iterable[ReflogEntry], found: _Found, notes: list[str]) -> None:
    for entry in reflog:
        for commit in (entry.new, entry.old):
            if entry.name == ref.name and entry.moved and commit in found.commits and commit is not None:
                tips[ref.name] = Ref(ref.name, ref.kind, commit)
                notes.append(f"{ref.kind} {ref.name!r}: commit {ref.target} is lost; it stands at {commit} again")
                return
    del tips[ref.name]
    notes.append(f"{ref.kind} {ref.name!r} is gone: its commit {ref.target} is lost")


def _advance(tips: dict[str, Ref], saved: backup.Backup, found: _Found, notes: list[str]) -> None:
    """Moves branches forward to whole commits that say they are on them, descend from them, and are newer."""
    newest = {entry.name: entry.time_ns for entry in reversed(saved.reflog)}
    whole = wholes(found.links, found.blobs.keys(), found.absent)
    logged = {commit for entry in saved.reflog for commit in (entry.old, entry.new)}
    for identifier, commit in sorted(found.commits.items(), key=lambda pair: pair[1].time_ns):
        name = _branch(commit)
        if name is None or identifier in logged or commit.time_ns <= newest.get(name, 0):
            continue
        tip = tips.get(name)
        follows = tip is None or (tip.kind == "branch" and descends(found.commits, identifier, tip.target))
        if follows and (tip is not None or name not in newest) and identifier in whole:
            tips[name] = Ref(name, "branch", CommitId(identifier))
            notes.append(f"branch {name!r} stands at {identifier}, which is newer than refs.json")


def _branch(commit: Commit) -> str | None:
    """The branch that a commit says it was made on, called as in the tables; None where that cannot name one."""
    try:
        return None if commit.branch is None else qualify(commit.of_namespace, commit.branch)
    except ThawError:
        return None


def _keep_unnamed(
    connection: sqlite3.Connection, tips: Iterable[Ref], saved: backup.Backup, found: _Found, notes: list[str]
) -> None:
    named = {ref.target for ref in tips} | {c for e in saved.reflog for c in (e.old, e.new) if c is not None}
    pending = list(named)
    while pending:
        commit = found.commits.get(pending.pop())
        new = [parent for parent in (commit.parents if commit else ()) if parent not in named]
        named.update(new)  # type: ignore[arg-type]
        pending += new  # type: ignore[arg-type]
    whole = wholes(found.links, found.blobs.keys(), found.absent)
    for identifier, commit in found.commits.items():
        if identifier not in named and identifier in whole:
            name = _branch(commit) or qualify(commit.of_namespace, "lost-found")
            now = time.time_ns()
            kept = ReflogEntry(name, None, CommitId(identifier), "found by fsck --rebuild", now, moved=False)
            refs.log_moves(connection, [kept])
            notes.append(f"commit {identifier} has no branch or tag; gc keeps it for now")


def descends(commits: dict[str, Commit], identifier: str, ancestor: str) -> bool:
    """Whether `ancestor` is `identifier` or an ancestor of it, all of which are older than what comes from them."""
    until = commits[ancestor].time_ns if ancestor in commits else 0
    seen: set[str] = set()
    pending = [identifier]
    while pending:
        one = pending.pop()
        if one == ancestor:
            return True
        if one not in seen and one in commits and commits[one].time_ns >= until:
            seen.add(one)
            pending.extend(commits[one].parents)
    return False


def wholes(of: dict[str, Links], blobs: Collection[str], absent: Collection[str] = ()) -> set[str]:
    """The objects under which everything is there, but for what was not fetched (`absent`)."""
    users: dict[str, list[str]] = defaultdict(list)
    broken: list[str] = []
    for identifier, links_ in of.items():
        for linked in links_.objects:
            users[linked].append(identifier)
        lost = any(linked not in of for linked in links_.without(absent))
        if lost or any(blob not in blobs for blob in links_.blobs):
            broken.append(identifier)
    whole = set(of) - set(broken)
    while broken:
        for user in users[broken.pop()]:
            if user in whole:
                whole.remove(user)
                broken.append(user)
    return whole
