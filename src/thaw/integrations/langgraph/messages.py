"""Messages between LangChain and thaw: their form, and the points that they carry.

An answer of `ChatThaw` has a record under `response_metadata["thaw"]`: `point`, the commit that holds the conversation
up to and with it, and `digest`, of that conversation as it was then. A list of messages continues from the last point
whose digest is that of the messages before it, so code that edits, cuts or forks the list needs to do nothing more.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from langchain_core.messages import AIMessage, BaseMessage, convert_to_openai_messages

from thaw.core.errors import Unsupported
from thaw.core.ids import digest, is_id
from thaw.core.text import one_line, require_text
from thaw.engines.base import Message

KEY = "thaw"
"""Of `response_metadata`."""
NOTE = 72
"""Characters of what was said last that are a commit's message."""


class CarriedPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A point that message `count - 1` carries. `intact`: the messages up to it are those that it was made of.
    `model`: the id of the model whose KV it is, "" where that is not known."""

    commit: str
    count: int
    intact: bool
    model: str


def point_of(message: BaseMessage) -> str | None:
    """The commit at the end of this message, if it carries one: a point as `thaw` and `repo.session` take it."""
    record = message.response_metadata.get(KEY) if isinstance(message, AIMessage) else None
    return _point_in(record)


def _point_in(record: object) -> str | None:
    commit = record.get("point") if isinstance(record, dict) else None
    return commit if isinstance(commit, str) and is_id(commit) else None


def as_openai(messages: Sequence[BaseMessage]) -> list[Message]:
    """The messages in OpenAI's form. Raises `Unsupported` for what is not text."""
    found: list[Message] = [_plain(one) for one in convert_to_openai_messages(list(messages))]
    for i, message in enumerate(found):
        content = message.get("content")
        if isinstance(content, list):
            kinds = {str(part.get("type"))[:40] if isinstance(part, dict) else type(part).__name__ for part in content}
            if kinds - {"text"}:
                raise Unsupported(f"messages[{i}] has parts of type {', '.join(sorted(kinds))}; only text is supported")
    return found


def _plain(message: dict[str, Any]) -> Message:
    """Without what no template reads: an answer that calls tools may say nothing beside."""
    if message.get("tool_calls") and not message.get("content"):
        message = {name: value for name, value in message.items() if name != "content"}
    return message


def last_said(messages: Sequence[Message]) -> str:
    """What the user said last, on one line, as a commit's message."""
    content = next((one.get("content") for one in reversed(messages) if one.get("role") == "user"), None)
    if isinstance(content, list):
        content = " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return one_line(str(content or ""), NOTE) or "langgraph"


def told(messages: Sequence[Message]) -> list[str]:
    """The digest of the conversation up to and with each message, ids of calls apart, which are new in every run.

    Raises `InvalidRequest` for half a character, which no tokenizer takes."""
    found: list[str] = []
    for i, message in enumerate(messages):
        text = json.dumps(_without_ids(message), sort_keys=True, ensure_ascii=False, default=str)
        require_text(text, f"messages[{i}]")
        found.append(digest(f"{found[-1] if found else ''}{text}".encode()))
    return found


def _without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_ids(v) for k, v in value.items() if k not in ("id", "tool_call_id")}
    return [_without_ids(one) for one in value] if isinstance(value, (list, tuple)) else value


def carried(messages: Sequence[BaseMessage], digests: Sequence[str]) -> list[CarriedPoint]:
    """The points in `messages` (`digests`: what `told` says of them), the deepest first, intact ones before others."""
    found = [
        CarriedPoint(
            commit=commit,
            count=i + 1,
            intact=message.response_metadata[KEY].get("digest") == digests[i],
            model=str(message.response_metadata[KEY].get("model_id") or ""),
        )
        for i, message in reversed(list(enumerate(messages)))
        if (commit := point_of(message)) is not None
    ]
    return [*(one for one in found if one.intact), *(one for one in found if not one.intact)]


def points_in(value: object) -> set[str]:
    """The commits named by any message in a value of a graph's state, however it is nested, and also where it was
    dumped to a dict."""
    found: set[str] = set()
    seen: dict[int, object] = {}
    waiting: list[object] = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, (str, bytes, int, float, type(None), type)) or id(one) in seen:
            continue
        seen[id(one)] = one
        dumped = isinstance(one, dict) and "digest" in one
        commit = point_of(one) if isinstance(one, BaseMessage) else _point_in(one) if dumped else None
        if commit is not None:
            found.add(commit)
        waiting += _parts(one)
    return found


def _parts(value: object) -> list[object]:
    """What a container, or an object with attributes, holds."""
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(value)
    slots = (name for kind in type(value).__mro__ for name in _names(getattr(kind, "__slots__", ())))
    own = getattr(value, "__dict__", None)
    return [*(own.values() if isinstance(own, dict) else ()), *(getattr(value, name, None) for name in slots)]


def _names(slots: str | Iterable[str]) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)
