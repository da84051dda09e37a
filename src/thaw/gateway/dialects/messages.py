"""Anthropic's Messages: `/v1/messages` and its `count_tokens`. It has no ids: the conversation's tokens say where to go
on from. Marks of caches, and the billing line that some clients put first, are taken out before anything is rendered.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from thaw.core.errors import ThawError
from thaw.core.sampling import Sampling
from thaw.engines.base import Message
from thaw.gateway.asked import Asked, RequestBegun, RequestOutcome
from thaw.gateway.context import GatewayContext
from thaw.gateway.dialects.choice import ChosenTools, chosen
from thaw.gateway.dialects.common import (
    Extension,
    SamplingFields,
    call_of,
    check_model,
    constrained,
    effort_of,
    sampling_of,
    structured,
    tools_of,
    unread_of,
)
from thaw.gateway.fields import Fields
from thaw.gateway.job import ReplyJob
from thaw.gateway.problems import ApiError, invalid, problem_of, unsupported
from thaw.gateway.reply import EventStream, as_json, begun, event, headers_of, outcomes_of
from thaw.gateway.speech import Said, Text, Thought, ToolCall

BILLING = "x-anthropic-billing-header:"
IGNORED = frozenset({"metadata", "service_tier", "inference_geo", "user_profile_id", "workspace_id", "betas", "speed",
                     "diagnostics", "cache_control"})  # fmt: skip
UNREAD = ("cache_control", "eager_input_streaming", "strict", "input_examples", "allowed_callers")
"""Of a tool: what no template reads."""
SIGNATURE = "thaw"
"""Of thinking blocks: clients send them back with it, and it says nothing."""
CHOICES = {"auto": "auto", "any": "required", "none": "none", "tool": ""}
HOW_LONG = ("budget_tokens", "display")
"""Of thinking: what templates do not get."""
TYPES = {"authentication_error", "permission_error", "not_found_error", "request_too_large", "rate_limit_error",
         "api_error", "overloaded_error"}  # fmt: skip


class OutputConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    effort: str | None = None
    format: dict[str, Any] | None = None


class ContextManagement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    edits: tuple[dict[str, Any], ...] = ()


class Prompt(SamplingFields, kw_only=True):
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: dict[str, Any] = msgspec.field(default_factory=lambda: {"type": "auto"})
    thinking: dict[str, Any] | None = None
    output_config: OutputConfig = OutputConfig()
    output_format: dict[str, Any] | None = None
    context_management: ContextManagement = ContextManagement()


class MessageCreate(Prompt, kw_only=True):
    max_tokens: int
    stop_sequences: tuple[str, ...] = ()
    stream: bool = False


IDLE: dict[str, tuple[object, ...]] = {"mcp_servers": ([],)}
FIELDS = Fields(taken=MessageCreate, ignored=IGNORED, idle=IDLE)
COUNT_FIELDS = Fields(taken=Prompt, ignored=IGNORED, idle=IDLE)


async def create(context: GatewayContext, request: Request, body: bytes) -> Response:
    asked, ignored = FIELDS.read(body)
    check_model(asked.model, context.service.served)
    if asked.max_tokens < 1:
        raise invalid("max_tokens", f"{asked.max_tokens}; at least 1")
    extension = context.extension(asked.thaw)
    base = await _asked(context, asked, extension, ignored)
    sampling = constrained(_sampling(context, asked), base.sampling.structured_outputs)
    followed = base.followed or asked.stream
    base = msgspec.structs.replace(base, sampling=sampling, max_tokens=asked.max_tokens, followed=followed)
    jobs = await context.service.start(context.tenant, [base])
    id = f"msg_{secrets.token_hex(16)}"
    context.note(response=id)
    if asked.stream:
        await begun(jobs)
        headers = headers_of(ignored, parent=jobs[0].begun.result().parent)
        return EventStream(_stream(context, id, jobs[0]), jobs[0].stop, headers)
    outcomes = await outcomes_of(request, jobs)
    return as_json(_whole(context, id, outcomes[0]), headers=headers_of(ignored, outcomes))


def _sampling(context: GatewayContext, asked: MessageCreate) -> Sampling:
    return sampling_of(asked, context.service.engine, stop=list(asked.stop_sequences))


async def count_tokens(context: GatewayContext, request: Request, body: bytes) -> Response:
    asked, ignored = COUNT_FIELDS.read(body)
    check_model(asked.model, context.service.served)
    base = await _asked(context, asked, Extension(), ignored)
    number = await context.service.count(context.tenant, base)
    return as_json({"input_tokens": number}, headers=headers_of(ignored))


async def _asked(context: GatewayContext, body: Prompt, extension: Extension, ignored: list[str]) -> Asked:
    if not body.messages:
        raise invalid("messages", "there is nothing to answer")
    _unedited(body.context_management, ignored)
    ignored += unread_of(body.tools, UNREAD)
    listed = {str(tool.get("name")): _tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)}
    found = [one for i, message in enumerate(body.messages) for one in _messages(message, f"messages[{i}]", listed)]
    tools = tools_of([listed[str(tool.get("name"))] for tool in body.tools if not tool.get("defer_loading")])
    choice = _choice(context, body.tool_choice, tools)
    return Asked(
        messages=tuple(found),
        at=await context.at(extension),
        instructions=_system(body.system),
        tools=choice.shown,
        forced=choice.forced,
        single_call=choice.single,
        sampling=constrained(_formatted(context, body), choice.schema()),
        followed=choice.single,
        variables=effort_of(body.output_config.effort, "output_config.effort") | _thinking(body.thinking, ignored),
        keep_sampled=extension.keep_sampled,
        continue_final_message=found[-1]["role"] == "assistant" and not found[-1].get("tool_calls"),
        branch=extension.branch,
        note=extension.note or "message",
        policy=extension.policy,
    )


def _formatted(context: GatewayContext, body: Prompt) -> Sampling:
    format = body.output_config.format or body.output_format
    found = structured(format, "output_config.format", context.service.engine)
    return constrained(Sampling(), None if found is None else found["json"])


def _unedited(given: ContextManagement, ignored: list[str]) -> None:
    """Thoughts of earlier answers are never rendered here, so clearing them changes nothing."""
    for i, edit in enumerate(given.edits):
        kind = str(edit.get("type"))
        if not kind.startswith("clear_thinking"):
            raise unsupported(f"context_management.edits[{i}]", f"{kind[:40]!r} is not supported; edit the messages")
        ignored.append(f"context_management.{kind}")


def _choice(context: GatewayContext, given: dict[str, Any], tools: tuple[Message, ...]) -> ChosenTools:
    """Anthropic's words for it."""
    kind = given.get("type")
    if kind not in CHOICES or (kind == "tool" and not isinstance(given.get("name"), str)):
        raise invalid("tool_choice", "its type is auto, any, none, or tool with a name")
    choice = {"type": "function", "name": given["name"]} if kind == "tool" else CHOICES[kind]
    parallel = not given.get("disable_parallel_tool_use", False)
    return chosen(tools, choice, context.service.engine, parallel=parallel)


def _thinking(given: dict[str, Any] | None, ignored: list[str]) -> dict[str, object]:
    """Whether to think is the template variable `enable_thinking`. No template takes a limit for thinking."""
    kind = None if given is None else given.get("type")
    if given is None:
        return {}
    if kind not in ("enabled", "adaptive", "disabled"):
        raise invalid("thinking", "its type is enabled, adaptive or disabled")
    for name in given.keys() - {"type"}:
        if name not in HOW_LONG:
            raise unsupported(f"thinking.{name[:40]}", "it is unknown; leave it out")
        ignored.append(f"thinking.{name}")
    return {"enable_thinking": kind != "disabled"}


def _system(given: str | list[dict[str, Any]] | None) -> str | None:
    """The system's text, without a billing line: it changes with every request, and would make every prefix new."""
    if given is None:
        return None
    blocks = [given] if isinstance(given, str) else [_text(block, f"system[{i}]") for i, block in enumerate(given)]
    kept = [block for block in blocks if not block.lstrip().startswith(BILLING)]
    return "\n".join(kept) or None


def _text(block: Any, where: str) -> str:
    if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
        kind = block.get("type") if isinstance(block, dict) else type(block).__name__
        raise unsupported(where, f"a block of type {str(kind)[:40]!r}; only text is supported")
    text: str = block["text"]
    return text


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type", "custom") != "custom":
        raise unsupported(where, f"a tool of type {str(tool['type'])[:40]!r}; only client tools are supported")
    unknown = tool.keys() - {"name", "description", "input_schema", "type", "defer_loading", *UNREAD}
    if unknown:
        raise unsupported(f"{where}.{min(unknown)[:40]}", "it is unknown; leave it out")
    function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
    if tool.get("description"):
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


# -- messages


def _messages(message: Any, where: str, tools: Mapping[str, dict[str, Any]]) -> Iterator[Message]:
    """What one of Anthropic's messages is in OpenAI's shape: results of tools are messages of their own."""
    role = message.get("role")
    if role not in ("user", "assistant", "system"):
        raise invalid(f"{where}.role", "user, assistant or system")
    content = message.get("content")
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    if not isinstance(content, list):
        raise invalid(f"{where}.content", "a string or a list of blocks")
    if role == "assistant":
        yield _answer(content, where)
        return
    texts: list[str] = []
    for i, block in enumerate(content):
        if isinstance(block, dict) and block.get("type") == "tool_result":
            yield _result(block, f"{where}.content[{i}]", tools)
        else:
            texts.append(_text(block, f"{where}.content[{i}]"))
    if texts or not content:
        yield {"role": role, "content": _joined(texts)}


def _joined(texts: Sequence[str]) -> object:
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts] or ""


def _result(block: dict[str, Any], where: str, tools: Mapping[str, dict[str, Any]]) -> Message:
    content = block.get("content", "")
    if isinstance(content, list):
        content = _joined([_told(one, f"{where}.content[{i}]", tools) for i, one in enumerate(content)])
    return {"role": "tool", "tool_call_id": str(block.get("tool_use_id", "")), "content": content}


def _told(block: Any, where: str, tools: Mapping[str, dict[str, Any]]) -> str:
    """Text. A reference to a tool that was deferred becomes the tool, here, so that the prompt before it stays."""
    if not isinstance(block, dict) or block.get("type") != "tool_reference":
        return _text(block, where)
    tool = tools.get(str(block.get("tool_name")))
    if tool is None:
        raise invalid(where, f"there is no tool {str(block.get('tool_name'))[:80]!r}")
    return json.dumps(tool, ensure_ascii=False)


def _answer(content: list[Any], where: str) -> Message:
    """What was thought before an earlier answer is left out, as templates do."""
    texts, calls = [], []
    for i, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind in ("thinking", "redacted_thinking"):
            continue
        if kind == "tool_use":
            arguments = json.dumps(block.get("input", {}), ensure_ascii=False)
            calls.append(call_of(str(block.get("id", "")), str(block.get("name", "")), arguments))
        else:
            texts.append(_text(block, f"{where}.content[{i}]"))
    answer: Message = {"role": "assistant"}
    if texts or not calls:
        answer["content"] = _joined(texts)
    return answer | ({"tool_calls": calls} if calls else {})


# -- replies


def error_of(problem: ApiError) -> dict[str, object]:
    kind = problem.kind if problem.kind in TYPES else "invalid_request_error"
    return {"type": kind, "message": problem.message}


def _usage(num_prompt: int, num_cached: int, num_said: int) -> dict[str, object]:
    """Anthropic's input tokens leave out those that were cached."""
    return {
        "input_tokens": num_prompt - num_cached, "cache_read_input_tokens": num_cached,
        "cache_creation_input_tokens": 0, "output_tokens": num_said,
    }  # fmt: skip


def _ending(outcome: RequestOutcome, *, called: bool) -> dict[str, object]:
    reason: str | None = {"length": "max_tokens", "abort": None}.get(outcome.finish_reason, "end_turn")
    sequence = outcome.stop_reason if isinstance(outcome.stop_reason, str) else None
    if sequence is not None:
        reason = "stop_sequence"
    if called:
        reason = "tool_use"
    return {"stop_reason": reason, "stop_sequence": sequence}


def _block(id: str, number: int, said: Said) -> dict[str, object]:
    if isinstance(said, Text):
        return {"type": "text", "text": said.text}
    if isinstance(said, Thought):
        return {"type": "thinking", "thinking": said.text, "signature": SIGNATURE}
    return {**_tool_use(id, number, said), "input": _input(said.arguments)}


def _input(arguments: str) -> object:
    """An object; what an engine's parser left unfinished has none."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _tool_use(id: str, number: int, call: ToolCall) -> dict[str, object]:
    return {"type": "tool_use", "id": f"toolu_{id.removeprefix('msg_')}_{number}", "name": call.name, "input": {}}


def _whole(context: GatewayContext, id: str, outcome: RequestOutcome) -> dict[str, object]:
    content = [_block(id, i, one) for i, one in enumerate(outcome.said)]
    called = any(isinstance(one, ToolCall) for one in outcome.said)
    return {
        "id": id, "type": "message", "role": "assistant", "model": context.service.model, "content": content,
        **_ending(outcome, called=called),
        "usage": _usage(outcome.num_prompt, outcome.num_cached, len(outcome.token_ids)), "thaw": outcome.told,
    }  # fmt: skip


# -- streams


async def _stream(context: GatewayContext, id: str, job: ReplyJob) -> AsyncIterator[bytes]:
    blocks = _Blocks(id)
    yield _event(_start(context, id, job.begun.result()))
    try:
        async for pieces in job.follow():
            yield b"".join(_event(one) for piece in pieces for one in blocks.piece(piece.said))
        outcome = await asyncio.shield(job.outcome)
    except (ThawError, ApiError) as error:
        problem = error if isinstance(error, ApiError) else problem_of(error)
        yield _event({"type": "error", "error": error_of(problem)})
        return
    for one in blocks.end():
        yield _event(one)
    usage = _usage(outcome.num_prompt, outcome.num_cached, len(outcome.token_ids))
    ending = _ending(outcome, called=blocks.called)
    yield _event({"type": "message_delta", "delta": ending, "usage": usage, "thaw": outcome.told})
    yield _event({"type": "message_stop"})


def _event(value: dict[str, object]) -> bytes:
    return event(value, str(value["type"]))


def _start(context: GatewayContext, id: str, begun: RequestBegun) -> dict[str, object]:
    """With counts as planned; the engine's own come at the end."""
    known = min(begun.num_known, begun.num_prompt_tokens)
    message: dict[str, object] = {
        "id": id, "type": "message", "role": "assistant", "model": context.service.model, "content": [],
        "stop_reason": None, "stop_sequence": None, "usage": _usage(begun.num_prompt_tokens, known, 0),
    }  # fmt: skip
    return {"type": "message_start", "message": message}


class _Blocks:
    """Content blocks of a stream, one open at a time."""

    def __init__(self, id: str) -> None:
        self._id = id
        self._number = 0
        self._open: str | None = None
        """The type of the block that is open."""
        self.called = False

    def piece(self, all_said: Sequence[Said]) -> Iterator[dict[str, object]]:
        for said in all_said:
            yield from self._said(said)

    def end(self) -> Iterator[dict[str, object]]:
        yield from self._close()

    def _said(self, said: Said) -> Iterator[dict[str, object]]:
        if isinstance(said, Text):
            yield from self._within("text", {"text": ""})
            yield self._of("content_block_delta", delta={"type": "text_delta", "text": said.text})
            return
        if isinstance(said, Thought):
            yield from self._within("thinking", {"thinking": "", "signature": ""})
            yield self._of("content_block_delta", delta={"type": "thinking_delta", "thinking": said.text})
            return
        yield from self._close()
        self.called, self._open = True, "tool_use"
        yield self._of("content_block_start", content_block=_tool_use(self._id, self._number, said))
        yield self._of("content_block_delta", delta={"type": "input_json_delta", "partial_json": said.arguments})
        yield from self._close()

    def _within(self, kind: str, empty: dict[str, object]) -> Iterator[dict[str, object]]:
        if self._open != kind:
            yield from self._close()
            self._open = kind
            yield self._of("content_block_start", content_block={"type": kind, **empty})

    def _close(self) -> Iterator[dict[str, object]]:
        if self._open == "thinking":
            yield self._of("content_block_delta", delta={"type": "signature_delta", "signature": SIGNATURE})
        if self._open is not None:
            yield self._of("content_block_stop")
            self._open = None
            self._number += 1

    def _of(self, kind: str, **more: object) -> dict[str, object]:
        return {"type": kind, "index": self._number, **more}
