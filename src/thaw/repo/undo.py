"""Undo: a branch goes back to where it was before its last move; nothing is deleted, and the reflog says so.

Each undo takes back one move more: what an undo took back, and the undo itself, are left out when the next is looked
for. To go forward again, adopt where it was (`thaw adopt main@{1} main`).
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from thaw.core.errors import Conflict, NotFound
from thaw.core.ids import CommitId, short
from thaw.repo.refs import require_own
from thaw.repo.resolve import known_names
from thaw.store import ReflogEntry, RefUpdate, Store

REASON = "undo: "


class Undone(msgspec.Struct, frozen=True, kw_only=True):
    """What was taken back. `old`, `new`: where the ref stood before the undo, and stands now; None: it is not there."""

    name: str
    kind: str
    old: CommitId | None
    new: CommitId | None
    reason: str


def undo(store: Store, name: str) -> Undone:
    """Takes back the last move of a branch or tag; a deleted one is there again, one just made is deleted.

    Atomic, on disk on return. Raises `NotFound` when nothing is left to take back, `RefConflict` in a race, `Conflict`
    when gc removed the commit meanwhile.
    """
    entries = store.reflog(require_own(store, name))
    move = last_move(entries)
    if move is None:
        raise NotFound(f"{name!r} has no move left to take back{known_names(store)}")
    if move.old is not None and not store.has(move.old):
        raise Conflict(f"{name!r} was at {short(move.old)}, which gc has removed since; it cannot go back there.")
    now = store.ref(name)
    if entries[0].new != (now.target if now else None):
        raise Conflict(f"{name!r} moved just now. Look with `thaw reflog {name}`, then undo again.")
    update = RefUpdate(name, move.kind, move.old, entries[0].new, REASON + move.reason)
    store.update_refs(update)
    return Undone(name=name, kind=move.kind, old=entries[0].new, new=move.old, reason=move.reason)


def last_move(entries: Iterable[ReflogEntry]) -> ReflogEntry | None:
    """The newest move that no undo took back; `entries` newest first."""
    taken_back = 0
    for entry in entries:
        if entry.reason.startswith(REASON):
            taken_back += 1
        elif taken_back:
            taken_back -= 1
        else:
            return entry
    return None
