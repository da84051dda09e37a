"""OpenAI's Responses: `/v1/responses`. A response's id names a commit; two with one `previous_response_id` are two
children of it."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from thaw.core.errors import ThawError
from thaw.gateway.asked import Asked, RequestOutcome, SpokenPiece
from thaw.gateway.context import GatewayContext
from thaw.gateway.dialects import conversations, response_input
from thaw.gateway.dialects.choice import ChosenTools, chosen
from thaw.gateway.dialects.client_tools import shown_tools
from thaw.gateway.dialects.common import (
    HINTS,
    SamplingFields,
    check_model,
    constrained,
    effort_of,
    sampling_of,
    structured,
    token_logprobs,
    unread_of,
)
from thaw.gateway.dialects.pages import listed, number
from thaw.gateway.dialects.response_object import Event, Events, finished
from thaw.gateway.fields import Fields
from thaw.gateway.job import ReplyJob
from thaw.gateway.ledger import UNDER_WAY, LedgerRow
from thaw.gateway.problems import ApiError, invalid, problem_of
from thaw.gateway.reply import EventStream, as_json, begun, event, headers_of, outcomes_of
from thaw.gateway.service import Service
from thaw.gateway.speech import Said, Thought
from thaw.repo.bridge import call
from thaw.repo.resolve import ResolvedPoint

log = logging.getLogger("thaw.gateway")
KIND = "response"
LOGPROBS = "message.output_text.logprobs"


class ResponseReasoning(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None


class ResponseCreate(SamplingFields, kw_only=True):
    input: str | list[dict[str, Any]] = ""
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    store: bool = True
    background: bool = False
    stream: bool = False
    max_output_tokens: int | None = None
    metadata: dict[str, str] = msgspec.field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    text: dict[str, Any] = msgspec.field(default_factory=dict)
    top_logprobs: int | None = None
    include: tuple[str, ...] = ()
    chat_template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    reasoning: ResponseReasoning = ResponseReasoning()


FIELDS = Fields(
    taken=ResponseCreate,
    ignored=HINTS | {"stream_options", "prompt_cache_breakpoint", "background_options"},
    idle={"truncation": ("disabled",)},
)


class Begin(msgspec.Struct, kw_only=True):
    """A response before it runs: what it asks, and what its object says from the start."""

    id: str
    asked: Asked
    head: Event
    input: list[dict[str, Any]]
    parent: str | None
    conversation: LedgerRow | None
    num_top: int | None
    store: bool
    body: ResponseCreate | None = None
    """What the client sent; None once it was parked."""
    reply: Event | None = None
    """The object at its end, from when it is known: the same for the client, for those who follow, and on disk."""
    logprobs: list[Any] = []
    """Those that a stream has not told before its end."""


async def create(context: GatewayContext, request: Request, body: bytes) -> Response:
    asked, ignored = FIELDS.read(body)
    check_model(asked.model, context.service.served)
    if asked.background and not asked.store:
        raise invalid("background", "a background response is always stored; leave out store")
    ignored += _unread(asked)
    begin = await _begin(context, asked)
    context.note(response=begin.id)
    job = await _start(context, begin)
    if asked.background and not asked.stream:
        return as_json({**begin.head, "status": "queued"}, headers=headers_of(ignored, parent=begin.parent))
    if not asked.stream:
        outcome = (await outcomes_of(request, [job]))[0]
        return as_json(begin.reply, headers=headers_of(ignored, [outcome]))
    if not asked.background:
        await begun([job])
    gone = (lambda: None) if asked.background else job.stop
    return EventStream(_live(context, begin, job), gone, headers_of(ignored, parent=begin.parent))


def _unread(asked: ResponseCreate) -> list[str]:
    """Inner fields that change nothing here: no thought is summarised or encrypted, and no model has a verbosity."""
    found = [f"reasoning.{name}" for name in ("summary", "generate_summary", "context")
             if getattr(asked.reasoning, name) is not None]  # fmt: skip
    found += [f"include.{name}" for name in asked.include if name != LOGPROBS]
    found += ["text.verbosity"] if asked.text.get("verbosity") is not None else []
    return found + unread_of(asked.tools, ("strict", "format", "defer_loading"))


async def _begin(context: GatewayContext, body: ResponseCreate, id: str = "") -> Begin:
    """It has its conversation for itself. `id`: of a response that is begun anew."""
    conversation = await conversations.taken(context, body.conversation)
    try:
        return await _begin_in(context, body, id or f"resp_{secrets.token_hex(16)}", conversation)
    except BaseException:
        conversations.free(context, conversation)
        raise


async def _begin_in(context: GatewayContext, body: ResponseCreate, id: str, conversation: LedgerRow | None) -> Begin:
    extension = context.extension(body.thaw)
    previous = await _previous(context, body)
    if conversation is not None and (previous is not None or extension.branch is not None):
        raise invalid("conversation", "it cannot be combined with previous_response_id or thaw.branch; leave those out")
    if extension.point is not None and (previous is not None or conversation is not None):
        raise invalid("thaw.point", "it cannot be combined with previous_response_id or conversation; leave those out")
    given = response_input.items(body.input, id)
    if not given and previous is None and extension.point is None and conversation is None:
        raise invalid("input", "there is nothing to answer")
    at: ResolvedPoint | None
    if conversation is not None:
        at, first = await conversations.tip(context, conversation)
        held: bool | None = bool(conversation.record.get("instructions"))
    else:
        at, first = await context.at(extension, None if previous is None else previous.point), []
        held = None if previous is None else bool(previous.record["reply"]["instructions"])
    num_top = body.top_logprobs if body.top_logprobs is not None else 0 if LOGPROBS in body.include else None
    choice = _choice(context, body.tools, body.tool_choice, parallel=body.parallel_tool_calls)
    asked = Asked(
        messages=response_input.messages([*first, *given]),
        at=at,
        instructions=body.instructions,
        held_instructions=held,
        tools=choice.shown,
        forced=choice.forced,
        single_call=choice.single,
        variables=effort_of(body.reasoning.effort, "reasoning.effort") | body.chat_template_kwargs,
        keep_sampled=extension.keep_sampled,
        sampling=constrained(_sampling(context, body, num_top), choice.schema()),
        max_tokens=_at_least_one(body.max_output_tokens),
        branch=extension.branch if conversation is None else conversations.branch_of(conversation.id),
        note=extension.note or f"response {id}",
        policy=extension.policy,
        followed=body.stream or body.background or choice.single,
    )
    parent = str(at.commit) if at is not None else None
    head = _head(context, id, body, None if conversation is None else conversation.id)
    return Begin(
        id=id, asked=asked, head=head, input=given, parent=parent, conversation=conversation,
        num_top=num_top, store=body.store, body=body,
    )  # fmt: skip


def _choice(context: GatewayContext, tools: Sequence[Any], choice: object, *, parallel: bool) -> ChosenTools:
    return chosen(shown_tools(tools), choice, context.service.engine, parallel=parallel)


def _at_least_one(number: int | None) -> int | None:
    if number is not None and number < 1:
        raise invalid("max_output_tokens", f"{number}; at least 1")
    return number


def _sampling(context: GatewayContext, body: ResponseCreate, num_top: int | None) -> Any:
    engine = context.service.engine
    more: dict[str, object] = {"logprobs": num_top}
    format = structured(body.text.get("format"), "text.format", engine)
    if format is not None:
        more["structured_outputs"] = format
    return sampling_of(body, engine, **more)


async def _previous(context: GatewayContext, body: ResponseCreate) -> LedgerRow | None:
    if body.previous_response_id is None:
        return None
    row = await _row(context, body.previous_response_id, "previous_response_id")
    if row.point is None:
        raise ApiError(409, f"{row.id} is {row.status} and cannot be continued yet", param="previous_response_id")
    return row


async def _row(context: GatewayContext, id: str, param: str = "response_id") -> LedgerRow:
    job = context.service.jobs.get((context.tenant.namespace, id))
    if job is not None and job.written is not None:
        await job.written
    row = await call(context.service.ledger.get, context.tenant.namespace, KIND, id[:100])
    if row is None:
        raise ApiError(404, f"there is no response {id[:100]!r}", code="not_found", param=param)
    return row


def _head(context: GatewayContext, id: str, body: ResponseCreate, conversation: str | None) -> Event:
    return {
        "id": id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": body.background,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": context.service.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning": {"effort": body.reasoning.effort, "summary": None},
        "previous_response_id": body.previous_response_id,
        "conversation": None if conversation is None else {"id": conversation},
        "store": body.store,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "text": body.text or {"format": {"type": "text"}},
        "tool_choice": body.tool_choice,
        "tools": body.tools,
        "truncation": "disabled",
        "usage": None,
        "metadata": body.metadata,
    }


async def _start(context: GatewayContext, begin: Begin) -> ReplyJob:
    """The job, with its row written beside it; the row is on disk again before the job has an outcome."""
    service, namespace = context.service, context.tenant.namespace
    try:
        await service.admit(context.tenant, 1, service.answer(begin.asked))
    except BaseException:
        conversations.free(context, begin.conversation)
        raise
    first: asyncio.Task[None] | None = None
    if begin.store:
        row = LedgerRow(
            kind=KIND, id=begin.id, namespace=namespace, status=str(begin.head["status"]), parent=begin.parent,
            record={"reply": begin.head, "input": begin.input},
        )  # fmt: skip
        first = asyncio.create_task(call(service.ledger.put, row))
    return _own(context, begin, first)


def _own(
    context: GatewayContext, begin: Begin, first: asyncio.Task[None] | None, said: Sequence[SpokenPiece] = ()
) -> ReplyJob:
    """The job of a response: known while it runs, and kept when it is over. `first` writes its row before that."""
    service, namespace = context.service, context.tenant.namespace
    key = (namespace, begin.id)

    async def keep(outcome: RequestOutcome) -> None:
        if first is not None:
            await first
        row = await _row_of(context, begin, outcome, job)
        if begin.store and not job.forgotten:
            await call(service.ledger.put, row)
            if job.forgotten:  # it was deleted while it was written
                await call(service.ledger.delete, namespace, KIND, begin.id)
        else:
            await service.keep_point(context.tenant, outcome)
        if begin.conversation is not None and row.status != "parked":
            reply = row.record["reply"]
            await conversations.extend(context, begin.conversation, begin.input, reply["output"], reply["instructions"])

    job = service.begin(context.tenant, begin.asked, keep, said)
    if begin.store:
        service.jobs[key], job.about, job.written = job, begin, first

    def over(_: asyncio.Task[None]) -> None:
        service.jobs.pop(key, None)
        conversations.free(context, begin.conversation)
        if begin.store and job.outcome.exception() is not None:
            service.later(_failed(context, begin, first))

    job.task.add_done_callback(over)
    return job


async def _failed(context: GatewayContext, begin: Begin, first: asyncio.Task[None] | None) -> None:
    """A stored response that came to nothing says so when it is asked for."""

    def fail(row: LedgerRow) -> None:
        row.status = "failed"

    if first is not None:
        await first
    await call(context.service.ledger.change, context.tenant.namespace, KIND, begin.id, fail)


async def _row_of(context: GatewayContext, begin: Begin, outcome: RequestOutcome, job: ReplyJob) -> LedgerRow:
    """What is kept of a response that is over, or parked: then only what was given out is its text."""
    cancelled = job.stopped and not job.parked and bool(begin.head["background"])
    logprobs = [] if begin.num_top is None else await call(_logprobs, context, begin.num_top, outcome)
    begin.logprobs = logprobs if begin.num_top else []
    thinks = any(isinstance(one, Thought) for one in outcome.said)
    num_thought = await call(_num_thought, context, outcome) if thinks else 0
    reply = begin.reply = finished(begin.head, outcome, num_thought, logprobs, cancelled=cancelled)
    anew: dict[str, object] = {}
    if job.parked and begin.body is not None and not outcome.token_ids:
        extension = context.extension(begin.body.thaw)
        anew = {"anew": msgspec.to_builtins(msgspec.structs.replace(begin.body, thaw=extension))}
    return LedgerRow(
        kind=KIND, id=begin.id, namespace=context.tenant.namespace, point=outcome.point, parent=outcome.parent,
        status="parked" if job.parked and outcome.finish_reason == "abort" else str(reply["status"]),
        nbytes=outcome.nbytes,
        created=outcome.created,
        record={
            "reply": reply, "input": begin.input, "said": [piece.said for piece in outcome.pieces if piece.said],
            "pieces": [[piece.text, piece.token_ids, piece.said] for piece in outcome.pieces] if job.parked else [],
            "variables": begin.asked.variables,
            "note": begin.asked.note, "branch": begin.asked.branch, "num_top": begin.num_top, **anew,
        },
    )  # fmt: skip


def _num_thought(context: GatewayContext, outcome: RequestOutcome) -> int:
    """Tokens of its thoughts, as their text is tokenised."""
    thoughts = [one.text for one in outcome.said if isinstance(one, Thought)]
    return sum(len(context.codec.encode(text, first=False)) for text in thoughts)


def _logprobs(context: GatewayContext, num_top: int, outcome: RequestOutcome) -> list[dict[str, object]]:
    return token_logprobs(context.codec, outcome.token_ids, outcome.logprobs, outcome.top_logprobs, num_top)


async def restore(service: Service) -> int:
    """Go on with the responses that were parked when a gateway ended; how many. One that cannot be resumed has
    failed."""
    rows = await call(service.ledger.with_status, "parked")
    for row in rows:
        try:
            await (_anew(service, row) if "anew" in row.record else _restore(service, row))
        except (ThawError, ApiError) as error:
            why = error.code if isinstance(error, ApiError) else error.kind
            log.warning("%s was parked and cannot be resumed: %s", row.id, why)
            row.status, row.point = "failed", None
            await call(service.ledger.put, row)
    return len(rows)


async def _anew(service: Service, row: LedgerRow) -> None:
    """Begin one again that had said nothing yet: there is nothing in its session to continue with."""
    context = GatewayContext(service, service.tenants.of_namespace(row.namespace), "", {})
    begin = await _begin(context, msgspec.convert(row.record["anew"], ResponseCreate), row.id)
    begin.head["created_at"] = row.record["reply"]["created_at"]
    _own(context, begin, None)


async def _restore(service: Service, row: LedgerRow) -> None:
    record = row.record
    context = GatewayContext(service, service.tenants.of_namespace(row.namespace), "", {})
    at = await service.point(context.tenant, str(row.point))
    head = {**record["reply"], "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    head.pop("thaw")
    choice = _choice(context, head["tools"], head["tool_choice"], parallel=head["parallel_tool_calls"])
    conversation = await conversations.taken(context, head["conversation"])
    asked = Asked(
        at=at, resume=True, branch=record["branch"], note=record["note"], variables=record["variables"],
        tools=choice.shown, forced=choice.forced, single_call=choice.single, followed=True,
    )  # fmt: skip
    begin = Begin(
        id=row.id, asked=asked, head=head, input=record["input"], parent=row.parent, conversation=conversation,
        num_top=record["num_top"], store=True,
    )  # fmt: skip
    said = [
        SpokenPiece(text=text, token_ids=tuple(ids), said=tuple(_read(told))) for text, ids, told in record["pieces"]
    ]
    _own(context, begin, None, said)


# -- events


async def _live(context: GatewayContext, begin: Begin, job: ReplyJob, after: int = -1) -> AsyncIterator[bytes]:
    """The events of a job under way, those beyond number `after`."""
    async for some in _events(context, begin, job):
        yield b"".join(event(one, one["type"]) for one in some if one["sequence_number"] > after)


async def _events(context: GatewayContext, begin: Begin, job: ReplyJob) -> AsyncIterator[Iterable[Event]]:
    """Those that come together."""
    events = Events(begin.head)
    yield events.begin()
    told = begin.num_top == 0  # the likeliest tokens are known at the end
    async for pieces in job.follow():
        some: list[Event] = []
        for piece in pieces:
            logprobs = token_logprobs(context.codec, piece.token_ids, piece.logprobs) if told else []
            some += events.piece(piece.said, logprobs)
        yield some
    try:
        outcome = await asyncio.shield(job.outcome)
    except (ThawError, ApiError) as error:
        problem = error if isinstance(error, ApiError) else problem_of(error)
        yield events.failed(problem.code, problem.message)
        return
    if job.parked and begin.store and outcome.finish_reason == "abort":
        return
    assert begin.reply is not None
    yield events.end(begin.reply, begin.logprobs)


async def _again(context: GatewayContext, row: LedgerRow, after: int) -> AsyncIterator[bytes]:
    """The events of a response that is over, from what is kept of it, beyond number `after`."""
    for one in _told(row, after):
        if one["sequence_number"] > after:
            yield event(one, one["type"])


def _told(row: LedgerRow, after: int) -> Iterator[Event]:
    """One that came to nothing, or was cut by the gateway's end, has no more than its beginning and its last event, and
    that is always told: who followed it until then learns how it ended."""
    reply = row.record["reply"]
    head = {**reply, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    head.pop("thaw", None)
    events, shown = Events(head), _shown(row)
    yield from events.begin()
    if row.point is None:
        yield events.last("response.failed" if row.status == "failed" else "response.incomplete", shown, after)
        return
    for said in row.record.get("said", ()):
        yield from events.piece(_read(said), [])
    yield from events.end(shown)


def _read(told: list[Any]) -> list[Said]:
    return msgspec.convert(told, list[Said])


# -- what is stored


def _shown(row: LedgerRow) -> Event:
    """The object as it stands. One that a gateway left under way is incomplete, and says where it began."""
    reply: Event = row.record["reply"]
    if row.status == "parked":
        return reply
    if row.point is not None or row.status in ("queued", "in_progress"):
        return {**reply, "status": row.status}
    error = (
        {"code": "server_error", "message": "it failed before it generated anything; try again"}
        if row.status == "failed"
        else None
    )
    interrupted = {"reason": "interrupted"} if row.status == "incomplete" else None
    told = {"point": row.parent, "parent": row.parent}
    return {**reply, "status": row.status, "error": error, "incomplete_details": interrupted, "thaw": told}


async def retrieve(context: GatewayContext, request: Request, body: bytes) -> Response:
    id = request.path_params["id"]
    after = number(request, "starting_after", -1)
    job = context.service.jobs.get((context.tenant.namespace, id))
    row = await _row(context, id)
    if row.status in UNDER_WAY and job is None and (context.tenant.namespace, id) not in context.service.jobs:
        row = await _row(context, id)
        row.status = "failed" if row.status in UNDER_WAY else row.status
    if request.query_params.get("stream", "").lower() in ("true", "1"):
        if job is not None and isinstance(job.about, Begin):
            return EventStream(_live(context, job.about, job, after), lambda: None)
        return EventStream(_again(context, row, after), lambda: None)
    headers = {"x-thaw-point": row.point} if row.point else {}
    return as_json(_shown(row), headers=headers)


async def delete(context: GatewayContext, request: Request, body: bytes) -> Response:
    row = await _row(context, request.path_params["id"])
    job = context.service.jobs.get((row.namespace, row.id))
    if job is not None:
        job.forgotten = True
        job.stop()
    await call(context.service.ledger.delete, row.namespace, KIND, row.id)
    return as_json({"id": row.id, "object": "response", "deleted": True})


async def cancel(context: GatewayContext, request: Request, body: bytes) -> Response:
    row = await _row(context, request.path_params["id"])
    if not row.record["reply"]["background"]:
        raise ApiError(
            400, f"{row.id} does not run in the background; close its connection to cancel it", param="response_id"
        )
    job = context.service.jobs.get((row.namespace, row.id))
    if job is not None:
        job.stop()
        await asyncio.wait([job.task])
        row = await _row(context, row.id)
    return as_json(_shown(row))


async def input_items(context: GatewayContext, request: Request, body: bytes) -> Response:
    row = await _row(context, request.path_params["id"])
    return as_json(listed(request, row.record["input"]))
