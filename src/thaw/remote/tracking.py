"""Remote-tracking points: `origin/main` is where the remote's branch `main` stood when it was last seen.

In the store they are refs of the kind that sessions do not move (tags), under the remote's name: every verb that takes
a point takes them, and gc keeps what they name. Lists of tags leave them out.
"""

from __future__ import annotations

from collections.abc import Iterable

from thaw.core import points
from thaw.core.errors import BadPoint, InvalidRequest
from thaw.remote.settings import RemoteBook
from thaw.store import Ref, RefUpdate, Store


def name_of(remote: str, branch: str) -> str:
    return f"{remote}/{branch}"


def has_place(remote: str, branch: str) -> bool:
    """Whether a branch of the remote can have a tracking point: with the remote's name it may be too long for one."""
    try:
        points.check_name(name_of(remote, branch))
    except BadPoint:
        return False
    return True


def require_place(remote: str, branch: str) -> None:
    """Raises `InvalidRequest`, `BadPoint` for what is no branch's name anywhere."""
    points.check_name(branch)
    if not has_place(remote, branch):
        raise InvalidRequest(
            f"branch {branch[:80]!r} of {remote[:80]!r} would be the point {name_of(remote, branch)[:80]!r}…, of "
            f"{len(name_of(remote, branch))} characters; a point's name has {points.MAX_NAME} at most. Give the branch "
            "or the remote a shorter name."
        )


def where(store: Store, remote: str, branch: str) -> str | None:
    """The commit at which the remote's branch was last seen."""
    ref = store.ref(name_of(remote, branch)) if has_place(remote, branch) else None
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
