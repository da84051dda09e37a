"""Capture: the engine's workers write a session's KV into packs, and the client says which tokens that was."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import TypeAlias

from thaw.core.cache import CacheGroup, point_groups, token_groups
from thaw.core.errors import Busy, InvalidRequest, LawBroken, StaleSession
from thaw.core.identity import ModelIdentity
from thaw.core.objects import StatesAtToken
from thaw.core.prefix import windows
from thaw.data.locations import BlobLocation
from thaw.engines.base import Captured, CapturedSegment, CapturePlan, WrittenPack
from thaw.engines.served import protocol
from thaw.engines.served.client.channel import EngineChannel
from thaw.engines.served.client.model import ServedModel
from thaw.engines.served.client.request import ActiveRequest
from thaw.engines.served.client.session import ServedSession
from thaw.engines.served.protocol import Answer, Blob
from thaw.engines.text import cut_turns

Named: TypeAlias = dict[str, list[Blob]]
"""By cache group."""
Found: TypeAlias = dict[tuple[int, str, int], list[Blob]]
"""By the segment's start, the cache group, and the number of tokens that a state is of (else 0)."""


async def capture(session: ServedSession, plan: CapturePlan, talk: EngineChannel, model: ServedModel) -> Captured:
    """Also while it runs: then as far as it has come. Written and synced when this returns."""
    identity = await model.identity(session.adapter)
    if session.policy != identity.policy:
        raise StaleSession("the policy changed while the session was being captured; nothing was kept")
    lane = session.busy
    decoding = session.turn is not None and bool(session.turn.logprobs)
    if session.node is None or (lane is None and not session.num_kv):
        return _captured(session, identity, plan, model, tuple(session.tokens), Answer())
    if lane is None:
        session.require_state()
    # The states of a session that runs are those of what the engine has computed by now.
    now = lane is not None and (not decoding or model.keeps_states)
    num_kv = None if now else session.computed()
    tokens = tuple(session.tokens)
    talk.mail.register_store(plan.mount)
    answer = await talk.command(
        protocol.Write(
            id=secrets.token_hex(16), record=session.node.name, store=plan.mount.uuid, packs=plan.packs,
            base=plan.base, num_kv=num_kv,
        )
    )  # fmt: skip
    if lane is not None and num_kv is None:
        tokens = await _seen(session, lane, answer, 1 if model.keeps_states else 0)
    return _captured(session, identity, plan, model, tokens, answer)


async def _seen(session: ServedSession, lane: ActiveRequest, answer: Answer, more: int) -> tuple[int, ...]:
    """The tokens that were captured while a prompt was being read: those read so far and `more`, and all that the
    session had before. Where the prompt had been read, wait until the client has seen what came of it."""
    if answer.num_kv < answer.num_tokens - 1:
        whole = (*session.tokens[: lane.prompt_start], *lane.prompt)
        return whole[: max(answer.num_kv + more, lane.prompt_start)]
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
    model: ServedModel,
    tokens: tuple[int, ...],
    answer: Answer,
) -> Captured:
    if plan.base > answer.num_kv:
        raise InvalidRequest(f"capture from token {plan.base}: the session has KV for {answer.num_kv} tokens")
    segments, locations = joined_segments(answer, plan.base, model.info.groups)
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


def joined_segments(
    answer: Answer, base: int, groups: Sequence[CacheGroup]
) -> tuple[tuple[CapturedSegment, ...], tuple[BlobLocation, ...]]:
    """What all ranks wrote of tokens from `base` on, in the order of segments, groups and blobs. Raises `LawBroken`
    unless every blob is there once that every group needs."""
    found: Found = {}
    for blob in sorted(answer.blobs, key=lambda b: b.index):
        found.setdefault((blob.start, blob.group, blob.point), []).append(blob)
    segments, order = [], []
    for start, stop in windows(base, answer.num_kv):
        tokens, states = _tokens_of(found, start, stop, answer.num_kv, groups), _states_of(found, start, groups)
        segments.append(_segment(start, stop, tokens, states))
        order += [blob for named in (tokens, *states.values()) for blobs in named.values() for blob in blobs]
    if found:
        raise LawBroken(f"the workers wrote what nobody asked for: {sorted(found)}")
    locations = tuple(BlobLocation(blob=b.blob, pack=b.pack, offset=b.offset, nbytes=b.nbytes) for b in order)
    return tuple(segments), locations


def _tokens_of(found: Found, start: int, stop: int, num_kv: int, groups: Sequence[CacheGroup]) -> Named:
    """A segment's blobs of tokens; of a window that begins behind the segment there may be none."""
    named = {}
    for group in token_groups(groups):
        blobs, needed = found.pop((start, group.name, 0), []), max(start, group.covers(num_kv).start)
        if blobs or needed < stop:
            _check_whole(blobs, group, start, needed)
            named[group.name] = blobs
    return named


def _states_of(found: Found, start: int, groups: Sequence[CacheGroup]) -> dict[int, Named]:
    """A segment's states, by the number of tokens that they are of."""
    states: dict[int, Named] = {}
    for token in sorted({token for at, _, token in found if at == start and token}):
        states[token] = {group.name: found.pop((start, group.name, token), []) for group in point_groups(groups)}
        for group in point_groups(groups):
            _check_whole(states[token][group.name], group, start, start)
    return states


def _segment(start: int, stop: int, tokens: Named, states: dict[int, Named]) -> CapturedSegment:
    return CapturedSegment(
        start=start,
        length=stop - start,
        blobs=_ids(tokens),
        first={name: blobs[0].first for name, blobs in tokens.items() if blobs[0].first > start},
        points=tuple(StatesAtToken(token=token, blobs=_ids(named)) for token, named in states.items()),
    )


def _check_whole(blobs: Sequence[Blob], group: CacheGroup, start: int, needed: int) -> None:
    """All of the group's blobs, from token `needed` on or an earlier one that is the same for all."""
    told, firsts = [blob.index for blob in blobs], {blob.first for blob in blobs}
    if told != list(range(group.num_blobs)) or len(firsts) != 1 or not start <= firsts.pop() <= needed:
        raise LawBroken(
            f"the workers wrote blobs {told} of cache group {group.name} in the segment at {start}, from tokens "
            f"{sorted({blob.first for blob in blobs})} on; expected {group.num_blobs}, from {needed} on"
        )


def _ids(named: Named) -> dict[str, tuple[str, ...]]:
    return {name: tuple(blob.blob for blob in blobs) for name, blobs in named.items()}
