"""Branches and tags: named commits. Every move is a compare-and-swap and leaves a line in the reflog.

A ref names a whole commit. To name an earlier token, open a session there and commit it.
"""

from __future__ import annotations

from typing import Literal

from thaw.core import points
from thaw.core.errors import InvalidRequest, NotFound, RefConflict
from thaw.core.ids import CommitId, short
from thaw.repo.resolve import ResolvedPoint, resolve
from thaw.store import Ref, RefUpdate, Store

RefKind = Literal["branch", "tag"]


RESERVED = {
    "HEAD": "the current branch",
    "detached": "the log of commits on no branch",
}
"""Names that mean something of their own."""
DETACHED = "detached"


def check_name(name: str) -> str:
    """`name` if a branch or tag may be called so. Raises `BadPoint`, `InvalidRequest`."""
    points.check_name(name)
    if name in RESERVED:
        raise InvalidRequest(f"{name!r} names {RESERVED[name]}; choose another name")
    return name


def require_own(store: Store, name: str) -> str:
    """`name` if a branch or tag of one's own may be called so: not as the points of a remote. Raises `BadPoint`,
    `InvalidRequest`."""
    if "/" in check_name(name):
        from thaw.remote import settings, tracking

        if tracking.is_tracking(name, settings.read(store)):
            remote = name.partition("/")[0]
            raise InvalidRequest(
                f"{name!r} is where a branch of the remote {remote!r} was last seen; only fetch and push move it. "
                "Choose another name."
            )
    return name


def require_movable(store: Store, name: str, parent: CommitId | None) -> None:
    """That a child of `parent` may become this branch: it is there already, or nowhere yet. Raises `BadPoint`,
    `InvalidRequest`, `RefConflict`."""
    ref = store.ref(require_own(store, name))
    if ref is not None and ref.kind != "branch":
        raise InvalidRequest(f"{name!r} is a {ref.kind} already; choose another name for the branch.")
    if ref is not None and ref.target != parent:
        here = short(parent) if parent else "a new session"
        raise RefConflict(
            f"branch {name!r} is at {short(ref.target)}, and this begins at {here}: it cannot move the branch. "
            "Begin at the branch, or choose another name."
        )


def create(store: Store, name: str, kind: RefKind, point: str | ResolvedPoint) -> Ref:
    """A new branch or tag. Raises `RefConflict` when the name is taken."""
    require_own(store, name)
    where = whole(resolve(store, point), f"a {kind}")
    store.update_refs(RefUpdate(name=name, kind=kind, target=where, expect=None, reason=f"{kind}: at {short(where)}"))
    return Ref(name=name, kind=kind, target=where)


def delete(store: Store, name: str, kind: RefKind, at: CommitId | None = None) -> Ref:
    """Remove a branch or tag; its commits stay until gc, and its reflog remembers them. Returns what it was. Raises
    `RefConflict` where it names another commit than `at`, if that is given."""
    ref = _existing(store, require_own(store, name), kind)
    if at is not None and ref.target != at:
        raise RefConflict(f"{name} is at {short(ref.target)} now, no longer at {short(at)}; nothing was deleted")
    store.update_refs(RefUpdate(name=name, kind=ref.kind, target=None, expect=ref.target, reason=f"{kind}: deleted"))
    return ref


def rename(store: Store, old: str, new: str) -> Ref:
    """Give a branch or tag another name; atomic. HEAD follows its branch."""
    require_own(store, new)
    ref = store.ref(require_own(store, old))
    if ref is None:
        raise NotFound(f"there is no branch or tag {old!r} to rename")
    store.update_refs(
        RefUpdate(name=new, kind=ref.kind, target=ref.target, expect=None, reason=f"renamed from {old}"),
        RefUpdate(name=old, kind=ref.kind, target=None, expect=ref.target, reason=f"renamed to {new}"),
    )
    if store.head == old and ref.kind == "branch":
        store.set_head(new)
    return Ref(name=new, kind=ref.kind, target=ref.target)


def move(store: Store, branch: str, point: str | ResolvedPoint, reason: str) -> Ref:
    """Make `branch` point there, whatever it was; the old tip stays in the reflog. Raises `RefConflict` in a race."""
    require_own(store, branch)
    where = whole(resolve(store, point), "a branch")
    now = store.ref(branch)
    expect = now.target if now is not None else None
    store.update_refs(RefUpdate(name=branch, kind="branch", target=where, expect=expect, reason=reason))
    return Ref(name=branch, kind="branch", target=where)


def whole(point: ResolvedPoint, what: str) -> CommitId:
    """The commit, if `point` is its end. Raises `InvalidRequest` with the way out for an interior point."""
    if not point.at_end:
        raise InvalidRequest(
            f"{what} names a whole commit; {point} lies inside one. Open a session there and commit it: "
            f'repo.session("{point}").commit(branch=…), or `thaw fork {point} -n 1`.'
        )
    return point.commit


def _existing(store: Store, name: str, kind: RefKind) -> Ref:
    ref = store.ref(name)
    if ref is None or ref.kind != kind:
        known = [r.name for r in store.refs(kind)]
        listed = f"; there are: {', '.join(known[:8])}" if known else ""
        raise NotFound(f"there is no {kind} {name!r}{listed}")
    return ref
