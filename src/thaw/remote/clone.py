"""Clone: a new repository from a remote. What fails leaves nothing behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from thaw.core.errors import Conflict, NotFound
from thaw.core.ids import CommitId
from thaw.remote import about, settings, tracking
from thaw.remote.fetch import FetchWish, fetch
from thaw.remote.meter import TransferMeter
from thaw.remote.opened import OpenedRemote
from thaw.remote.report import TransferReport
from thaw.remote.settings import RemoteSettings
from thaw.store import RefUpdate, Store


class CloneWish(NamedTuple):
    """`branch`: the one to start on (None: the one that the remote names). `single`: no other one is fetched."""

    branch: str | None = None
    single: bool = False


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
    made = _made(path)
    whole = Store.init(path)
    try:
        store = whole.within(remote.bucket.namespace) if remote.bucket.namespace else whole
        settings.add(store, remote.name, remote_settings)
        only = (wish.branch or said.head,) if wish.single else None
        report = fetch(store, remote, FetchWish(branches=only), meter=meter)
        _start(store, remote, wish.branch, said.head)
    except BaseException:
        whole.close()
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    whole.close()
    return report


def _made(path: Path) -> list[Path]:
    """The folders that a clone makes; what is there already stays there."""
    if path.exists() and any(path.iterdir()):
        raise Conflict(f"{path} is not empty. Clone into a folder of its own.")
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    return missing[-1:] or [path]


def _start(store: Store, remote: OpenedRemote, branch: str | None, head: str) -> None:
    """The first local branch, which HEAD names, at where the remote has it."""
    there = {ref.name.removeprefix(f"{remote.name}/"): ref.target for ref in tracking.tracked(store, remote.name)}
    if branch is not None and branch not in there:
        raise NotFound(
            f"there is no branch {branch!r} in {remote.url}; there are: {', '.join(sorted(there)) or 'none'}."
        )
    name = branch or (head if head in there else next(iter(sorted(there)), None))
    if name is None:
        store.set_head(head)
        return
    commit = CommitId(there[name])
    store.update_refs(RefUpdate(name, "branch", commit, None, f"clone of {remote.url}"))
    settings.set_upstream(store, name, remote.name, name)
    store.set_head(name)
