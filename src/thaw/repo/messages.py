"""Messages, tools and template variables as the caller gives them: checked, and as the JSON text that is recorded.

A message is a dict in OpenAI's shape: a role, content (a string, a list of parts, or none beside tool calls), and
whatever else the model's template reads. What it says is for the template to judge; here it must only be something that
can be kept and rendered again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from thaw.core.errors import InvalidRequest
from thaw.engines.base import Codec, Message

Messages = str | Message | Sequence[Message]
"""One message or several; a string is what the user says."""
Tool = Message | Callable[..., object]
BARE = {"role", "name", "content"}
"""Keys of a message that say nothing by themselves where there is no content."""


def checked(messages: Messages, name: str = "messages") -> tuple[Message, ...]:
    """The messages, copied. Raises `InvalidRequest` for what no template could read."""
    if isinstance(messages, str):
        return ({"role": "user", "content": messages},)
    several = [messages] if isinstance(messages, Mapping) else messages
    if not isinstance(several, Sequence) or isinstance(several, (bytes, bytearray)):
        raise InvalidRequest(f"{name}: a list of messages was expected, got {type(messages).__name__}")
    return tuple(_checked(message, f"{name}[{i}]") for i, message in enumerate(several))


def _checked(message: object, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise InvalidRequest(
            f"{where} is {_kind(message)}; a message is a dict with 'role' and 'content' (of an OpenAI client's "
            "object: message.model_dump(exclude_none=True))"
        )
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{where} has no role; give it 'role': 'user', 'assistant', 'system' or 'tool'")
    if message.get("content") is None and (role != "assistant" or set(message) <= BARE):
        raise InvalidRequest(f"{where} ({role}) has no content; only an answer that calls tools can be without it")
    copy: Message = read(written(dict(message), where))
    return copy


def checked_tools(tools: Sequence[Tool] | None, codec: Codec) -> tuple[Message, ...] | None:
    """Tools as JSON schemas; functions are read by the engine's codec. None stays None."""
    if tools is None:
        return None
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise InvalidRequest(f"tools: a list of JSON schemas or functions was expected, got {type(tools).__name__}")
    return tuple(_tool(tool, i, codec) for i, tool in enumerate(tools))


def _tool(tool: object, number: int, codec: Codec) -> Message:
    where = f"tools[{number}]"
    if callable(tool):
        tool = codec.tool_schema(tool)
    if not isinstance(tool, Mapping):
        raise InvalidRequest(f"{where} is {_kind(tool)}; a tool is a JSON schema (a dict) or a documented function")
    schema: Message = read(written(dict(tool), where))
    return schema


def checked_variables(variables: Mapping[str, object] | None) -> dict[str, object] | None:
    """Template variables, copied. None stays None."""
    if variables is None:
        return None
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise InvalidRequest("chat_template_kwargs: a dict of the template's variables by name was expected")
    return {name: read(written(value, f"chat_template_kwargs[{name!r}]")) for name, value in variables.items()}


def written(value: object, where: str = "a message") -> str:
    """`value` as JSON text, its keys in order. Raises `InvalidRequest` for what JSON cannot hold as it is."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where} cannot be kept as JSON: {error}") from None
    for key in _keys(value):
        if not isinstance(key, str):
            kind = type(key).__name__
            raise InvalidRequest(f"{where} cannot be kept as JSON: the key {key!r} is {kind}, and only text can be one")
    return text


def _keys(value: object) -> Iterator[object]:
    """Those of all objects in `value`, however deep."""
    rest = [value]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            yield from one
            rest += one.values()
        elif isinstance(one, (list, tuple)):
            rest += one


def read(text: str) -> Any:
    """The value of what `written` gave."""
    return json.loads(text)


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
