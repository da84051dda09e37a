"""A response as OpenAI's Responses API shows it: the object, its items, and its events.

`Events` is a pure function of the response's head and its deltas, so that a stream can be repeated, with the same
numbers, from what is kept of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from thaw.gateway.asked import RequestOutcome
from thaw.gateway.speech import Reader, Said, Text, ToolCall, read_all

Event = dict[str, Any]
STATUSES = {"stop": "completed", "length": "incomplete", "abort": "incomplete"}


def usage_of(outcome: RequestOutcome) -> dict[str, object]:
    """OpenAI's input tokens include those that were cached."""
    generated = len(outcome.token_ids)
    return {
        "input_tokens": outcome.num_prompt,
        "input_tokens_details": {
            "cached_tokens": outcome.num_cached,
            "cache_write_tokens": outcome.num_prompt - outcome.num_cached,
        },
        "output_tokens": generated,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": outcome.num_prompt + generated,
    }


def finished(head: Event, outcome: RequestOutcome, reader: Reader, logprobs: list[Any], *, cancelled: bool) -> Event:
    """The object once its commit is on disk."""
    status = "cancelled" if cancelled else STATUSES[outcome.finish_reason]
    reason = {"length": "max_output_tokens"}.get(outcome.finish_reason)
    return {
        **head,
        "status": status,
        "incomplete_details": {"reason": reason} if status == "incomplete" else None,
        "output": items_of(head["id"], read_all(reader, outcome.text), status, logprobs),
        "usage": usage_of(outcome),
        "thaw": outcome.told,
    }


def items_of(id: str, said: Sequence[Said], status: str, logprobs: list[Any]) -> list[Event]:
    shown = "completed" if status == "completed" else "incomplete"
    return [_item(id, i, one, shown, logprobs) for i, one in enumerate(said or [Text("")])]


def _item(id: str, number: int, said: Said, status: str, logprobs: list[Any]) -> Event:
    if isinstance(said, Text):
        return _message(id, number, [_part(said.text, logprobs)], status)
    return _function_call(id, number, said.name, said.arguments, status)


def _message(id: str, number: int, content: list[Event], status: str) -> Event:
    key = id.removeprefix("resp_")
    return {"id": f"msg_{key}_{number}", "type": "message", "role": "assistant", "status": status, "content": content}


def _function_call(id: str, number: int, name: str, arguments: str, status: str) -> Event:
    key = id.removeprefix("resp_")
    return {
        "id": f"fc_{key}_{number}", "type": "function_call", "call_id": f"call_{key}_{number}", "name": name,
        "arguments": arguments, "status": status,
    }  # fmt: skip


def _part(text: str, logprobs: list[Any]) -> Event:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


class Events:
    """The events of one response, in order, each with its number."""

    def __init__(self, head: Event, reader: Callable[[], Reader]) -> None:
        self._head, self._reader = head, reader()
        self._id: str = head["id"]
        self._number = 0
        self._items = 0
        self._text: str | None = None
        """Of the message that is open."""
        self._logprobs: list[Any] = []

    def begin(self) -> Iterator[Event]:
        if self._head.get("background"):
            yield self._event("response.queued", response={**self._head, "status": "queued"})
        yield self._event("response.created", response=self._head)
        yield self._event("response.in_progress", response=self._head)

    def piece(self, text: str, logprobs: list[Any]) -> Iterator[Event]:
        """One delta of the engine's."""
        for said in self._reader.push(text):
            yield from self._said(said, logprobs)

    def end(self, response: Event) -> Iterator[Event]:
        for said in self._reader.end():
            yield from self._said(said, [])
        if self._text is None and not self._items:
            yield from self._open()
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
        if self._text is None:
            yield from self._open()
        assert self._text is not None
        self._text += said.text
        self._logprobs += logprobs
        yield self._of_part("response.output_text.delta", delta=said.text, logprobs=logprobs)

    def _open(self) -> Iterator[Event]:
        self._text, self._logprobs = "", []
        item = _message(self._id, self._items, [], "in_progress")
        yield self._event("response.output_item.added", output_index=self._items, item=item)
        yield self._of_part("response.content_part.added", part=_part("", []))

    def _close(self, status: str) -> Iterator[Event]:
        if self._text is None:
            return
        part = _part(self._text, self._logprobs)
        yield self._of_part("response.output_text.done", text=self._text, logprobs=self._logprobs)
        yield self._of_part("response.content_part.done", part=part)
        yield self._done(_message(self._id, self._items, [part], status))
        self._text = None

    def _call(self, call: ToolCall) -> Iterator[Event]:
        item = _function_call(self._id, self._items, call.name, call.arguments, "completed")
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=self._items, item=begun)
        where = {"item_id": item["id"], "output_index": self._items}
        yield self._event("response.function_call_arguments.delta", **where, delta=call.arguments)
        yield self._event("response.function_call_arguments.done", **where, name=call.name, arguments=call.arguments)
        yield self._done(item)

    def _done(self, item: Event) -> Event:
        done = self._event("response.output_item.done", output_index=self._items, item=item)
        self._items += 1
        return done

    def _of_part(self, kind: str, **more: Any) -> Event:
        item = _message(self._id, self._items, [], "")["id"]
        return self._event(kind, item_id=item, output_index=self._items, content_index=0, **more)

    def _event(self, kind: str, **more: Any) -> Event:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **more}
