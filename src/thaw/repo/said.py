"""Whether a model's chat template prints all that it is given: what it leaves out, the model would not see.

A template is a program. It is asked: marks stand in for what messages say (parts of text, functions that are called,
their arguments) and for the names of tools, and must come out. One that refuses them, since it reads the words, is
asked about less at a time, in the end about one thing with its words left beside the mark.

Not asked about is what templates leave out on purpose: thinking, names and ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from thaw.core.errors import InvalidRequest
from thaw.engines.base import Message
from thaw.engines.content import TEXTS, read_arguments
from thaw.repo.marks import Marks

Render = Callable[[Sequence[Message], Sequence[Message]], str]
"""Messages and tools as the template says them. Raises `InvalidRequest` where it refuses."""
Put = Callable[[str, Any], Any]
"""What is to stand in place of a value, which is told with words for what it is."""
MAX_DEPTH = 64
"""Of arguments: what is nested deeper is not asked about."""


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """A text or a number that is to be said. `message`: the number of the message; None: it is the name of a tool."""

    message: int | None
    what: str
    value: str | int | float


def left_out(
    messages: Sequence[Message], tools: Sequence[Message], render: Render, text: str, marks: Marks
) -> Said | None:
    """The first that the template leaves out. `text`: what `render` gives of them, in which no mark stands."""
    asked = _Asked(messages, tools, render, text, marks)
    return next(asked.left_out(range(len(asked.all))), None)


class _Asked:
    def __init__(
        self, messages: Sequence[Message], tools: Sequence[Message], render: Render, text: str, marks: Marks
    ) -> None:
        self._messages, self._tools, self._render, self._text, self._marks = messages, tools, render, text, marks
        self.all: list[Said] = []
        self._with(self._note)

    def left_out(self, some: Sequence[int]) -> Iterator[Said]:
        """Those of `some`, numbers in `all`, that are not said."""
        found = self._found(some, _instead)
        if found is None and len(some) > 1:
            half = len(some) // 2
            yield from self.left_out(some[:half])
            yield from self.left_out(some[half:])
            return
        for number in some:
            if number not in (found or ()) and not self._is_said_alone(number):
                yield self.all[number]

    def _is_said_alone(self, number: int) -> bool:
        answers = [self._found([number], beside) for beside in (_instead, _behind, _before)]
        if any(answers):
            return True
        return all(found is None for found in answers) and str(self.all[number].value).strip() in self._text

    def _found(self, some: Sequence[int], shape: Callable[[Any, str], Any]) -> set[int] | None:
        """Which marks come out where those of `some` are put in; None where the template refuses."""
        numbers, chosen = iter(range(len(self.all))), set(some)

        def put(message: int | None, what: str, value: Any) -> Any:
            number = next(numbers)
            return shape(value, self._marks.of(number)) if number in chosen else value

        try:
            return self._marks.found(self._render(*self._with(put)))
        except InvalidRequest:
            return None

    def _note(self, message: int | None, what: str, value: Any) -> Any:
        self.all.append(Said(message=message, what=what, value=value))
        return value

    def _with(self, put: Callable[[int | None, str, Any], Any]) -> tuple[list[Message], list[Message]]:
        """The messages and tools, with what `put` gives for each of `all`, in order."""
        messages = [_message(message, partial(put, i)) for i, message in enumerate(self._messages)]
        return messages, [_tool(tool, partial(put, None)) for tool in self._tools]


def _instead(value: Any, mark: str) -> Any:
    return mark if isinstance(value, str) else int(mark)


def _behind(value: Any, mark: str) -> Any:
    return f"{value}{mark}" if isinstance(value, str) else int(mark)


def _before(value: Any, mark: str) -> Any:
    return f"{mark}{value}" if isinstance(value, str) else int(mark)


# -- what says something


def _message(message: Message, put: Put) -> Message:
    changed = dict(message)
    content = message.get("content")
    if isinstance(content, list):
        names = ["text"] if len(content) == 1 else [f"part {i}" for i in range(len(content))]
        changed["content"] = [_part(part, name, put) for part, name in zip(content, names, strict=True)]
    elif content and isinstance(content, str):
        changed["content"] = put("text", content)
    if isinstance(refusal := message.get("refusal"), str) and refusal:
        changed["refusal"] = put("refusal", refusal)
    if isinstance(calls := message.get("tool_calls"), list):
        changed["tool_calls"] = [_call(call, put) for call in calls]
    if isinstance(call := message.get("function_call"), Mapping):
        changed["function_call"] = _function(call, put)
    return changed


def _part(part: Any, name: str, put: Put) -> Any:
    if isinstance(part, str):
        return put(name, part) if part else part
    key = TEXTS.get(str(part.get("type", "text"))) if isinstance(part, Mapping) else None
    return {**part, key: put(name, part[key])} if key and part.get(key) else part


def _call(call: Any, put: Put) -> Any:
    if not isinstance(call, Mapping):
        return call
    function = call.get("function")
    return {**call, "function": _function(function, put)} if isinstance(function, Mapping) else _function(call, put)


def _function(function: Mapping[str, Any], put: Put) -> dict[str, Any]:
    changed = dict(function)
    if isinstance(name := function.get("name"), str) and name:
        changed["name"] = put("tool calls", name)
    if "arguments" in function:
        changed["arguments"] = _arguments(function["arguments"], put)
    return changed


def _arguments(arguments: Any, put: Put) -> Any:
    """As an object or as JSON text, as they came; each name in them, text and number is said."""
    if not isinstance(arguments, str):
        return _value(arguments, "arguments of tool calls", put)
    read = read_arguments(arguments)
    if read is not None:
        return json.dumps(_value(read, "arguments of tool calls", put), ensure_ascii=False)
    return put("arguments of tool calls", arguments)


def _value(value: Any, what: str, put: Put, depth: int = MAX_DEPTH) -> Any:
    if not depth:
        return value
    if isinstance(value, Mapping):
        changed = {}
        for name, each in value.items():
            what = f"argument {name!r} of tool calls"
            marked = put(what, name) if name else name
            changed[marked] = _value(each, what, put, depth - 1)
        return changed
    if isinstance(value, list):
        return [_value(each, what, put, depth - 1) for each in value]
    says = isinstance(value, (str, int, float)) and not isinstance(value, bool) and value != ""
    return put(what, value) if says else value


def _tool(tool: Message, put: Put) -> Message:
    function = tool.get("function")
    if isinstance(function, Mapping):
        return {**tool, "function": _named(function, put)}
    return _named(tool, put)


def _named(function: Mapping[str, Any], put: Put) -> dict[str, Any]:
    name = function.get("name")
    return {**function, "name": put("name", name)} if isinstance(name, str) and name else dict(function)
