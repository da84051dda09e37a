"""How a weights set is kept in a store: objects that every store knows, in a namespace of its own.

    tag @thaw.weights/NAME ──> commit ──> state ──> model: the weights id, of an architecture that no engine has
                                            └─────> node ──> segments ──> blobs: the manifest, files, tensors

So gc keeps it as it keeps sessions, fsck checks it, and push and fetch carry it. The manifest
(`thaw.engines.hf.stored`) is a blob; what it names is named by the segments too, which say nothing else.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence

import msgspec

from thaw._version import __version__
from thaw.core import prefix
from thaw.core.cache import FullKV
from thaw.core.canonical import U64
from thaw.core.errors import CorruptBlob, NotFound
from thaw.core.identity import ModelIdentity
from thaw.core.ids import CommitId, ObjectId, digest
from thaw.core.objects import (
    NODE_ENTRIES,
    Commit,
    Segment,
    SegmentEntry,
    SegmentNode,
    State,
    in_namespace,
)
from thaw.data.pack import read_blob
from thaw.engines.hf import stored
from thaw.engines.hf.stored import WeightsManifest
from thaw.store import Store, Transaction

NAMESPACE = "thaw.weights"
"""Kept for weights: no tenant may be called so."""
ARCHITECTURE = "thaw.weights/1"
"""What the model object says that a set's state names. No engine runs it, so no session continues from it."""
MANIFEST, BLOBS = "manifest", "weights"
SEGMENT_BLOBS = 50_000
"""Blobs that one segment names, at most: some 3.5 MB of its 16."""
_GROUP = FullKV(name=BLOBS, first_layer=0, num_layers=1, num_kv_heads=1, head_dim=1, dtype="uint8")


class WeightsEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A set as lists show it. `weights`: the id; `nbytes`: of its tensors, equal ones once. `link`: the folder that has
    the tensors, where no pack has."""

    name: str
    weights: str
    kind: str
    dtype: str
    architecture: str
    num_tensors: int
    nbytes: int
    time_ns: int
    commit: str
    manifest: str
    link: str | None = None


def view(store: Store) -> Store:
    """The store as weights see it."""
    return store.within(NAMESPACE)


def put(
    tx: Transaction,
    manifest: WeightsManifest,
    manifest_blob: str,
    in_packs: Sequence[str],
    name: str,
    link: str | None = None,
) -> CommitId:
    """Queues the objects of a set; the transaction (of the weights' namespace) has its packs already."""
    model = ModelIdentity(
        architecture=ARCHITECTURE, weights=manifest.weights, config={}, dtype=manifest.dtype, tokenizer=digest(b""),
        groups=(_GROUP,),
    )  # fmt: skip
    model_id = tx.put(model)
    segments = [tx.put(one) for one in _segments(model_id, manifest_blob, sorted(in_packs))]
    entries = [SegmentEntry(segment=one, start=at, length=1) for at, one in enumerate(segments)]
    nodes = [tx.put(SegmentNode(entries=tuple(some))) for some in _cut(entries, NODE_ENTRIES)]
    state = State(
        model=model_id, num_tokens=len(entries), num_kv=len(entries), nodes=tuple(nodes), tail_tokens=(),
        turn_nodes=(), num_turns=0, seed=U64(0), salt="",
    )  # fmt: skip
    meta = {
        "weights": manifest.weights, "kind": manifest.kind, "dtype": manifest.dtype,
        "architecture": manifest.architecture, "manifest": manifest_blob, "num_tensors": str(len(manifest.tensors)),
        "nbytes": str(manifest.tensor_nbytes),
    }  # fmt: skip
    meta |= {} if link is None else {"link": link}
    commit = Commit(
        state=tx.put(state), parents=(), message=f"weights {name}", time_ns=U64(time.time_ns()), meta=meta,
        origin={"thaw": __version__},
    )  # fmt: skip
    return CommitId(tx.put(in_namespace(commit, NAMESPACE)))


def _segments(model_id: str, manifest_blob: str, blobs: list[str]) -> Iterator[Segment]:
    """One token each, at most 256 of them: so they lie in one window."""
    root = prefix.root(model_id, NAMESPACE)
    for at, some in enumerate(_cut(blobs, SEGMENT_BLOBS) or [[]]):
        named = {BLOBS: tuple(some)} | ({MANIFEST: (manifest_blob,)} if at == 0 else {})
        yield Segment(start=at, tokens=(0,), window=root, prefix=prefix.extend(root, [0] * (at + 1)), blobs=named)


def _cut(values: list, size: int) -> list[list]:  # type: ignore[type-arg]
    return [values[at : at + size] for at in range(0, len(values), size)]


def entry(store: Store, name: str, commit: CommitId) -> WeightsEntry:
    """What a set's commit says of it. Raises `CorruptBlob`."""
    found = store.get_as(commit, Commit)
    try:
        meta = found.meta
        return WeightsEntry(
            name=name, weights=meta["weights"], kind=meta["kind"], dtype=meta["dtype"],
            architecture=meta["architecture"], num_tensors=int(meta["num_tensors"]), nbytes=int(meta["nbytes"]),
            time_ns=int(found.time_ns), commit=commit, manifest=meta["manifest"],
            link=meta.get("link"),
        )  # fmt: skip
    except (KeyError, ValueError) as error:
        raise CorruptBlob(f"tag {name!r} of the namespace {NAMESPACE} is no weights set: {error!r}") from None


def manifest(store: Store, commit: CommitId) -> WeightsManifest:
    """The manifest that a set's state names, checked. Raises `CorruptBlob`, `NewerFormat`."""
    named = manifest_blob(store, commit)
    data = read_blob(store.packs, store.locate([named])[named])
    return stored.decode(data, f"the manifest {named}")


def manifest_blob(store: Store, commit: CommitId) -> str:
    state = store.get_as(store.get_as(commit, Commit).state, State)
    node = store.get_as(state.nodes[0], SegmentNode)
    found = store.get_as(node.entries[0].segment, Segment).blobs.get(MANIFEST, ())
    if len(found) != 1:
        raise CorruptBlob(f"commit {commit} is not a weights set: its first segment names no manifest")
    return found[0]


def users(store: Store, weights: str) -> Iterator[tuple[str, CommitId]]:
    """(namespace, commit) of every stored commit whose model runs these weights; sets of weights left out."""
    whole = copy.copy(store)  # `within` leads into namespaces, not back to the default one
    whole.namespace = ""
    models = {one for one in whole.models() if _runs(whole, one, weights)}
    if not models:
        return
    for namespace in ("", *(one for one in whole.namespaces() if one != NAMESPACE)):
        seen = whole.within(namespace) if namespace else whole
        for commit in seen.commits():
            if seen.get_as(seen.get_as(commit, Commit).state, State).model in models:
                yield namespace, commit


def _runs(store: Store, model: ObjectId, weights: str) -> bool:
    found = store.get(model)
    return isinstance(found, ModelIdentity) and found.weights == weights and found.architecture != ARCHITECTURE


def find(store: Store, named: str) -> WeightsEntry:
    """The set of this name, or the one whose weights id begins with these digits. Raises `NotFound`."""
    sets = entries(store)
    found = [one for one in sets if one.name == named]
    if not found and len(named.removeprefix("b3:")) >= 4:
        found = [one for one in sets if one.weights.removeprefix("b3:").startswith(named.removeprefix("b3:"))]
    if found:
        return found[0]
    known = ", ".join(one.name for one in sets[:8])
    raise NotFound(
        f"there is no weights set {named[:80]!r} in {store.path}"
        + (f"; there are: {known}." if known else ". Add one: thaw weights add MODEL.")
    )


def entries(store: Store) -> list[WeightsEntry]:
    """All sets by name."""
    seen = view(store)
    return [entry(seen, ref.name, ref.target) for ref in seen.refs("tag")]
