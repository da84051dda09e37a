"""A response as OpenAI's Responses API shows it: the object, its items, and its events.

`Events` is a pure function of the response's head and its pieces, so that a stream can be repeated, with the same
numbers, from what is kept of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from thaw.gateway.asked import RequestOutcome
from thaw.gateway.dialects.client_tools import ClientTool, client_tools
from thaw.gateway.speech import Said, Text, Thought, ToolCall

Event = dict[str, Any]
CALL_EVENTS = {
    "function_call": ("arguments", "response.function_call_arguments"),
    "custom_tool_call": ("input", "response.custom_tool_call_input"),
}
"""Of a call's item: the field that is streamed, and how its events begin."""
STATUSES = {"stop": "completed", "length": "incomplete", "abort": "incomplete"}


def usage_of(outcome: RequestOutcome, num_thought: int) -> dict[str, object]:
    """OpenAI's input tokens include those that were cached. `num_thought`: tokens of its thoughts."""
    generated = len(outcome.token_ids)
    return {
        "input_tokens": outcome.num_prompt,
        "input_tokens_details": {
            "cached_tokens": outcome.num_cached,
            "cache_write_tokens": outcome.num_prompt - outcome.num_cached,
        },
        "output_tokens": generated,
        "output_tokens_details": {"reasoning_tokens": num_thought},
        "total_tokens": outcome.num_prompt + generated,
    }


def finished(head: Event, outcome: RequestOutcome, num_thought: int, logprobs: list[Any], *, cancelled: bool) -> Event:
    """The object once its commit is on disk."""
    status = "cancelled" if cancelled else STATUSES[outcome.finish_reason]
    reason = {"length": "max_output_tokens"}.get(outcome.finish_reason)
    return {
        **head,
        "status": status,
        "incomplete_details": {"reason": reason} if status == "incomplete" else None,
        "output": items_of(head, outcome.said, status, logprobs),
        "usage": usage_of(outcome, num_thought),
        "thaw": outcome.told,
    }


def items_of(head: Event, said: Sequence[Said], status: str, logprobs: list[Any]) -> list[Event]:
    shown, tools = "completed" if status == "completed" else "incomplete", client_tools(head["tools"])
    return [_item(head["id"], i, one, shown, logprobs, tools) for i, one in enumerate(said or [Text("")])]


def _item(id: str, number: int, said: Said, status: str, logprobs: list[Any], tools: Mapping[str, ClientTool]) -> Event:
    if isinstance(said, Text):
        return _message(id, number, [_part(said.text, logprobs)], status)
    if isinstance(said, Thought):
        return _reasoning(id, number, [_thought(said.text)], status)
    return _call(id, number, said, status, tools)


def _message(id: str, number: int, content: list[Event], status: str) -> Event:
    key = id.removeprefix("resp_")
    return {"id": f"msg_{key}_{number}", "type": "message", "role": "assistant", "status": status, "content": content}


def _reasoning(id: str, number: int, content: list[Event], status: str) -> Event:
    return {
        "id": f"rs_{id.removeprefix('resp_')}_{number}", "type": "reasoning", "summary": [], "content": content,
        "encrypted_content": None, "status": status,
    }  # fmt: skip


def _thought(text: str) -> Event:
    return {"type": "reasoning_text", "text": text}


def _call(id: str, number: int, call: ToolCall, status: str, tools: Mapping[str, ClientTool]) -> Event:
    key = f"{id.removeprefix('resp_')}_{number}"
    tool = tools.get(call.name) or ClientTool("function", call.name, None, {})
    return tool.item(key, f"call_{key}", call.arguments, status)


def _part(text: str, logprobs: list[Any]) -> Event:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


class Events:
    """The events of one response, in order, each with its number."""

    def __init__(self, head: Event) -> None:
        self._head = head
        self._id: str = head["id"]
        self._tools = client_tools(head["tools"])
        self._number = 0
        self._items = 0
        self._text: str | None = None
        """Of the message or thought that is open."""
        self._thinks = False
        self._logprobs: list[Any] = []

    def begin(self) -> Iterator[Event]:
        if self._head.get("background"):
            yield self._event("response.queued", response={**self._head, "status": "queued"})
        yield self._event("response.created", response=self._head)
        yield self._event("response.in_progress", response=self._head)

    def piece(self, all_said: Sequence[Said], logprobs: list[Any]) -> Iterator[Event]:
        for said in all_said:
            yield from self._said(said, logprobs)
            logprobs = []

    def end(self, response: Event, logprobs: Sequence[Any] = ()) -> Iterator[Event]:
        """`logprobs`: those that were not told with the pieces."""
        if self._text is None and not self._items:
            yield from self._open()
        self._logprobs += logprobs
        status = "completed" if response["status"] == "completed" else "incomplete"
        yield from self._close(status)
        kind = {"completed": "response.completed", "failed": "response.failed"}.get(
            response["status"], "response.incomplete"
        )
        yield self._event(kind, response=response)

    def failed(self, code: str, message: str) -> Iterator[Event]:
        error = {"code": "server_error", "message": f"{code}: {message}"}
        yield self._event("response.failed", response={**self._head, "status": "failed", "error": error})

    def last(self, kind: str, response: Event, after: int) -> Event:
        """The last event, with a number beyond `after`."""
        self._number = max(self._number, after + 1)
        return self._event(kind, response=response)

    def _said(self, said: Said, logprobs: list[Any]) -> Iterator[Event]:
        if isinstance(said, ToolCall):
            yield from self._close("completed")
            yield from self._call(said)
            return
        thinks = isinstance(said, Thought)
        if self._text is not None and thinks != self._thinks:
            yield from self._close("completed")
        if self._text is None:
            yield from self._open(thinks=thinks)
        assert self._text is not None
        self._text += said.text
        if thinks:
            yield self._of_part("response.reasoning_text.delta", delta=said.text)
            return
        self._logprobs += logprobs
        yield self._of_part("response.output_text.delta", delta=said.text, logprobs=logprobs)

    def _open(self, *, thinks: bool = False) -> Iterator[Event]:
        self._text, self._thinks, self._logprobs = "", thinks, []
        item = self._item([], "in_progress")
        yield self._event("response.output_item.added", output_index=self._items, item=item)
        yield self._of_part("response.content_part.added", part=_thought("") if thinks else _part("", []))

    def _item(self, content: list[Event], status: str) -> Event:
        """The one that is open."""
        return (_reasoning if self._thinks else _message)(self._id, self._items, content, status)

    def _close(self, status: str) -> Iterator[Event]:
        if self._text is None:
            return
        if self._thinks:
            part = _thought(self._text)
            yield self._of_part("response.reasoning_text.done", text=self._text)
        else:
            part = _part(self._text, self._logprobs)
            yield self._of_part("response.output_text.done", text=self._text, logprobs=self._logprobs)
        yield self._of_part("response.content_part.done", part=part)
        yield self._done(self._item([part], status))
        self._text = None

    def _call(self, call: ToolCall) -> Iterator[Event]:
        item = _call(self._id, self._items, call, "completed", self._tools)
        kind = CALL_EVENTS.get(item["type"])
        begun = {**item, "status": "in_progress"} | ({} if kind is None else {kind[0]: ""})
        yield self._event("response.output_item.added", output_index=self._items, item=begun)
        if kind is not None:
            field, name = kind
            where = {"item_id": item["id"], "output_index": self._items}
            named = {"name": item["name"]} if field == "arguments" else {}
            yield self._event(f"{name}.delta", **where, delta=item[field])
            yield self._event(f"{name}.done", **where, **named, **{field: item[field]})
        yield self._done(item)

    def _done(self, item: Event) -> Event:
        done = self._event("response.output_item.done", output_index=self._items, item=item)
        self._items += 1
        return done

    def _of_part(self, kind: str, **more: Any) -> Event:
        item = self._item([], "")["id"]
        return self._event(kind, item_id=item, output_index=self._items, content_index=0, **more)

    def _event(self, kind: str, **more: Any) -> Event:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **more}
