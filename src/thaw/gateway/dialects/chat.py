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
from thaw.gateway.asked import Asked, RequestOutcome
from thaw.gateway.context import GatewayContext
from thaw.gateway.dialects.common import (
    HINTS,
    Extension,
    SamplingFields,
    best_first,
    call_of,
    check_model,
    choices_of,
    chosen,
    message_of,
    sampling_of,
    structured,
    token_logprobs,
    tools_of,
)
from thaw.gateway.dialects.merged import merged
from thaw.gateway.fields import Fields
from thaw.gateway.job import ReplyJob
from thaw.gateway.problems import ApiError, invalid, problem_of, unsupported
from thaw.gateway.reply import EventStream, as_json, begun, event, headers_of, outcomes_of
from thaw.gateway.speech import Said, Text, ToolCall, read_all
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
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    continue_final_message: bool = False
    add_generation_prompt: bool = True


FIELDS = Fields(
    taken=ChatCreate,
    ignored=HINTS | {"metadata", "store"},
    idle={
        "modalities": (["text"],), "parallel_tool_calls": (True,), "functions": ([],), "verbosity": ("medium",),
    },
)  # fmt: skip


async def create(context: GatewayContext, request: Request, body: bytes) -> Response:
    asked, ignored = FIELDS.read(body)
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
    return Asked(
        messages=tuple(message_of(message, f"messages[{i}]") for i, message in enumerate(body.messages)),
        at=at,
        tools=chosen(tools_of(body.tools), body.tool_choice),
        variables=body.chat_template_kwargs,
        keep_sampled=extension.keep_sampled,
        continue_final_message=body.continue_final_message,
        sampling=_sampling(context, body),
        max_tokens=limit_of(body.max_completion_tokens, body.max_tokens),
        branch=extension.branch,
        note=extension.note or "chat",
        policy=extension.policy,
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
    if body.stream and body.top_logprobs:
        raise unsupported("top_logprobs", "a stream only has the sampled tokens' log probabilities")
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
    said = read_all(context.service.reader(), outcome.text)
    calls = [one for one in said if isinstance(one, ToolCall)]
    text = "".join(one.text for one in said if isinstance(one, Text))
    message: dict[str, object] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
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


def _logprobs(context: GatewayContext, body: ChatCreate, outcome: RequestOutcome) -> dict[str, object]:
    tops = outcome.top_logprobs
    told = token_logprobs(context.codec, outcome.token_ids, outcome.logprobs, tops, body.top_logprobs or 0)
    return {"content": told, "refusal": None}


def _call(id: str, choice: int, number: int, call: ToolCall) -> dict[str, object]:
    return call_of(f"call_{id.removeprefix('chatcmpl-')}_{choice}_{number}", call.name, call.arguments)


# -- streams


async def _stream(context: GatewayContext, id: str, body: ChatCreate, jobs: Sequence[ReplyJob]) -> AsyncIterator[bytes]:
    head = _head(context, id, "chat.completion.chunk")
    choices = [_Choice(context, id, i, body.logprobs) for i in range(len(jobs))]
    for i in range(len(jobs)):
        yield event({**head, "choices": [_part(i, {"role": "assistant", "content": ""})]})
    try:
        async for number, delta in merged(jobs):
            choice = choices[number]
            if delta is not None:
                for one in choice.piece(delta.text, delta.token_ids, delta.logprobs):
                    yield event({**head, "choices": [one]})
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

    def __init__(self, context: GatewayContext, id: str, number: int, logprobs: bool) -> None:
        self._context, self._id, self._number, self._logprobs = context, id, number, logprobs
        self._reader = context.service.reader()
        self._calls = 0

    def piece(self, text: str, ids: Sequence[int], logprobs: Sequence[float]) -> Iterator[dict[str, object]]:
        told = {"content": token_logprobs(self._context.codec, ids, logprobs)} if self._logprobs else None
        said = list(self._reader.push(text))
        for one in said:
            yield self._said(one, told)
            told = None
        if told is not None and ids:
            yield _part(self._number, {"content": ""}, logprobs=told)

    def end(self, outcome: RequestOutcome) -> Iterator[dict[str, object]]:
        for one in self._reader.end():
            yield self._said(one, None)
        yield _part(self._number, {}, "tool_calls" if self._calls else FINISH[outcome.finish_reason])

    def _said(self, one: Said, logprobs: Any) -> dict[str, object]:
        if isinstance(one, Text):
            return _part(self._number, {"content": one.text}, logprobs=logprobs)
        call = {"index": self._calls, **_call(self._id, self._number, self._calls, one)}
        self._calls += 1
        return _part(self._number, {"tool_calls": [call]}, logprobs=logprobs)
