"""What a chat message says, in the shapes that clients send: a string, a list of parts, or nothing beside tool calls.

OpenAI's and LangChain's clients send content as a list of parts. Parts of text are taken; any other kind is refused by
name, since a model that never saw an image would answer as if it had.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from thaw.core.errors import InvalidRequest, Unsupported
from thaw.engines.base import Message

TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of parts that are text, and the key under which it stands."""


def text_parts(content: object, where: str) -> list[str]:
    """The texts of a message's content, one a part. Raises `Unsupported` for a part that is no text, `InvalidRequest`
    for what is no content at all; `where` names the message."""
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, (list, tuple)):
        raise InvalidRequest(f"{where}: content is {type(content).__name__}; give a string, or a list of parts")
    return [_text_of(part, where) for part in content]


def _text_of(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text" if "text" in part else None) if isinstance(part, Mapping) else type(part).__name__
    key = TEXTS.get(kind) if isinstance(kind, str) else None
    if key is None or not isinstance(part, Mapping):
        raise Unsupported(f"{where}: a part of type {str(kind)[:60]!r}; thaw's chat takes parts of type 'text' alone")
    text = part.get(key)
    if not isinstance(text, str):
        raise InvalidRequest(f"{where}: a part of type {kind!r} without {key!r}; write {{'type': 'text', 'text': …}}")
    return text


def as_text(message: Message, where: str) -> Message:
    """The message with its content as one string, parts joined by newlines; none is an empty one."""
    return {**message, "content": "\n".join(text_parts(message.get("content"), where))}


def as_parts(message: Message, where: str) -> Message:
    """The message with its content as a list of parts of text."""
    return {
        **message,
        "content": [{"type": "text", "text": text} for text in text_parts(message.get("content"), where)],
    }


def with_arguments(message: Message, *, as_objects: bool) -> Message:
    """The message with the arguments of its tool calls as objects or as JSON text. Clients send either; a template
    would quote text once more, or cannot write an object down."""
    calls = message.get("tool_calls")
    if not isinstance(calls, (list, tuple)):
        return message
    return {**message, "tool_calls": [_with_arguments(call, as_objects) for call in calls]}


def _with_arguments(call: object, as_objects: bool) -> object:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    shaped: object = None
    if isinstance(arguments, str) and as_objects:
        shaped = read_arguments(arguments)
    elif isinstance(arguments, Mapping) and not as_objects:
        shaped = json.dumps(arguments, ensure_ascii=False)
    return call if shaped is None else {**call, "function": {**function, "arguments": shaped}}


def read_arguments(text: str) -> dict[str, Any] | None:
    """Arguments of a call that came as JSON text; None where it is no object's."""
    try:
        read = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return None
    return read if isinstance(read, dict) else None
