"""Verify: hydrate a point and say which laws held. Nothing is claimed that was not seen.

    bytes       law 1   every blob of the point is read and hashed
    boundary    law 2   the logits at the fork point against the digest and the top log probabilities stored at capture
                        (in another engine than the one that stored them: measured, not promised)
    state       law 3   tokens, turns and seed of the live session equal the stored ones
    identity    law 5   weights, configuration, tokenizer, layout, policy
    cached      law 6   the engine counted every stored token as cached

A law that fails stops those that need what it found broken; they are reported as not tried. Writes nothing to the
repository: the capture that reads the digest goes to a temporary folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from thaw.core.cache import point_groups
from thaw.core.errors import Damaged, NotFound, Refused, ThawError
from thaw.core.identity import ModelIdentity, compare
from thaw.core.kv_ranges import KVRange
from thaw.core.objects import Boundary, Commit
from thaw.core.sampling import Sampling
from thaw.data.pack import read_blob
from thaw.data.tiers.folder import folder_mount
from thaw.engines.base import CapturePlan, Completion, Engine, GenerateRequest, Handle, SessionRef, adapter_there
from thaw.repo import cover
from thaw.repo.context import Context
from thaw.repo.hydrate import Hydration, hydrate, reading
from thaw.repo.report import Continuation, LawResult, VerifyReport
from thaw.repo.resolve import ResolvedPoint, at
from thaw.repo.timeline import Timeline, ranges_at, read, read_state
from thaw.repo.weight import blobs_of
from thaw.store import Store

TOP = 5


def verify_in(engine: Engine, context: Context, point: ResolvedPoint, *, num_tokens: int = 16) -> VerifyReport:
    """Check `point` in `engine`; `num_tokens` greedy tokens are compared with a re-prefill (0: none)."""
    store = context.store
    here = Context(store, engine)
    line, laws = _check_bytes(here, point)
    continuation = None
    if line is not None:
        laws.append(_check_identity(here, line))
    if all(law.held for law in laws) and line is not None:
        laws += _check_restore(here, point, line)
        laws.append(_check_boundary(here, point, line))
        restored = all(law.held is not False for law in laws if law.name == "cached")
        if restored and num_tokens and point.num_tokens:
            continuation = _continue(here, point, line, num_tokens)
    else:
        laws += [_not_tried(name) for name in ("cached", "state", "boundary")]
    return VerifyReport(
        point=str(point),
        num_tokens=point.num_tokens,
        num_kv=0 if line is None else cover.num_kv_at(line, point.num_tokens),
        engine=engine.info.name,
        engine_version=engine.info.version,
        device=engine.info.device,
        laws=tuple(laws),
        continuation=continuation,
        kv_ranges=() if line is None else _ranges(store, line, point),
    )


def _ranges(store: Store, line: Timeline, point: ResolvedPoint) -> tuple[KVRange, ...]:
    return ranges_at(line, cover.num_kv_at(line, point.num_tokens), store.get_as(line.state.model, ModelIdentity))


def _check_bytes(context: Context, point: ResolvedPoint) -> tuple[Timeline | None, list[LawResult]]:
    """Law 1: read and hash everything, one blob in memory at a time."""
    promised = "every object and blob hashes to its id"
    store, nbytes, count = context.store, 0, 0
    try:
        with reading(store, point):
            line = read(store, read_state(store, point.state))
            store.get_as(line.state.model, ModelIdentity)
            num_kv = cover.num_kv_at(line, point.num_tokens)
            found = store.locate(blobs_of(line, num_kv, with_boundary=point.at_end))
            for location in found.values():
                nbytes += len(read_blob(store.packs, location))
                count += 1
    except (Damaged, NotFound) as error:
        return None, [LawResult(name="bytes", held=False, promised=promised, seen=error.kind, detail=str(error))]
    return line, [LawResult(name="bytes", held=True, promised=promised, seen=f"{count} blobs, {nbytes} bytes hashed")]


def _check_identity(context: Context, line: Timeline) -> LawResult:
    promised = "the running model is the one that the state was taken with"
    stored = context.store.get_as(line.state.model, ModelIdentity)
    try:
        compare(stored, context.engine.identity(adapter_there(context.engine, stored.adapter)))
    except Refused as error:
        return LawResult(name="identity", held=False, promised=promised, seen=error.kind, detail=str(error))
    return LawResult(name="identity", held=True, promised=promised, seen=f"weights {stored.weights[:19]}…")


def _check_restore(context: Context, point: ResolvedPoint, line: Timeline) -> list[LawResult]:
    """Laws 6 and 3: what the engine says it has after hydrating."""
    promised = f"{cover.num_kv_at(line, point.num_tokens)} tokens counted as cached by the engine"
    try:
        live = _live(context, point, line)
    except ThawError as error:
        failed = LawResult(name="cached", held=False, promised=promised, seen=error.kind, detail=str(error))
        return [failed, _not_tried("state")]
    engine = context.engine
    try:
        view = engine.view(live.session)
        state_held = (view.tokens, view.turns, view.seed) == (live.plan.tokens, live.plan.turns, live.plan.seed)
        cached = _cached(engine, live)
    finally:
        engine.close_session(live.session)
    return [
        LawResult(
            name="cached",
            held=live.proof.hit and cached == live.plan.num_kv,
            promised=promised,
            seen=f"{cached} cached, {live.proof.num_recomputed_tokens} recomputed, {live.proof.nbytes} bytes read",
            detail=f"verification: {live.proof.verification}",
        ),
        LawResult(
            name="state",
            held=state_held,
            promised=f"{len(live.plan.tokens)} tokens, {len(live.plan.turns)} turns, seed {live.plan.seed}",
            seen=f"{len(view.tokens)} tokens, {len(view.turns)} turns, seed {view.seed}",
        ),
    ]


def _live(context: Context, point: ResolvedPoint, line: Timeline) -> Hydration:
    """Hydrated as it is, KV of other weights too: the report says of which it is."""
    return hydrate(context, point, stale_kv=bool(line.state.ranges))


def _cached(engine: Engine, live: Hydration) -> int:
    """What the engine counts as cached when the session first runs."""
    if not live.plan.tokens or len(live.plan.tokens) >= engine.info.max_model_len:
        return live.proof.num_cached_tokens
    return _greedy(engine, live.session, 1, prompt=_new_token(live)).num_cached_tokens


def _new_token(live: Hydration) -> tuple[int, ...]:
    """A token to continue with, where the point continues with new ones alone; any would do."""
    plan = live.plan
    is_bare = bool(point_groups(plan.identity.groups)) and plan.hidden is None and plan.num_kv == len(plan.tokens)
    return plan.tokens[-1:] if is_bare else ()


def _check_boundary(context: Context, point: ResolvedPoint, line: Timeline) -> LawResult:
    """Law 2: compute the logits of the stored boundary again and compare."""
    stored = line.state.boundary
    if stored is None or not point.at_end or not stored.position:
        return _not_tried("boundary", "no logits were stored for this point")
    if stored.position >= context.engine.info.max_model_len:
        return _not_tried("boundary", "the session is as long as the model allows; no more logits can be computed")
    if stored.hidden is None and cover.num_kv_at(line, stored.position) == stored.position:
        return _not_tried("boundary", f"no state was kept before token {stored.position}, which would run again")
    where = point if stored.position == point.num_tokens else at(context.store, point.commit, token=stored.position)
    try:
        live = _live(context, where, line)
    except ThawError as error:
        return LawResult(name="boundary", held=False, promised="hydrate", seen=error.kind, detail=str(error))
    engine = context.engine
    try:
        done = _greedy(engine, live.session, 1, top=min(TOP, len(stored.top)))
        seen = _boundary_of(engine, live.session, context.store.uuid, live.plan.num_kv)
    finally:
        engine.close_session(live.session)
    giver = context.store.get_as(point.commit, Commit).origin.get("engine", "")
    if giver != engine.info.name:
        return _judge(stored, seen, done, "", f"nothing: the stored ones are of {giver or 'another engine'}")
    return _judge(stored, seen, done, _promise(engine, line, stored), f"nothing at {_shape(stored)}")


def _shape(stored: Boundary) -> str:
    return f"this batch shape ({stored.batch} at capture, 1 here) or point"


def _promise(engine: Engine, line: Timeline, stored: Boundary) -> str:
    """Why bit equality is promised at this boundary, which an engine of the same name stored, or "" when it is not."""
    if engine.info.continuation != "decode-exact" or stored.batch != 1:
        return ""
    if stored.hidden is not None:
        return "the hidden state was kept"
    inside = any(t.kind == "completion" and t.start < stored.position <= t.end for t in line.turns)
    return "it was a decode step" if inside else ""


def _judge(stored: Boundary, seen: Boundary | None, done: Completion, why: str, else_promised: str) -> LawResult:
    equal = seen is not None and (seen.position, seen.digest) == (stored.position, stored.digest)
    difference = _top_difference(stored, seen, done)
    text = "logits equal bit for bit" if equal else f"largest difference in log probability {difference:.3g}"
    if not why:
        promised = f"{else_promised}; measured only"
        return LawResult(name="boundary", held=True if equal else None, promised=promised, seen=text)
    return LawResult(
        name="boundary",
        held=equal,
        promised=f"logits at position {stored.position} equal bit for bit ({why})",
        seen=text,
        detail=f"digest {stored.digest[:19]}… stored, {'none' if seen is None else seen.digest[:19] + '…'} seen",
    )


def _top_difference(stored: Boundary, seen: Boundary | None, done: Completion) -> float:
    """Largest difference between stored and seen log probabilities of the tokens that both list."""
    now = dict(seen.top) if seen is not None and seen.position == stored.position else {}
    if not now and done.top_logprobs:
        now = dict(done.top_logprobs[0])
    return max((abs(now[token] - value) for token, value in stored.top if token in now), default=float("inf"))


def _boundary_of(engine: Engine, session: SessionRef, uuid: str, base: int) -> Boundary | None:
    with tempfile.TemporaryDirectory(prefix="thaw-verify-") as folder:
        packs = tuple(f"{i:032}.safetensors" for i in range(engine.info.num_packs))
        plan = CapturePlan(mount=folder_mount(uuid, Path(folder)), packs=packs, base=base)
        return engine.capture(session, plan).result().boundary


def _continue(context: Context, point: ResolvedPoint, line: Timeline, num_tokens: int) -> Continuation | None:
    """Greedy tokens after the point: hydrated, and from a new prefill of the same tokens."""
    engine = context.engine
    n = min(num_tokens, engine.info.max_model_len - point.num_tokens)
    if n < 1:
        return None
    live = _live(context, point, line)
    new = _new_token(live)
    loaded_s = live.proof.stages_s.get("load", 0.0)
    fresh = engine.open(seed=live.plan.seed, adapter=live.plan.identity.adapter)
    try:
        ours = _greedy(engine, live.session, n, prompt=new)
        theirs = _greedy(engine, fresh, n, prompt=(*live.plan.tokens, *new))
    finally:
        engine.close_session(live.session)
        engine.close_session(fresh)
    pairs = list(zip(ours.token_ids, theirs.token_ids, strict=False))
    first = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
    differences = [abs(x - y) for x, y in zip(ours.logprobs[:first], theirs.logprobs[:first], strict=False)]
    return Continuation(
        num_tokens=len(pairs),
        first_difference=first,
        max_logprob_difference=max(differences, default=0.0),
        hydrate_s=loaded_s + ours.ttft_s,
        prefill_s=theirs.ttft_s,
        hydrated_text=ours.text,
        prefilled_text=theirs.text,
    )


def _greedy(
    engine: Engine, session: SessionRef, n: int, *, prompt: Sequence[int] = (), top: int | None = None
) -> Completion:
    sampling = Sampling(temperature=0.0, max_tokens=n, ignore_eos=True, logprobs=top)
    handle: Handle[list[Completion]] = engine.generate(
        [GenerateRequest(session=session, prompt=tuple(prompt), sampling=sampling)]
    )
    return handle.result()[0]


def _not_tried(name: str, why: str = "not tried: an earlier law failed") -> LawResult:
    return LawResult(name=name, held=None, promised="", seen="", detail=why)
