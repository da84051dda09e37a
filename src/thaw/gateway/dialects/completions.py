"""OpenAI's Completions: `/v1/completions`. Text or token ids in, text out; no template."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from itertools import accumulate

from starlette.requests import Request
from starlette.responses import Response

from thaw.core.errors import ThawError
from thaw.gateway.asked import Asked, RequestOutcome
from thaw.gateway.context import GatewayContext
from thaw.gateway.dialects.chat import (
    FINISH,
    StreamOptions,
    broken,
    each_choice,
    limit_of,
    number_of,
    stop,
    told_of,
    usage_of,
)
from thaw.gateway.dialects.common import HINTS, SamplingFields, best_first, check_model, choices_of, sampling_of
from thaw.gateway.dialects.merged import merged
from thaw.gateway.fields import Fields
from thaw.gateway.job import ReplyJob
from thaw.gateway.problems import ApiError, invalid, unsupported
from thaw.gateway.reply import EventStream, as_json, begun, event, headers_of, outcomes_of
from thaw.repo.bridge import call

DEFAULT_TOKENS = 16
"""As OpenAI's."""


class CompletionCreate(SamplingFields, kw_only=True):
    prompt: str | list[str | int | list[int]]
    n: int = 1
    best_of: int | None = None
    max_tokens: int | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    logprobs: int | None = None
    echo: bool = False


FIELDS = Fields(taken=CompletionCreate, ignored=HINTS | {"metadata", "store"}, idle={"suffix": ("",)})


async def create(context: GatewayContext, request: Request, body: bytes) -> Response:
    asked, ignored = FIELDS.read(body)
    check_model(asked.model, context.service.served)
    if asked.echo and asked.logprobs is not None:
        raise unsupported("echo", "a prompt has no log probabilities here; leave out echo or logprobs")
    extension = context.extension(asked.thaw)
    if extension.point is not None:
        raise unsupported("thaw.point", "a completion's prompt is the whole text; use a chat or a response instead")
    sampling = sampling_of(asked, context.service.engine, logprobs=asked.logprobs)
    count = number_of(asked.n, asked.best_of, stream=asked.stream)
    each: list[Asked] = []
    prompts = await _prompts(context, asked.prompt, count)
    for ids in prompts:
        base = Asked(
            token_ids=ids,
            sampling=sampling,
            max_tokens=limit_of(asked.max_tokens, DEFAULT_TOKENS),
            branch=extension.branch,
            note=extension.note or "completion",
            policy=extension.policy,
            followed=asked.stream,
        )
        each += each_choice(base, choices_of(sampling, count))
    jobs = await context.service.start(context.tenant, each)
    id = f"cmpl-{secrets.token_hex(16)}"
    context.note(response=id)
    if asked.stream:
        await begun(jobs)
        headers = headers_of(ignored, parent=jobs[0].begun.result().parent)
        echoed = [_echoed(context, asked, prompts[i // count]) for i in range(len(jobs))]
        return EventStream(_stream(context, id, asked, jobs, echoed), lambda: stop(jobs), headers)
    outcomes = await outcomes_of(request, jobs)
    kept = [
        one
        for i in range(0, len(outcomes), count)
        for one in (best_first(outcomes[i : i + count])[: asked.n] if asked.best_of else outcomes[i : i + count])
    ]
    choices = await call(
        lambda: [
            _choice(context, asked, i, outcome, _echoed(context, asked, prompts[i // asked.n]))
            for i, outcome in enumerate(kept)
        ]
    )
    head = _head(context, id)
    usage = usage_of(outcomes, outcomes[::count])
    return as_json(
        {**head, "choices": choices, "usage": usage, "thaw": told_of(kept)}, headers=headers_of(ignored, kept)
    )


async def _prompts(
    context: GatewayContext, prompt: str | list[str | int | list[int]], count: int
) -> list[tuple[int, ...]]:
    """Token ids of each prompt: a text, its ids, or a list of either. `count`: choices of each."""
    several = [prompt] if isinstance(prompt, str) or all(isinstance(one, int) for one in prompt) else prompt
    context.service.require_choices(len(several) * count)
    found = [await _ids(context, one, i) for i, one in enumerate(several)]
    if not found or not all(found):
        raise invalid("prompt", "it is empty")
    return found


async def _ids(context: GatewayContext, one: object, number: int) -> tuple[int, ...]:
    if isinstance(one, str):
        return await context.service.encode(context.tenant, one)
    if not isinstance(one, list):
        raise invalid(f"prompt[{number}]", "texts and token ids cannot be mixed")
    return tuple(one)


def _head(context: GatewayContext, id: str) -> dict[str, object]:
    return {"id": id, "object": "text_completion", "created": int(time.time()), "model": context.service.model}


def _echoed(context: GatewayContext, body: CompletionCreate, prompt: tuple[int, ...]) -> str:
    """What stands before what was generated, where that was asked for."""
    return context.codec.decode(prompt) if body.echo else ""


def _choice(
    context: GatewayContext, body: CompletionCreate, number: int, outcome: RequestOutcome, before: str
) -> dict[str, object]:
    logprobs = None
    if body.logprobs is not None:
        logprobs = _logprobs(context, outcome.token_ids, outcome.logprobs, outcome.top_logprobs)
    return {
        "index": number, "text": before + outcome.text, "finish_reason": FINISH[outcome.finish_reason],
        "stop_reason": outcome.stop_reason, "logprobs": logprobs, "thaw": {"point": outcome.point},
    }  # fmt: skip


def _logprobs(
    context: GatewayContext,
    ids: Sequence[int],
    logprobs: Sequence[float],
    tops: Sequence[Sequence[tuple[int, float]]] | None = None,
    offset: int = 0,
) -> dict[str, object]:
    said = [context.codec.decode([token], skip_special_tokens=False) for token in ids]
    offsets = list(accumulate(map(len, said), initial=offset))[: len(said)]
    best = None
    if tops is not None:
        best = [
            {context.codec.decode([token], skip_special_tokens=False): logprob for token, logprob in one}
            for one in tops
        ]
    return {"tokens": said, "token_logprobs": list(logprobs), "top_logprobs": best, "text_offset": offsets}


async def _stream(
    context: GatewayContext, id: str, body: CompletionCreate, jobs: Sequence[ReplyJob], echoed: Sequence[str]
) -> AsyncIterator[bytes]:
    head, offsets = _head(context, id), [0] * len(jobs)
    for number, text in enumerate(echoed):
        if text:
            choice = {"index": number, "text": text, "finish_reason": None, "logprobs": None}
            yield event({**head, "choices": [choice]})
    try:
        async for number, pieces in merged(jobs):
            choice = {"index": number, "text": "", "finish_reason": None, "logprobs": None}
            if pieces is None:
                outcome = await asyncio.shield(jobs[number].outcome)
                if body.logprobs:  # the likeliest tokens are known at the end
                    tops = outcome.top_logprobs
                    choice["logprobs"] = _logprobs(context, outcome.token_ids, outcome.logprobs, tops)
                last = {**choice, "finish_reason": FINISH[outcome.finish_reason]}
                yield event({**head, "choices": [last], "thaw": outcome.told})
                continue
            some = []
            for piece in pieces:
                told = body.logprobs == 0
                logprobs = _logprobs(context, piece.token_ids, piece.logprobs, offset=offsets[number]) if told else None
                offsets[number] += len(piece.text)
                if piece.text or logprobs:
                    some.append(event({**head, "choices": [{**choice, "text": piece.text, "logprobs": logprobs}]}))
            yield b"".join(some)
    except (ThawError, ApiError) as error:
        stop(jobs)
        yield broken(error)
        return
    if body.stream_options.include_usage:
        outcomes = [job.outcome.result() for job in jobs]
        yield event({**head, "choices": [], "usage": usage_of(outcomes, outcomes[:: body.n])})
    yield b"data: [DONE]\n\n"
