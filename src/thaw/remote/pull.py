"""Pull: fetch a branch, then move the local one forward to it. Nothing is merged: KV cannot be."""

from __future__ import annotations

import msgspec

from thaw.core.errors import NotFound, RefConflict
from thaw.core.ids import CommitId, short
from thaw.remote import settings, tracking
from thaw.remote.fetch import FetchWish, fetch
from thaw.remote.local import LocalHistory
from thaw.remote.meter import TransferMeter
from thaw.remote.opened import OpenedRemote
from thaw.remote.report import Outcome, RefMoved, TransferReport
from thaw.store import RefUpdate, Store


def pull(
    store: Store, remote: OpenedRemote, branch: str, theirs: str, *, meter: TransferMeter | None = None
) -> TransferReport:
    """Brings the local `branch` to where the remote's branch `theirs` stands. The report's last ref is the local one.

    Raises `RefConflict` naming both commits where neither descends from the other, and where the branch moved
    meanwhile; what was fetched stays.
    """
    report = fetch(store, remote, FetchWish(branches=(theirs,)), meter=meter)
    new = tracking.where(store, remote.name, theirs)
    if new is None:
        raise NotFound(f"{tracking.name_of(remote.name, theirs)} was removed while it was pulled. Pull again.")
    moved = forward(store, branch, CommitId(new), tracking.name_of(remote.name, theirs))
    return msgspec.structs.replace(report, refs=(*report.refs, moved))


def forward(store: Store, branch: str, new: CommitId, theirs: str) -> RefMoved:
    """Moves a branch forward to a commit, or makes it. Raises `RefConflict`."""
    here = store.ref(branch)
    old = None if here is None else here.target
    outcome = _outcome(LocalHistory(store), branch, old, new, theirs)
    if outcome in ("new", "moved"):
        store.update_refs(RefUpdate(branch, "branch", new, None if old is None else CommitId(old), f"pull: {theirs}"))
        return RefMoved(kind="branch", name=branch, outcome=outcome, old=old, new=new)
    return RefMoved(kind="branch", name=branch, outcome=outcome, old=old, new=old)


def _outcome(local: LocalHistory, branch: str, old: str | None, new: str, theirs: str) -> Outcome:
    if old is None:
        return "new"
    if old == new:
        return "up-to-date"
    if local.descends(new, old):
        return "moved"
    if local.descends(old, new):
        return "ahead"
    ends = local.ends(new)
    if ends is not None:
        raise RefConflict(
            f"{branch!r} stands at {short(old)}, {theirs} at {short(new)}, and whether one descends from the other is "
            f"not known here: history begins after {short(ends)}. `thaw fetch --unshallow`, then pull again."
        )
    raise RefConflict(
        f"{branch!r} stands at {short(old)}, {theirs} at {short(new)}, and neither descends from the other; nothing is "
        f"merged. Keep both (`thaw branch NAME {theirs}`), or take theirs (`thaw adopt {theirs} {branch}`)."
    )


def upstream_of(store: Store, branch: str, remote: str) -> str:
    """The name of the remote's branch that a local branch follows."""
    found = settings.upstream(store, branch)
    return found.branch if found is not None and found.remote == remote else branch
