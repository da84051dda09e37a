"""Capture: the engine's workers write a session's KV into packs, and the client says which tokens that was."""

from __future__ import annotations

import asyncio
import secrets

from thaw.core.cache import FullKV, the_full_one
from thaw.core.errors import Busy, InvalidRequest, LawBroken, StaleSession
from thaw.core.identity import ModelIdentity
from thaw.data.locations import BlobLocation
from thaw.engines.base import Captured, CapturedSegment, CapturePlan, WrittenPack
from thaw.engines.served import protocol
from thaw.engines.served.lane import Lane
from thaw.engines.served.model import Model
from thaw.engines.served.protocol import Answer, Blob
from thaw.engines.served.session import ServedSession
from thaw.engines.served.talk import Talk
from thaw.engines.text import cut_turns


async def capture(session: ServedSession, plan: CapturePlan, talk: Talk, model: Model) -> Captured:
    """Also while it runs: then as far as it has come. Written and synced when this returns."""
    identity = await model.identity()
    if session.policy != identity.policy:
        raise StaleSession("the policy changed while the session was being captured; nothing was kept")
    lane = session.busy
    decoding = session.turn is not None and bool(session.turn.logprobs)
    if session.node is None or (lane is None and not session.num_kv):
        return _captured(session, identity, plan, model, tuple(session.tokens), Answer())
    num_kv = None if lane is not None and not decoding else session.computed()
    tokens = tuple(session.tokens)
    talk.mail.register_store(plan.mount.uuid, plan.mount.packs.resolve())
    answer = await talk.command(
        protocol.Write(
            id=secrets.token_hex(16), record=session.node.name, store=plan.mount.uuid, packs=plan.packs,
            base=plan.base, num_kv=num_kv,
        )
    )  # fmt: skip
    if lane is not None and num_kv is None:
        tokens = await _seen(session, lane, answer)
    return _captured(session, identity, plan, model, tokens, answer)


async def _seen(session: ServedSession, lane: Lane, answer: Answer) -> tuple[int, ...]:
    """The tokens that were captured while a prompt was being read: those read so far, and all that the session had
    before. Where the prompt had been read, wait until the client has seen what came of it."""
    if answer.num_kv < answer.num_tokens - 1:
        whole = (*session.tokens[: lane.prompt_start], *lane.prompt)
        return whole[: max(answer.num_kv, lane.prompt_start)]
    while len(session.tokens) < answer.num_tokens and session.busy is not None:
        await asyncio.sleep(0.002)
    num_tokens = min(len(session.tokens), max(answer.num_tokens, answer.num_kv))
    if num_tokens < answer.num_kv:
        raise Busy("the session ended while it was captured; capture it again")
    return tuple(session.tokens[:num_tokens])


def _captured(
    session: ServedSession,
    identity: ModelIdentity,
    plan: CapturePlan,
    model: Model,
    tokens: tuple[int, ...],
    answer: Answer,
) -> Captured:
    if plan.base > answer.num_kv:
        raise InvalidRequest(f"capture from token {plan.base}: the session has KV for {answer.num_kv} tokens")
    segments, locations = _segments(answer, the_full_one(model.info.groups))
    return Captured(
        identity=identity,
        tokens=tokens,
        num_kv=answer.num_kv,
        segments=segments,
        blobs=locations,
        packs=tuple(WrittenPack(name=name, nbytes=nbytes) for name, nbytes in sorted(answer.packs.items())),
        turns=cut_turns(session.all_turns(), tokens, len(tokens), model.codec),
        seed=session.seed,
        salt=session.salt,
        share_prefix=session.share_prefix,
        boundary=None,
        stages_s={"cut": 0.0, "write": 0.0, "sync": 0.0, **answer.stages_s},
    )


def _segments(answer: Answer, group: FullKV) -> tuple[tuple[CapturedSegment, ...], tuple[BlobLocation, ...]]:
    """What all ranks wrote, in the order of tokens and heads. Raises `LawBroken` unless every head is there once."""
    at: dict[int, list[Blob]] = {}
    for blob in sorted(answer.blobs, key=lambda b: (b.start, b.head)):
        at.setdefault(blob.start, []).append(blob)
    for start, blobs in at.items():
        if [b.head for b in blobs] != list(range(group.num_kv_heads)):
            raise LawBroken(f"the workers wrote heads {[b.head for b in blobs]} of the segment at {start}")
    segments = tuple(
        CapturedSegment(start=start, length=blobs[0].length, blobs={group.name: tuple(b.blob for b in blobs)})
        for start, blobs in at.items()
    )
    locations = tuple(
        BlobLocation(blob=b.blob, pack=b.pack, offset=b.offset, nbytes=b.nbytes) for blobs in at.values() for b in blobs
    )
    return segments, locations
