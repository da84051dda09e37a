"""Branches and tags of a remote: one small object each, moved by compare-and-swap alone.

A ref's `generation` counts its moves and never starts again: a deleted ref stays as a tombstone, a value without a
commit. Before a ref moves, what it says is written to its reflog under its generation; whoever moves it next may write
that again, with the same bytes. Names of refs come from a listing, values never do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from thaw.core.errors import CorruptBlob, RemoteUncertain
from thaw.core.ids import is_id
from thaw.remote import layout, values
from thaw.remote.bucket import Bucket, Version
from thaw.remote.layout import Kind
from thaw.remote.parallel import SMALL_REQUESTS, mapped


class RemoteRef(values.Checked, frozen=True, kw_only=True, tag="thaw.remote-ref/1"):
    """`commit` None: deleted, or made and not moved yet. `manifest`: the key of its commit's. `mover`: drawn by who
    moved it last. `fence`: the sweep of gc that saw it last; that is no move."""

    kind: Kind
    name: str
    commit: str | None = None
    manifest: str | None = None
    generation: int = 0
    mover: str = ""
    fence: int = 0
    reason: str = ""


class StandingRef(NamedTuple):
    ref: RemoteRef
    version: Version


def read(bucket: Bucket, kind: Kind, name: str) -> StandingRef | None:
    """What the ref says now, a tombstone as well; None where there never was one. Raises `CorruptBlob`."""
    found = bucket.read(layout.ref_key(kind, name))
    return None if found is None else StandingRef(decode(found.data, kind, name), found.version)


def decode(data: bytes, kind: Kind, name: str) -> RemoteRef:
    what = f"the {kind} {name!r} of the remote ({layout.ref_key(kind, name)})"
    ref = values.decode(data, RemoteRef, what)
    if ref.kind != kind or ref.name != name or (ref.commit is None) != (ref.manifest is None):
        raise CorruptBlob(f"{what} says that it is the {ref.kind} {ref.name[:80]!r}, or half of a value")
    if ref.commit is not None and ref.manifest is not None:
        if not is_id(ref.commit):
            raise CorruptBlob(f"{what} names {ref.commit[:80]!r}, which is no commit")
        layout.check_data_key(ref.manifest, layout.MANIFESTS, what)
    return ref


def names(bucket: Bucket, kind: Kind) -> list[str]:
    """Every name that has or had a ref, from a listing. What is no name of a ref is not thaw's, and left alone."""
    found = (layout.ref_name(entry.key) for entry in bucket.entries(f"{layout.REFS}{kind}/"))
    return sorted(name for name in found if name is not None)


def read_all(
    bucket: Bucket, wanted: Iterable[tuple[Kind, str]], workers: int = SMALL_REQUESTS
) -> dict[tuple[Kind, str], StandingRef]:
    """Those of `wanted` that there are, tombstones as well."""
    asked = list(dict.fromkeys(wanted))
    found = mapped(lambda one: read(bucket, *one), asked, workers)
    return {one: ref for one, ref in zip(asked, found, strict=True) if ref is not None}


def read_listed(bucket: Bucket, workers: int = SMALL_REQUESTS) -> dict[tuple[Kind, str], StandingRef]:
    """Every ref whose name is listed."""
    return read_all(bucket, [(kind, name) for kind in layout.KINDS for name in names(bucket, kind)], workers)


def place(bucket: Bucket, kind: Kind, name: str) -> StandingRef:
    """The ref as it stands; a new one is made without a commit first, so gc sees it before it means anything."""
    while True:
        found = read(bucket, kind, name)
        if found is not None:
            return found
        fresh = RemoteRef(kind=kind, name=name, writer=values.nonce())
        with contextlib.suppress(RemoteUncertain):
            version = bucket.create(layout.ref_key(kind, name), values.encode(fresh))
            if version is not None:
                return StandingRef(fresh, version)


def move(bucket: Bucket, standing: StandingRef, commit: str | None, manifest: str | None, reason: str) -> bool:
    """Whether the ref was moved from what `standing` says; False where it changed meanwhile."""
    old = standing.ref
    if old.generation:
        bucket.put(layout.reflog_key(old.kind, old.name, old.generation), values.encode(unfenced(old)))
    new = RemoteRef(
        kind=old.kind, name=old.name, commit=commit, manifest=manifest, generation=old.generation + 1,
        mover=values.nonce(), fence=old.fence, reason=reason, writer=values.nonce(),
    )  # fmt: skip
    try:
        return bucket.swap(layout.ref_key(old.kind, old.name), values.encode(new), standing.version) is not None
    except RemoteUncertain:
        return _was_moved(bucket, new)


def _was_moved(bucket: Bucket, move: RemoteRef) -> bool:
    """Whether a move whose answer was lost was made: the ref says so, or, if it has moved on, its reflog."""
    standing = read(bucket, move.kind, move.name)
    if standing is None or standing.ref.generation < move.generation:
        return False
    if standing.ref.generation == move.generation:
        return standing.ref.mover == move.mover
    entry = bucket.read(layout.reflog_key(move.kind, move.name, move.generation))
    if entry is None:
        raise RemoteUncertain(
            f"{move.kind} {move.name!r} has moved on, and its reflog does not tell whether this move was made. "
            "Fetch, look at it, then decide."
        )
    return decode(entry.data, move.kind, move.name).mover == move.mover


def fence(bucket: Bucket, kind: Kind, name: str, number: int) -> RemoteRef | None:
    """Writes the ref anew, with the same meaning: who read it before cannot move it. Returns what it says."""
    while (standing := read(bucket, kind, name)) is not None:
        new = msgspec.structs.replace(standing.ref, fence=number, writer=values.nonce())
        with contextlib.suppress(RemoteUncertain):
            if bucket.swap(layout.ref_key(kind, name), values.encode(new), standing.version) is not None:
                return new
    return None


def unfenced(ref: RemoteRef) -> RemoteRef:
    """The ref as its reflog has it, the same whoever writes it: without what a fence changed."""
    return msgspec.structs.replace(ref, fence=0, writer="")
