"""Input items of the Responses API, as messages, and as items that are listed again."""

from __future__ import annotations

from typing import Any

from thaw.engines.base import Message
from thaw.gateway.dialects.client_tools import arguments_of_item
from thaw.gateway.dialects.common import call_of, content_of, message_of
from thaw.gateway.problems import invalid, unsupported

Item = dict[str, Any]


def items(given: str | list[Any], id: str) -> list[Item]:
    """The items with what the API adds to them: a type and an id each."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    return [_item(one, i, id) for i, one in enumerate(given)]


def _item(one: Any, number: int, id: str) -> Item:
    if not isinstance(one, dict):
        raise invalid(f"input[{number}]", "an item is an object")
    item: Item = {"type": "message", "id": f"in_{id.removeprefix('resp_')}_{number}"}
    item |= {name: value for name, value in one.items() if value is not None}
    if item["type"] == "message" and isinstance(item.get("content"), str):
        kind = "output_text" if item.get("role") == "assistant" else "input_text"
        item["content"] = [{"type": kind, "text": item["content"]}]
    return item


def messages(found: list[Item]) -> tuple[Message, ...]:
    """What they say, in order. Calls of tools belong to the answer before them. Raises `ApiError`."""
    out: list[Message] = []
    for i, item in enumerate(found):
        kind = item["type"]
        if not isinstance(kind, str) or kind not in _KINDS:
            raise unsupported(f"input[{i}]", f"an item of type {str(kind)[:40]!r}; it is {', '.join(_KINDS)}")
        _KINDS[kind](out, item, f"input[{i}]")
    return tuple(out)


def _message(out: list[Message], item: Item, where: str) -> None:
    out.append(message_of(item, where))


def _call(out: list[Message], item: Item, where: str) -> None:
    named = isinstance(item.get("name"), str) or item["type"] == "local_shell_call"
    if not isinstance(item.get("call_id"), str) or not named:
        raise invalid(where, f"a {item['type']} needs a call_id and a name")
    call = call_of(item["call_id"], *arguments_of_item(item))
    if out and out[-1]["role"] == "assistant":
        calls = out[-1].get("tool_calls", [])
        assert isinstance(calls, list)
        out[-1] = {**out[-1], "tool_calls": [*calls, call]}
    else:
        out.append({"role": "assistant", "tool_calls": [call]})


def _call_output(out: list[Message], item: Item, where: str) -> None:
    content = content_of(item.get("output", ""), f"{where}.output")
    id = item.get("call_id") or item.get("id", "")
    out.append({"role": "tool", "tool_call_id": str(id), "content": content or ""})


def _thought(out: list[Message], item: Item, where: str) -> None:
    """What was thought before an earlier answer is no part of the conversation that follows it."""


_KINDS = {
    "message": _message, "function_call": _call, "function_call_output": _call_output, "reasoning": _thought,
    "custom_tool_call": _call, "custom_tool_call_output": _call_output, "local_shell_call": _call,
    "local_shell_call_output": _call_output,
}  # fmt: skip
