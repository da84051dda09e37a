"""Clone: a new repository from a remote. What fails leaves nothing behind."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from thaw.core.errors import Conflict, NotFound
from thaw.core.ids import CommitId
from thaw.data.files import storage_errors
from thaw.remote import about, refs, settings, tracking
from thaw.remote.fetch import FetchWish, fetch
from thaw.remote.meter import TransferMeter
from thaw.remote.opened import OpenedRemote
from thaw.remote.report import RefMoved, TransferReport
from thaw.remote.settings import RemoteSettings
from thaw.store import RefUpdate, Store
from thaw.store.locks import locked

LOCK_WAIT_S = 30.0


class CloneWish(NamedTuple):
    """`branch`: the one to start on (None: the one that the remote names). `single`: no other one is fetched.
    `refs_only`: none is; each is fetched when it is used. `depth`: of each so many commits (None: all)."""

    branch: str | None = None
    single: bool = False
    refs_only: bool = False
    depth: int | None = None


def clone(
    path: Path,
    remote: OpenedRemote,
    remote_settings: RemoteSettings,
    wish: CloneWish = CloneWish(),  # noqa: B008 - a value
    *,
    meter: TransferMeter | None = None,
) -> TransferReport:
    """Makes a repository in a new or empty folder and fetches into it. Raises `Conflict` where something is there,
    `NotFound` where the remote has nothing, or not that branch."""
    said = about.require(remote.whole, remote.url)
    if wish.branch is not None:
        tracking.require_place(remote.name, wish.branch)
    parents = [folder for folder in path.parents if not folder.exists()]
    whole = _made(path, parents)
    try:
        with contextlib.closing(whole):
            store = whole.within(remote.bucket.namespace) if remote.bucket.namespace else whole
            return _filled(store, remote, remote_settings, wish, said.head, meter)
    except BaseException:
        _remove(path, parents)
        raise


def _made(path: Path, parents: Sequence[Path]) -> Store:
    """A new repository; of two clones into one folder, one makes it, and no other removes it. Raises `Conflict`,
    `Busy`, `StorageFailed`."""
    with storage_errors(path, "make a repository in"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent, wait_s=LOCK_WAIT_S, busy=f"another process has locked {path.parent}; try again"):
        if path.exists() and any(path.iterdir()):
            raise Conflict(
                f"{path} is not empty. Clone into a folder of its own. If a clone was interrupted here, delete what it "
                f"left, or go on with `thaw -C {path} fetch` and then `pull`."
            )
        try:
            return Store.init(path)
        except BaseException:
            _remove(path, parents)
            raise


def _remove(path: Path, parents: Sequence[Path]) -> None:
    """What this clone made; a parent that has something else in it stays."""
    shutil.rmtree(path, ignore_errors=True)
    for folder in parents:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _filled(
    store: Store,
    remote: OpenedRemote,
    remote_settings: RemoteSettings,
    wish: CloneWish,
    head: str,
    meter: TransferMeter | None,
) -> TransferReport:
    """Fetches into a new store. Where that is killed, fetch and pull go on: HEAD and the remote are known first."""
    store.set_head(wish.branch or head)
    settings.add(store, remote.name, remote_settings)
    only = (wish.branch or head,) if wish.single else None
    if wish.refs_only:
        report = _promise(store, remote, only)
    else:
        report = fetch(store, remote, FetchWish(branches=only, depth=wish.depth), meter=meter)
    _start(store, remote, wish.branch, head)
    return report


def _promise(store: Store, remote: OpenedRemote, only: tuple[str, ...] | None) -> TransferReport:
    """Remembers where the remote's branches stand; nothing of them comes here yet."""
    names = refs.names(remote.bucket, "branch") if only is None else only
    found = refs.read_all(remote.bucket, [("branch", name) for name in names])
    points = {
        tracking.name_of(remote.name, name): there.ref.commit
        for (_, name), there in found.items()
        if there.ref.commit is not None and tracking.has_place(remote.name, name)
    }
    settings.promise(store, points)
    moved = [
        RefMoved(kind="branch", name=point, outcome="new", old=None, new=commit) for point, commit in points.items()
    ]
    return TransferReport(remote=remote.name, url=remote.url, refs=tuple(moved))


def _start(store: Store, remote: OpenedRemote, branch: str | None, head: str) -> None:
    """The first local branch, which HEAD names, at where the remote has it, if that is here."""
    here = {ref.name: ref.target for ref in tracking.tracked(store, remote.name)}
    points = {**settings.promised(store), **here}
    there = {point.removeprefix(f"{remote.name}/"): commit for point, commit in points.items()}
    if branch is not None and branch not in there:
        raise NotFound(
            f"there is no branch {branch!r} in {remote.url}; there are: {', '.join(sorted(there)) or 'none'}."
        )
    name = branch or (head if head in there else next(iter(sorted(there)), None))
    if name is None:
        store.set_head(head)
        return
    if tracking.name_of(remote.name, name) in here:
        commit = CommitId(there[name])
        store.update_refs(RefUpdate(name, "branch", commit, None, f"clone of {remote.url}"))
    settings.set_upstream(store, name, remote.name, name)
    store.set_head(name)
