"""Remote-tracking points: `origin/main` is where the remote's branch `main` stood when it was last seen.

In the store they are refs of the kind that sessions do not move (tags), under the remote's name: every verb that takes
a point takes them, and gc keeps what they name. Lists of tags leave them out.
"""

from __future__ import annotations

from collections.abc import Iterable

from thaw.remote.settings import RemoteBook
from thaw.store import Ref, RefUpdate, Store


def name_of(remote: str, branch: str) -> str:
    return f"{remote}/{branch}"


def where(store: Store, remote: str, branch: str) -> str | None:
    """The commit at which the remote's branch was last seen."""
    ref = store.ref(name_of(remote, branch))
    return ref.target if ref is not None and ref.kind == "tag" else None


def update(remote: str, branch: str, commit: str, reason: str) -> RefUpdate:
    from thaw.core.ids import CommitId

    return RefUpdate(name_of(remote, branch), "tag", CommitId(commit), "any", reason)


def removal(store: Store, remote: str, branch: str, reason: str) -> list[RefUpdate]:
    """What takes a tracking point away; nothing where there is none."""
    there = where(store, remote, branch) is not None
    return [RefUpdate(name_of(remote, branch), "tag", None, "any", reason)] if there else []


def tracked(store: Store, remote: str) -> list[Ref]:
    """The tracking points of a remote, by name."""
    return [ref for ref in store.refs("tag") if ref.name.startswith(f"{remote}/")]


def without(refs: Iterable[Ref], book: RemoteBook) -> list[Ref]:
    """`refs` without tracking points."""
    return [ref for ref in refs if ref.kind != "tag" or not is_tracking(ref.name, book)]


def is_tracking(name: str, book: RemoteBook) -> bool:
    return name.partition("/")[0] in book.remotes and "/" in name
