"""Hydrate: a session's KV from packs into the engine's arena, then into its blocks, as the engine itself counts."""

from __future__ import annotations

import contextlib
import secrets
import time
from dataclasses import dataclass
from typing import Any

from thaw.core.cache import keeps_all
from thaw.core.errors import (
    Busy,
    NotFound,
    NotHit,
    PolicyMismatch,
    Refused,
    StaleSession,
    StorageFailed,
    TooLong,
    Unsupported,
)
from thaw.core.proof import Continuation, Proof
from thaw.engines import restoring
from thaw.engines.base import HydratePlan
from thaw.engines.promise import Promise
from thaw.engines.served import protocol
from thaw.engines.served.client.channel import EngineChannel, refusal
from thaw.engines.served.client.generation import Generation
from thaw.engines.served.client.model import ServedModel
from thaw.engines.served.client.session import Node, ServedSession, lineage_salt, new_session, with_gap
from thaw.engines.served.client.transport import Chunk, Submission
from thaw.engines.served.late_groups import late_groups
from thaw.engines.served.protocol import Answer


async def hydrate(
    plan: HydratePlan,
    talk: EngineChannel,
    model: ServedModel,
    generation: Generation,
    beside: ServedSession | None = None,
) -> ServedSession:
    """A session of the plan, with its proof. Raises `Refused` where it is another model's, or its KV was not kept, and
    it may not be recomputed. `beside`: the live session that the plan calls so. Of a model that keeps states, that is
    what comes after the plan's point alone."""
    adapter = await _adapter_of(plan, model)
    identity = await model.identity(adapter)
    restoring.refuse_stale(plan, model.info.name)
    again = model.keeps_states and plan.num_kv > 0 and plan.policy == "recompute"
    try:
        restoring.check_weights(plan, identity)
        if not again:
            restoring.check_kept(plan)
    except Refused as refused:
        if plan.policy != "recompute" or getattr(refused, "field", "") == "tokenizer":
            raise
        return await _recompute(plan, str(refused), model, generation, adapter)
    model.check_tokens(0, plan.tokens, 0)
    session = _restored(plan, model.policy, adapter)
    session.late = late_groups(plan, model.info.groups)
    if session.late:  # its first blocks are no use to others, also where it shares its prefix with all
        session.cache_salt = lineage_salt()
    shared = _shared(session, plan, beside, model)
    proof = await _fill(session, plan, talk, model, shared) if plan.num_kv else None
    session.loaded = plan.slices
    session.proof = proof or _nothing_to_restore(plan, model.info.continuation)
    if plan.not_kept:
        await generation.read_again(Promise(), session)
        session.proof = with_gap(session.proof, plan.num_kv, plan.not_kept)
    if session.policy != model.policy:
        raise PolicyMismatch(f"the engine's policy changed to {model.policy!r} while the session was hydrated")
    return session


async def _adapter_of(plan: HydratePlan, model: ServedModel) -> str | None:
    """The id of the adapter under which the session is to go on: the one that the plan asks for, else the one of the
    state where this engine has it, under whatever name; else none, and the identities then differ."""
    wanted = plan.identity.adapter if plan.adapter is None else plan.adapter
    if not wanted:
        return None
    try:
        return (await model.adapters.find(wanted)).id
    except (NotFound, Unsupported):
        if plan.adapter is not None:
            raise
        return None


def _restored(plan: HydratePlan, policy: str, adapter: str | None) -> ServedSession:
    session = new_session(policy, plan.seed, plan.salt, plan.share_prefix, adapter)
    session.tokens, session.turns = list(plan.tokens), list(plan.turns)
    return session


@dataclass(frozen=True)
class _Shared:
    """The record that has the plan's first `num_kv` tokens already; it is there as long as this is."""

    node: Node
    num_kv: int


def _shared(
    session: ServedSession, plan: HydratePlan, beside: ServedSession | None, model: ServedModel
) -> _Shared | None:
    """What `beside` has of the plan's KV, as a fork of it has that; the session then finds its blocks."""
    if beside is None or beside.node is None or not keeps_all(model.info.groups):
        return None
    if (beside.policy, beside.adapter) != (session.policy, session.adapter):
        return None
    num_kv = restoring.num_shared(plan, beside.loaded)
    if not 0 < num_kv <= beside.num_kv:
        return None
    if not (session.share_prefix or beside.share_prefix):
        session.cache_salt = beside.cache_salt
    return _Shared(beside.node, num_kv)


async def _fill(
    session: ServedSession, plan: HydratePlan, talk: EngineChannel, model: ServedModel, shared: _Shared | None
) -> Proof:
    """The plan into the engine's arena, then into its blocks, by a request that the engine itself counts."""
    node, answer = await _filled(plan, talk, shared)
    session.node, session.own, session.num_kv = node, True, plan.num_kv
    session.points = tuple(sorted(point.token for point in plan.points))
    started = time.monotonic()
    cached = await _probe(session, plan, talk, model)
    return Proof(
        num_prompt_tokens=len(plan.tokens),
        num_cached_tokens=cached,
        matched=plan.num_kv,
        first_mismatch=None,
        nbytes=answer.nbytes,
        verification="disk-verified",
        continuation=model.info.continuation,
        share_prefix=plan.share_prefix,
        stages_s={**answer.stages_s, "load": time.monotonic() - started},
    )


async def _filled(plan: HydratePlan, talk: EngineChannel, shared: _Shared | None) -> tuple[Node, Answer]:
    if shared is not None:
        # What the other had is gone, or was never whole: all of it is read.
        with contextlib.suppress(NotFound, StaleSession, StorageFailed):
            return await _read(plan, talk, {"source": shared.node.name, "num_kv": shared.num_kv})
    return await _read(plan, talk, {})


async def _read(plan: HydratePlan, talk: EngineChannel, there: dict[str, Any]) -> tuple[Node, Answer]:
    """The plan, but for what is `there`, in a record. Each attempt has a message and a record of its own: an engine
    begins a message once, and where one rank has refused, another may be reading yet."""
    node, name = Node(talk.dropped.append), secrets.token_hex(16)
    talk.mail.put_plan(name, plan)
    try:
        return node, await talk.command(protocol.Fill(id=name, record=node.name, **there))
    finally:
        talk.mail.drop_plan(name)


async def _probe(session: ServedSession, plan: HydratePlan, talk: EngineChannel, model: ServedModel) -> int:
    """One request of the restored tokens and one more: the engine's count of what it found is the proof."""
    limit = model.info.max_model_len
    tokens = [*plan.tokens[: plan.num_kv], 0]
    if len(tokens) >= limit:
        tokens = tokens[: limit - 1]
    want = min(plan.num_kv, len(tokens) - 1)
    if model.keeps_states and want < plan.num_kv:
        raise TooLong(f"{plan.num_kv} tokens fill the engine's {limit}: nothing could follow them")
    assert session.node is not None
    name, record = secrets.token_hex(16), secrets.token_hex(16)
    message = protocol.Run(
        id=name, record=record, source=session.node.name, num_kv=want, keep=False, adapter=session.adapter
    )
    ends: list[str | None] = []

    def take(chunk: Chunk) -> bool:
        ends.append(chunk.finish_reason)
        return True

    submission = Submission(name, tokens, talk.dialect.one_token, session.cache_salt or None, message)
    answer = await model.run(submission, session.adapter, take)
    talk.dropped.append(record)
    if answer.kind:
        raise refusal(answer)
    cached = answer.local + answer.external
    if "abort" in ends:
        raise Busy("the engine's owner stopped all requests while the session was hydrated; try it again later")
    if cached < want:
        raise NotHit(f"the engine counted {cached} of {want} restored tokens as cached; nothing was recomputed")
    return plan.num_kv if want == cached else cached


async def _recompute(
    plan: HydratePlan, reason: str, model: ServedModel, generation: Generation, adapter: str | None
) -> ServedSession:
    """Prefill the plan's tokens again, because the caller allowed it."""
    session = _restored(plan, model.policy, adapter)
    turns, session.tokens, session.turns = session.turns, [], []
    if plan.tokens:
        await generation.append(Promise(), session, list(plan.tokens), "", None)
    session.turns = turns
    session.proof = Proof(
        num_prompt_tokens=len(plan.tokens),
        num_cached_tokens=0,
        matched=0,
        first_mismatch=0,
        num_recomputed_tokens=len(plan.tokens),
        verification="none",
        continuation="close",
        share_prefix=plan.share_prefix,
        reason=reason,
    )
    return session


def _nothing_to_restore(plan: HydratePlan, continuation: Continuation) -> Proof:
    return Proof(
        num_prompt_tokens=len(plan.tokens),
        num_cached_tokens=0,
        matched=0,
        first_mismatch=None,
        verification="disk-verified",
        continuation=continuation,
        share_prefix=plan.share_prefix,
    )
