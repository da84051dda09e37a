"""OpenAI's Chat Completions: `/v1/chat/completions`. No ids: a conversation's tokens say where it goes on."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from thaw.core.errors import ThawError
from thaw.core.sampling import Sampling
from thaw.gateway.asked import Asked, RequestOutcome, SpokenPiece
from thaw.gateway.context import GatewayContext
from thaw.gateway.dialects.choice import chosen
from thaw.gateway.dialects.common import (
    HINTS,
    Extension,
    SamplingFields,
    best_first,
    call_of,
    check_model,
    choices_of,
    constrained,
    effort_of,
    message_of,
    sampling_of,
    structured,
    token_logprobs,
    tools_of,
    unread_of,
)
from thaw.gateway.dialects.merged import merged
from thaw.gateway.fields import Fields
from thaw.gateway.job import ReplyJob
from thaw.gateway.problems import ApiError, invalid, problem_of, unsupported
from thaw.gateway.reply import EventStream, as_json, begun, event, headers_of, outcomes_of
from thaw.gateway.speech import Said, Text, Thought, ToolCall
from thaw.repo.bridge import call

FINISH = {"stop": "stop", "length": "length", "abort": "stop"}


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False


class ChatCreate(SamplingFields, kw_only=True):
    messages: list[dict[str, Any]]
    n: int = 1
    best_of: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    continue_final_message: bool = False
    add_generation_prompt: bool = True


FIELDS = Fields(
    taken=ChatCreate,
    ignored=HINTS | {"metadata", "store", "verbosity"},
    idle={
        "modalities": (["text"],), "functions": ([],),
    },
)  # fmt: skip


async def create(context: GatewayContext, request: Request, body: bytes) -> Response:
    asked, ignored = FIELDS.read(body)
    ignored += unread_of([tool.get("function") or {} for tool in asked.tools], ("strict",))
    check_model(asked.model, context.service.served)
    extension = context.extension(asked.thaw)
    base = await _asked(context, asked, extension)
    count = number_of(asked.n, asked.best_of, stream=asked.stream)
    context.service.require_choices(count)
    jobs = await context.service.start(context.tenant, each_choice(base, choices_of(base.sampling, count)))
    id = f"chatcmpl-{secrets.token_hex(16)}"
    context.note(response=id)
    if asked.stream:
        await begun(jobs)
        parent = jobs[0].begun.result().parent
        return EventStream(_stream(context, id, asked, jobs), lambda: stop(jobs), headers_of(ignored, parent=parent))
    outcomes = await outcomes_of(request, jobs)
    if asked.best_of is not None:
        outcomes = best_first(outcomes)[: asked.n]
    whole = await call(_whole, context, id, asked, outcomes)
    return as_json(whole, headers=headers_of(ignored, outcomes))


def stop(jobs: Sequence[ReplyJob]) -> None:
    for job in jobs:
        job.stop()


def number_of(n: int, best_of: int | None, *, stream: bool) -> int:
    """How many are generated."""
    if n < 1:
        raise invalid("n", f"{n}; at least 1")
    if best_of is None:
        return n
    if best_of < n:
        raise invalid("best_of", f"{best_of}; at least n, which is {n}")
    if stream and best_of > n:
        raise unsupported("best_of", "best_of cannot be streamed; leave out stream")
    return best_of


def each_choice(base: Asked, samplings: Sequence[Sampling]) -> list[Asked]:
    """One for each choice; of several, each has a branch of its own."""
    if len(samplings) == 1 or base.branch is None:
        return [msgspec.structs.replace(base, sampling=one) for one in samplings]
    return [msgspec.structs.replace(base, sampling=one, branch=f"{base.branch}/{i}") for i, one in enumerate(samplings)]


async def _asked(context: GatewayContext, body: ChatCreate, extension: Extension) -> Asked:
    if not body.messages:
        raise invalid("messages", "there is nothing to answer")
    if body.add_generation_prompt == body.continue_final_message:
        raise invalid("continue_final_message", "it is the opposite of add_generation_prompt; set both")
    at = await context.at(extension)
    engine, parallel = context.service.engine, body.parallel_tool_calls
    choice = chosen(tools_of(body.tools), body.tool_choice, engine, parallel=parallel)
    return Asked(
        messages=tuple(message_of(message, f"messages[{i}]") for i, message in enumerate(body.messages)),
        at=at,
        tools=choice.shown,
        forced=choice.forced,
        single_call=choice.single,
        variables=effort_of(body.reasoning_effort, "reasoning_effort") | body.chat_template_kwargs,
        keep_sampled=extension.keep_sampled,
        continue_final_message=body.continue_final_message,
        sampling=constrained(_sampling(context, body), choice.schema()),
        max_tokens=limit_of(body.max_completion_tokens, body.max_tokens),
        branch=extension.branch,
        note=extension.note or "chat",
        policy=extension.policy,
        followed=body.stream or choice.single,
    )


def limit_of(*given: int | None) -> int | None:
    found = next((one for one in given if one is not None), None)
    if found is not None and found < 1:
        raise invalid("max_tokens", f"{found}; at least 1")
    return found


def _sampling(context: GatewayContext, body: ChatCreate) -> Sampling:
    engine = context.service.engine
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "it needs logprobs=true")
    more: dict[str, object] = {"logprobs": body.top_logprobs or (0 if body.logprobs else None)}
    format = structured(body.response_format, "response_format", engine)
    if format is not None:
        more["structured_outputs"] = format
    return sampling_of(body, engine, **more)


# -- replies


def _head(context: GatewayContext, id: str, kind: str) -> dict[str, object]:
    return {"id": id, "object": kind, "created": int(time.time()), "model": context.service.model}


def usage_of(outcomes: Sequence[RequestOutcome], first: Sequence[RequestOutcome] = ()) -> dict[str, object]:
    """Of a request: each prompt once, whatever was said in all choices. Prompt tokens include cached ones. `first`: one
    outcome of each prompt, where there are several prompts."""
    first = first or outcomes[:1]
    prompt, said = sum(one.num_prompt for one in first), sum(len(one.token_ids) for one in outcomes)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": said,
        "total_tokens": prompt + said,
        "prompt_tokens_details": {"cached_tokens": sum(one.num_cached for one in first)},
    }


def told_of(outcomes: Sequence[RequestOutcome]) -> dict[str, object]:
    if len(outcomes) == 1:
        return outcomes[0].told
    return {**outcomes[0].told, "points": [one.point for one in outcomes]}


def _whole(context: GatewayContext, id: str, body: ChatCreate, outcomes: Sequence[RequestOutcome]) -> dict[str, object]:
    choices = [_choice(context, id, body, i, outcome) for i, outcome in enumerate(outcomes)]
    head = _head(context, id, "chat.completion")
    return {**head, "choices": choices, "usage": usage_of(outcomes), "thaw": told_of(outcomes)}


def _choice(
    context: GatewayContext, id: str, body: ChatCreate, number: int, outcome: RequestOutcome
) -> dict[str, object]:
    calls = [one for one in outcome.said if isinstance(one, ToolCall)]
    text = "".join(one.text for one in outcome.said if isinstance(one, Text))
    thought = "".join(one.text for one in outcome.said if isinstance(one, Thought))
    message: dict[str, object] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if thought:
        message |= _thought(thought)
    if calls:
        message["tool_calls"] = [_call(id, number, i, call) for i, call in enumerate(calls)]
    return {
        "index": number,
        "message": message,
        "finish_reason": "tool_calls" if calls else FINISH[outcome.finish_reason],
        "stop_reason": outcome.stop_reason,
        "logprobs": _logprobs(context, body, outcome) if body.logprobs else None,
        "thaw": {"point": outcome.point},
    }


def _thought(text: str) -> dict[str, object]:
    """Under both names that clients look for."""
    return {"reasoning_content": text, "reasoning": text}


def _logprobs(context: GatewayContext, body: ChatCreate, outcome: RequestOutcome) -> dict[str, object]:
    tops = outcome.top_logprobs
    told = token_logprobs(context.codec, outcome.token_ids, outcome.logprobs, tops, body.top_logprobs or 0)
    return {"content": told, "refusal": None}


def _call(id: str, choice: int, number: int, call: ToolCall) -> dict[str, object]:
    return call_of(f"call_{id.removeprefix('chatcmpl-')}_{choice}_{number}", call.name, call.arguments)


# -- streams


async def _stream(context: GatewayContext, id: str, body: ChatCreate, jobs: Sequence[ReplyJob]) -> AsyncIterator[bytes]:
    head = _head(context, id, "chat.completion.chunk")
    choices = [_Choice(context, id, i, body) for i in range(len(jobs))]
    for i in range(len(jobs)):
        yield event({**head, "choices": [_part(i, {"role": "assistant", "content": ""})]})
    try:
        async for number, pieces in merged(jobs):
            choice = choices[number]
            if pieces is not None:
                yield b"".join(event({**head, "choices": [one]}) for piece in pieces for one in choice.piece(piece))
                continue
            outcome = await asyncio.shield(jobs[number].outcome)
            for one in choice.end(outcome):
                yield event({**head, "choices": [one], "thaw": outcome.told})
    except (ThawError, ApiError) as error:
        stop(jobs)
        yield broken(error)
        return
    if body.stream_options.include_usage:
        outcomes = [job.outcome.result() for job in jobs]
        yield event({**head, "choices": [], "usage": usage_of(outcomes), "thaw": told_of(outcomes)})
    yield b"data: [DONE]\n\n"


def broken(error: ThawError | ApiError) -> bytes:
    """The last thing in a stream that does not end as it should; OpenAI's clients raise it."""
    problem = error if isinstance(error, ApiError) else problem_of(error)
    return event({"error": {"message": problem.message, "type": problem.kind, "code": problem.code, "param": None}})


def _part(number: int, delta: dict[str, object], finish: str | None = None, logprobs: Any = None) -> dict[str, object]:
    return {"index": number, "delta": delta, "finish_reason": finish, "logprobs": logprobs}


class _Choice:
    """The parts of one choice of a stream."""

    def __init__(self, context: GatewayContext, id: str, number: int, body: ChatCreate) -> None:
        self._context, self._id, self._number = context, id, number
        self._logprobs, self._num_top = body.logprobs, body.top_logprobs or 0
        self._calls = 0

    def piece(self, piece: SpokenPiece) -> Iterator[dict[str, object]]:
        told = None
        if self._logprobs and piece.token_ids and not self._num_top:
            told = {"content": token_logprobs(self._context.codec, piece.token_ids, piece.logprobs)}
        for one in piece.said:
            yield self._said(one, told)
            told = None
        if told is not None:
            yield _part(self._number, {"content": ""}, logprobs=told)

    def end(self, outcome: RequestOutcome) -> Iterator[dict[str, object]]:
        """The likeliest tokens are known at the end, so all log probabilities come with them."""
        told = None
        if self._num_top:
            tops = outcome.top_logprobs
            found = token_logprobs(self._context.codec, outcome.token_ids, outcome.logprobs, tops, self._num_top)
            told = {"content": found}
        yield _part(self._number, {}, "tool_calls" if self._calls else FINISH[outcome.finish_reason], told)

    def _said(self, one: Said, logprobs: Any) -> dict[str, object]:
        if isinstance(one, Text):
            return _part(self._number, {"content": one.text}, logprobs=logprobs)
        if isinstance(one, Thought):
            return _part(self._number, _thought(one.text), logprobs=logprobs)
        call = {"index": self._calls, **_call(self._id, self._number, self._calls, one)}
        self._calls += 1
        return _part(self._number, {"tool_calls": [call]}, logprobs=logprobs)
