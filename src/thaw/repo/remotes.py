"""A repository's remotes: what `push`, `fetch`, `pull` and `clone` mean for the names that people use.

Everything that reaches a remote is `thaw.remote`; here names become wishes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from thaw.core.errors import InvalidRequest, NotFound
from thaw.remote import settings, tracking
from thaw.remote.settings import Option, RemoteSettings
from thaw.store import Ref, Store

if TYPE_CHECKING:
    from collections.abc import Callable

    from thaw.remote.arriving import Announced
    from thaw.remote.forget import ForgetReport
    from thaw.remote.layout import Kind
    from thaw.remote.meter import TransferMeter
    from thaw.remote.opened import OpenedRemote
    from thaw.remote.push import PushWish
    from thaw.remote.report import RemoteGcReport, TransferReport

MAX_DEPTH = 1 << 31


def add(store: Store, name: str, url: str, options: dict[str, Option]) -> RemoteSettings:
    """Remembers a remote. Nothing is asked of it yet. Raises `InvalidRequest`, `Conflict`."""
    from thaw.remote.address import parse

    address = parse(url, options)
    made = RemoteSettings(url=address.url, options=dict(address.options))
    settings.add(store, name, made)
    return made


def remove(store: Store, name: str) -> RemoteSettings:
    """Forgets a remote and its tracking points."""
    gone = settings.remove(store, name)
    branches = [ref.name.removeprefix(f"{name}/") for ref in tracking.tracked(store, name)]
    updates = [one for branch in branches for one in tracking.removal(store, name, branch, f"remote {name} removed")]
    if updates:
        store.update_refs(*updates)
    return gone


def opened(store: Store, name: str | None) -> OpenedRemote:
    """The remote of that name, or the one that is meant where none is named."""
    from thaw.remote.opened import opened as open_remote

    chosen = settings.default_remote(store, store.head) if name is None else name
    return open_remote(chosen, settings.get(settings.read(store), chosen), store.namespace)


def push(
    store: Store,
    names: tuple[str, ...],
    remote: str | None,
    *,
    delete: bool,
    tags: bool,
    everything: bool,
    force_with_lease: bool,
    set_upstream: bool,
    weights: bool,
    meter: TransferMeter | None,
) -> TransferReport:
    """See `Repository.push`."""
    from thaw.remote.push import push as send

    target = opened(store, remote)
    if delete:
        wishes = [_deletion(store, target, name, force_with_lease) for name in _named(names)]
    else:
        wishes = _wishes(store, target.name, names, tags=tags, everything=everything, force=force_with_lease)
    _probe(store, target)
    report = send(store, target, wishes, meter=meter)
    if set_upstream:
        for wish in wishes:
            if wish.kind == "branch" and wish.target is not None:
                settings.set_upstream(store, wish.name, target.name, wish.name)
    return _with_weights(store, target, report, meter) if weights else report


def _with_weights(
    store: Store, target: OpenedRemote, report: TransferReport, meter: TransferMeter | None
) -> TransferReport:
    """Sends the weights that the pushed commits name, too."""
    from thaw.weights import transfers

    named = transfers.named_by(store, [ref.new for ref in report.refs if ref.new is not None])
    return transfers.together(report, transfers.send(store, target, named, meter))


def bring_weights(
    store: Store, target: OpenedRemote, report: TransferReport, meter: TransferMeter | None
) -> TransferReport:
    """Fetches the weights that the fetched commits name, too."""
    from thaw.weights import transfers

    named = transfers.named_by(store, [ref.new for ref in report.refs if ref.new is not None])
    return transfers.together(report, transfers.bring(store, target, named, meter))


def _named(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise InvalidRequest("name the branches or tags of the remote that are to be deleted.")
    return names


def _deletion(store: Store, target: OpenedRemote, name: str, force: bool) -> PushWish:
    """What has that name there is deleted; where a branch and a tag have it, the kind that has it here."""
    from thaw.remote import layout, refs
    from thaw.remote.push import PushWish

    here = store.ref(name)
    found = refs.read_all(target.bucket, [(kind, name) for kind in layout.KINDS])
    there: list[Kind] = [kind for (kind, _), standing in found.items() if standing.ref.commit is not None]
    kind: Kind = here.kind if here is not None else "branch"
    kind = there[0] if len(there) == 1 else kind
    return PushWish(kind, name, None, _lease(store, target.name, name, force and kind == "branch"))


def _wishes(
    store: Store, remote: str, names: tuple[str, ...], *, tags: bool, everything: bool, force: bool
) -> list[PushWish]:
    from thaw.remote.push import PushWish

    chosen = [_own(store, name) for name in names]
    if everything:
        chosen += store.refs("branch")
    if tags:
        chosen += tracking.without(store.refs("tag"), settings.read(store))
    if not (names or everything or tags):
        chosen = [_own(store, store.head)]
    return [
        PushWish(ref.kind, ref.name, ref.target, _lease(store, remote, ref.name, force and ref.kind == "branch"))
        for ref in {ref.name: ref for ref in chosen}.values()
    ]


def _own(store: Store, name: str) -> Ref:
    ref = store.ref(name)
    if ref is None or tracking.is_tracking(name, settings.read(store)):
        known = ", ".join(one.name for one in store.refs("branch")[:8])
        raise NotFound(f"there is no branch or tag {name!r} here to push{f'; there are: {known}' if known else ''}")
    return ref


def _lease(store: Store, remote: str, name: str, force: bool) -> str | None:
    return tracking.where(store, remote, name) if force else ""


def _probe(store: Store, target: OpenedRemote) -> None:
    """That the remote's conditional writes hold, once for each remote of a repository. Raises `RemoteUnsafe`."""
    if not settings.get(settings.read(store), target.name).probed:
        from thaw.remote.probe import probe

        probe(target.whole)
        settings.set_probed(store, target.name)


def fetch(
    store: Store,
    branches: tuple[str, ...],
    remote: str | None,
    *,
    prune: bool,
    tags: bool,
    weights: bool,
    meter: TransferMeter | None,
    depth: int | None = None,
    unshallow: bool = False,
    announce: Callable[[Announced], None] | None = None,
) -> TransferReport:
    """See `Repository.fetch`; `announce`: see `thaw.remote.fetch`."""
    from thaw.remote.fetch import FetchWish
    from thaw.remote.fetch import fetch as bring

    if depth is not None and unshallow:
        raise InvalidRequest(
            f"depth={depth} leaves older commits in the remote, and unshallow=True fetches all: not both."
        )
    wish = FetchWish(branches or None, tags, prune, _checked_depth(depth), unshallow)
    target = opened(store, remote)
    report = bring(store, target, wish, meter=meter, announce=announce)
    return bring_weights(store, target, report, meter) if weights else report


def _checked_depth(depth: int | None) -> int | None:
    if depth is not None and not 1 <= depth <= MAX_DEPTH:
        raise InvalidRequest(f"depth={depth}: how many commits of each branch to fetch, 1 to {MAX_DEPTH:,}.")
    return depth


def is_promised(store: Store, point: object) -> bool:
    """Whether a point names a remote's branch that was seen there and never fetched."""
    from thaw.core import points
    from thaw.core.points import Point

    if not isinstance(point, (str, Point)):
        return False
    name = (points.parse(point) if isinstance(point, str) else point).name
    return "/" in name and name in settings.promised(store)


def keep_promise(store: Store, point: str) -> None:
    """Fetches the promised branch that a point names."""
    from thaw.core import points

    remote, _, branch = points.parse(point).name.partition("/")
    fetch(store, (branch,), remote, prune=False, tags=False, weights=False, meter=None)


def pull(store: Store, branch: str | None, remote: str | None, *, meter: TransferMeter | None) -> TransferReport:
    """See `Repository.pull`."""
    from thaw.remote.pull import pull as bring
    from thaw.remote.pull import upstream_of

    name = store.head if branch is None else branch
    chosen = settings.default_remote(store, name) if remote is None else remote
    return bring(store, opened(store, chosen), name, upstream_of(store, name, chosen), meter=meter)


def collect(
    store: Store, name: str | None, *, dry_run: bool, grace_s: float | None, keep_reflog_s: float | None
) -> RemoteGcReport:
    """See `Repository.remote_gc`."""
    from thaw.remote.gc import GRACE_S, KEEP_REFLOG_S, GcWish
    from thaw.remote.gc import collect as collect_remote

    wish = GcWish(
        grace_s=GRACE_S if grace_s is None else grace_s,
        keep_reflog_s=KEEP_REFLOG_S if keep_reflog_s is None else keep_reflog_s,
        dry_run=dry_run,
    )
    return collect_remote(opened(store, name), wish)


def forget(store: Store, names: tuple[str, ...], remote: str | None) -> ForgetReport:
    """See `Repository.forget_remote`."""
    from thaw.core.points import check_name
    from thaw.remote import refs
    from thaw.remote.forget import forget as forget_there

    if not names:
        raise InvalidRequest("name the branches or tags of the remote that are to be forgotten.")
    target = opened(store, remote)
    tags = refs.names(target.bucket, "tag")
    branches = refs.names(target.bucket, "branch")
    kinds: dict[str, Kind] = {name: "tag" if name in tags and name not in branches else "branch" for name in names}
    report = forget_there(target, [(kind, check_name(name)) for name, kind in kinds.items()])
    updates = [one for name in names for one in tracking.removal(store, target.name, name, f"forgot in {target.name}")]
    if updates:
        store.update_refs(*updates)
    return report


def clone(
    url: str,
    path: Path,
    options: dict[str, Option],
    *,
    remote: str,
    branch: str | None,
    single_branch: bool,
    namespace: str | None,
    weights: bool,
    meter: TransferMeter | None,
    refs_only: bool = False,
    depth: int | None = None,
) -> TransferReport:
    """See `thaw.clone`."""
    from thaw.core import namespaces
    from thaw.remote.address import parse
    from thaw.remote.clone import CloneWish
    from thaw.remote.clone import clone as make
    from thaw.remote.opened import opened as open_remote

    if weights and refs_only:
        raise InvalidRequest("weights=True fetches what commits need, and refs_only=True fetches none: leave one out.")
    if refs_only and depth is not None:
        raise InvalidRequest(
            f"refs_only=True fetches no commits, and depth={depth} some of each branch: leave one out."
        )
    whose = namespaces.DEFAULT if namespace is None else namespaces.check(namespace)
    address = parse(url, options)
    made = RemoteSettings(url=address.url, options=dict(address.options))
    target = open_remote(settings.check_remote_name(remote), made, whose)
    report = make(path, target, made, CloneWish(branch, single_branch, refs_only, _checked_depth(depth)), meter=meter)
    if weights:
        with Store.open(path) as whole:
            report = bring_weights(whole.within(whose) if whose else whole, target, report, meter)
    return report
