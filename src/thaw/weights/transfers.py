"""Weights to a remote and back: the sets that some commits name, in the weights' own part of the remote.

They lie there as they lie here: refs of the namespace `thaw.weights`, packs and objects. So what a remote has is not
sent again, every byte is verified as it arrives, and a transfer that was interrupted goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from thaw.core.errors import CorruptBlob, NotFound, Unsupported
from thaw.core.identity import ModelIdentity
from thaw.core.objects import Commit, State, decode
from thaw.remote import refs
from thaw.remote.fetch import FetchWish, fetch
from thaw.remote.history import RemoteHistory
from thaw.remote.local import LocalHistory
from thaw.remote.meter import TransferMeter
from thaw.remote.opened import OpenedRemote, over
from thaw.remote.push import PushWish, Tuning, push
from thaw.remote.report import TransferReport
from thaw.store import Store
from thaw.weights import record
from thaw.weights.record import NAMESPACE


def named_by(store: Store, tips: Iterable[str]) -> set[str]:
    """The weights ids of the models that the commits back from `tips` were captured from."""
    history = LocalHistory(store)
    commits = history.missing([tip for tip in tips if history.has(tip)], [])
    models = {store.get_as(store.get_as(one, Commit).state, State).model for one in commits}
    return {found.weights for one in models if isinstance(found := store.get(one), ModelIdentity)}


def send(store: Store, remote: OpenedRemote, weights: set[str], meter: TransferMeter | None) -> TransferReport:
    """Sends the stored sets of these weights ids. Raises `NotFound` where an id has none."""
    chosen = {one.weights: one for one in reversed(record.entries(store)) if one.weights in weights}
    lost = sorted(weights - chosen.keys())
    if lost:
        raise NotFound(
            f"the weights {lost[0]} of what is pushed are not in this repository: add the model (thaw weights add), or "
            "push without --weights."
        )
    linked = [one.name for one in chosen.values() if one.link is not None]
    if linked:
        raise Unsupported(
            f"the tensors of {linked[0]!r} are linked from a folder and not in this repository: add the model without "
            "--link, then push"
        )
    wishes = [PushWish("tag", one.name, one.commit) for one in chosen.values()]
    return push(record.view(store), _part(remote), wishes, meter=meter, tuning=Tuning(share=True))


def bring(store: Store, remote: OpenedRemote, weights: set[str], meter: TransferMeter | None) -> TransferReport:
    """Fetches the remote's sets of these weights ids that are not here. An id that the remote has no set of is left
    out."""
    here = {one.weights for one in record.entries(store)}
    part = _part(remote)
    names = tuple(name for name, found in _there(part) if found in weights - here)
    return fetch(record.view(store), part, FetchWish(branches=(), tags=names), meter=meter)


def together(first: TransferReport, second: TransferReport) -> TransferReport:
    """One report: of branches and tags, then of weights."""
    named = [msgspec.structs.replace(one, name=f"{NAMESPACE}/{one.name}") for one in second.refs]
    counted = ("num_commits", "num_packs", "num_skipped_packs", "nbytes", "blob_nbytes", "seconds")
    sums = {name: getattr(first, name) + getattr(second, name) for name in counted}
    return msgspec.structs.replace(first, refs=(*first.refs, *named), **sums)


def _part(remote: OpenedRemote) -> OpenedRemote:
    """The weights' own part of a remote."""
    return over(remote.name, remote.url, remote.whole, NAMESPACE)


def _there(part: OpenedRemote) -> Sequence[tuple[str, str]]:
    """(name, weights id) of every set that the remote has, read from the commits alone."""
    wanted = [("tag", name) for name in refs.names(part.bucket, "tag")]
    standing = [one.ref for one in refs.read_all(part.bucket, wanted).values() if one.ref.commit is not None]  # type: ignore[arg-type]
    history = RemoteHistory(part.bucket, NAMESPACE, standing)
    found = []
    for ref in standing:
        assert ref.commit is not None
        (manifest,) = history.manifests([ref.commit])
        place = next((one for one in manifest.objects if one.id == ref.commit), None)
        if place is None:
            raise CorruptBlob(f"the manifest of the weights set {ref.name!r} in {part.url} does not list its commit")
        (data,) = part.bucket.read_ranges(manifest.packs[place.pack].key, [(place.offset, place.nbytes)])
        commit = decode(bytes(data), ref.commit)
        if isinstance(commit, Commit) and "weights" in commit.meta:
            found.append((ref.name, commit.meta["weights"]))
    return found
