"""Commit: capture a session, write what is new, put it into history, move a ref. All or nothing (law 7).

The engine writes KV into a pack that the store has leased; objects and the ref follow in one transaction. When this
returns the commit survives a power cut; when it raises nothing is visible, with one exception on purpose: if only the
ref had moved, the commit is kept, its id is in the message, and the reflog holds it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Literal

import msgspec

from thaw._version import __version__
from thaw.core import objects
from thaw.core.cache import keeps_all
from thaw.core.canonical import U64
from thaw.core.errors import Busy, Conflict, InvalidRequest, RefConflict
from thaw.core.ids import CommitId, StateId, short
from thaw.core.objects import Commit, in_namespace
from thaw.engines.base import Captured, CapturePlan, SessionRef
from thaw.repo import cover, refs
from thaw.repo.build import Built, build
from thaw.repo.context import Context
from thaw.repo.kept import Kept
from thaw.store import RefUpdate, Transaction

Expect = CommitId | None | Literal["any", "parent"]
"""What a branch must point at: a commit, None (it must not exist), "any", or "parent": where the session came from,
or nothing yet."""


class CommitConflict(RefConflict):
    """The branch moved meanwhile. `commit` is kept (the reflog holds it) and can be given a branch of its own."""

    def __init__(self, message: str, commit: CommitId) -> None:
        super().__init__(message)
        self.commit = commit


class CommitResult(msgspec.Struct, frozen=True, kw_only=True):
    """`nbytes_written`: bytes of KV that had to be written. `stages`: seconds of cut, write, sync, store and total."""

    commit: CommitId
    state: StateId
    branch: str | None
    num_tokens: int
    nbytes_written: int
    stages: dict[str, float]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What to commit and where to."""

    session: SessionRef
    parent: CommitId | None
    message: str
    branch: str | None
    meta: dict[str, str]
    expect: Expect
    reason: str = "commit"


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """The commit is stored. With `conflict` set, the branch does not point at it."""

    result: CommitResult
    kept: Kept
    captured: Captured
    conflict: CommitConflict | None


def write(context: Context, request: Request, kept: Kept) -> Written:
    """Commit the session. When the store has lost what was kept (gc), once more with everything rewritten."""
    if request.branch is not None:
        refs.require_own(context.store, request.branch)
    try:
        return _write(context, request, kept)
    except Busy:
        raise
    except Conflict:
        context.forget_node_ids()
        parent = request.parent if request.parent and context.store.has(request.parent) else None
        return _write(context, msgspec.structs.replace(request, parent=parent), Kept())


def check_meta(meta: Mapping[str, str] | None) -> dict[str, str]:
    for key, value in (meta or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InvalidRequest(f"meta[{key!r}]={value!r}: names and values of meta are strings")
    return dict(meta or {})


def _write(context: Context, request: Request, kept: Kept) -> Written:
    started = time.perf_counter()
    with context.store.begin(*([request.parent] if request.parent else [])) as tx:
        kept, captured = _capture(context, request.session, kept, tx)
        begun = time.perf_counter()
        built = build(context, tx, kept, captured)
        identifier = CommitId(tx.put(_commit_object(context, request, built)))
        conflict = _publish(context, tx, request, identifier)
    for node, node_id in built.full_nodes:
        context.keep_node_id(node, node_id)
    context.remember_engine()
    ended = time.perf_counter()
    result = CommitResult(
        commit=identifier,
        state=built.state_id,
        branch=request.branch,
        num_tokens=len(captured.tokens),
        nbytes_written=captured.nbytes,
        stages={**captured.stages_s, "store": ended - begun, "total": ended - started},
    )
    return Written(result=result, kept=built.kept, captured=captured, conflict=conflict)


def _capture(context: Context, session: SessionRef, kept: Kept, tx: Transaction) -> tuple[Kept, Captured]:
    """Capture what `kept` lacks into the transaction's packs; all of it when other weights compute by now. Raises
    `Conflict` where they began to while this ran."""
    engine, view = context.engine, context.engine.view(session)
    model = None if kept.model is None or view.kv_ranges else objects.encode(engine.identity(view.adapter))[0]
    kept, num_kv = kept.usable(model, view.kv_ranges), view.num_kv
    kept = kept.cut(kept.base(num_kv, rewrite=keeps_all(engine.info.groups)))
    kept = kept.cut(cover.whole_until(context.store, engine.info.groups, kept.entries, num_kv))
    plan = CapturePlan(mount=context.mount, packs=tx.packs(engine.info.num_packs), base=kept.end)
    captured = engine.capture(session, plan).result()
    if kept.usable(objects.encode(captured.identity)[0], captured.kv_ranges).end != kept.end:
        raise Conflict("the weights or the policy changed while the session was being captured; all of it is written")
    for pack in captured.packs:
        tx.add_pack(pack.name, pack.nbytes, [blob for blob in captured.blobs if blob.pack == pack.name])
    return kept, captured


def _commit_object(context: Context, request: Request, built: Built) -> Commit:
    """The commit; always later than its parent, so that history sorts by time whatever the clocks say."""
    info, now = context.engine.info, time.time_ns()
    if request.parent is not None:
        if not context.store.has(request.parent):
            raise Conflict(f"the commit that the session came from, {short(request.parent)}, was removed by gc")
        now = max(now, context.store.get_as(request.parent, Commit).time_ns + 1)
    origin = {"engine": info.name, "version": info.version, "device": info.device, "thaw": __version__}
    commit = Commit(
        state=built.state_id,
        parents=() if request.parent is None else (request.parent,),
        message=request.message,
        time_ns=U64(now),
        branch=request.branch,
        meta=request.meta,
        origin={**origin, **{f"numerics.{k}": v for k, v in info.numerics.items()}},
    )
    return in_namespace(commit, context.store.namespace)


def _publish(context: Context, tx: Transaction, request: Request, commit: CommitId) -> CommitConflict | None:
    """Commit the transaction and move the ref."""
    reason = f"{request.reason}: {request.message.partition(chr(10))[0][:120]}"
    if request.branch is None:  # noted in a reflog, which keeps it as long as reflogs are kept
        tx.commit(
            RefUpdate(name=refs.DETACHED, kind="branch", target=commit, expect="any", reason=reason),
            RefUpdate(name=refs.DETACHED, kind="branch", target=None, expect="any", reason="on no branch"),
        )
        return None
    expect = _expected(context, request)
    try:
        tx.commit(RefUpdate(name=request.branch, kind="branch", target=commit, expect=expect, reason=reason))
    except RefConflict:
        return _explain(context, request.branch, commit, expect)
    return None


def _expected(context: Context, request: Request) -> CommitId | Literal["any"] | None:
    if request.expect == "any":
        return "any"
    if request.expect != "parent":
        return request.expect
    assert request.branch is not None
    return None if context.store.ref(request.branch) is None else request.parent


def _explain(context: Context, branch: str, commit: CommitId, expect: str | None) -> CommitConflict:
    ref = context.store.ref(branch)
    now = short(ref.target) if ref is not None and ref.target is not None else "nothing"
    before = short(expect) if expect else "nothing"
    mine = short(commit, 16)
    return CommitConflict(
        f"branch {branch!r} points at {now}; this commit expected {before}: somebody else moved it. Your commit is "
        f"kept as {mine}. Look with `thaw diff {branch} {mine}`, then give it a branch of its own "
        f"(thaw branch NAME {mine}) or let it win (thaw adopt {mine} {branch}).",
        commit,
    )
