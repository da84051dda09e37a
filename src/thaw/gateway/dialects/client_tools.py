"""The Responses API's tools that a client runs itself: functions, custom tools, a shell, and namespaces of these.

A model is shown functions alone. A custom tool is one with the text as its `input`; a namespace's are named with it.
What the model calls goes back as the item that the client expects for that tool.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from thaw.engines.base import Message
from thaw.gateway.dialects.common import tools_of
from thaw.gateway.problems import invalid, unsupported

Item = dict[str, Any]
SHELL = "local_shell"
JOINT = "__"
SHELL_PARAMETERS: Item = {
    "type": "object",
    "properties": {
        "command": {"type": "array", "items": {"type": "string"}},
        "env": {"type": "object", "additionalProperties": {"type": "string"}},
        "timeout_ms": {"type": "integer"},
        "working_directory": {"type": "string"},
    },
    "required": ["command"],
}


class ClientTool(msgspec.Struct, frozen=True):
    """`kind`: function, custom or local_shell. `shown`: the name that the model sees."""

    kind: str
    name: str
    namespace: str | None
    function: Item

    @property
    def shown(self) -> str:
        return self.name if self.namespace is None else f"{self.namespace}{JOINT}{self.name}"

    def item(self, id: str, call_id: str, arguments: str, status: str) -> Item:
        """A call of it, with its own kind of item; the id's first part is that of the kind."""
        if self.kind == "custom":
            head: Item = {"id": f"ctc_{id}", "type": "custom_tool_call", "input": _input(arguments)}
        elif self.kind == SHELL:
            head = {"id": f"lsh_{id}", "type": "local_shell_call", "action": _action(arguments)}
        else:
            head = {"id": f"fc_{id}", "type": "function_call", "arguments": arguments}
        named = {} if self.kind == SHELL else {"name": self.name}
        namespace = {} if self.namespace is None else {"namespace": self.namespace}
        return {**head, **named, **namespace, "call_id": call_id, "status": status}


def client_tools(tools: Sequence[Mapping[str, Any]]) -> dict[str, ClientTool]:
    """By the names that the model sees. Raises `ApiError` for a tool that would have to run here."""
    found: dict[str, ClientTool] = {}
    for i, tool in enumerate(tools):
        for one in _tools(tool, f"tools[{i}]", None):
            if found.setdefault(one.shown, one) is not one:
                raise invalid(f"tools[{i}]", f"a second tool is named {one.shown[:80]!r}")
    return found


def shown_tools(tools: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    return tools_of([one.function for one in client_tools(tools).values()])


def _tools(tool: Mapping[str, Any], where: str, namespace: str | None) -> Iterator[ClientTool]:
    kind = tool.get("type")
    if kind == "namespace" and namespace is None:
        if not isinstance(tool.get("name"), str) or not isinstance(tool.get("tools"), list):
            raise invalid(where, "a namespace has a name and tools")
        for inner in tool["tools"]:
            yield from _tools(inner, where, tool["name"])
        return
    if kind == SHELL:
        yield _shell()
        return
    if kind not in ("function", "custom"):
        raise unsupported(where, f"a tool of type {str(kind)[:40]!r} would have to run here; turn it off in the client")
    if not isinstance(tool.get("name"), str):
        raise invalid(where, "a tool needs a name")
    function = dict(tool) if kind == "function" else _custom(tool)
    one = ClientTool(str(kind), tool["name"], namespace, function)
    function["name"] = one.shown
    yield one


def _custom(tool: Mapping[str, Any]) -> Item:
    """A function that takes a text. A grammar is described to the model, and not enforced."""
    format = tool.get("format") or {}
    grammar = f"\n\nThe input follows this {format.get('syntax', '')} grammar:\n{format['definition']}" if (
        isinstance(format, dict) and format.get("type") == "grammar" and format.get("definition")
    ) else ""  # fmt: skip
    return {
        "type": "function",
        "name": tool["name"],
        "description": f"{tool.get('description') or ''}{grammar}",
        "parameters": {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]},
    }


def _shell() -> ClientTool:
    about = "Run a command in the user's shell."
    function = {"type": "function", "name": SHELL, "description": about, "parameters": SHELL_PARAMETERS}
    return ClientTool(SHELL, SHELL, None, function)


def _object(arguments: str) -> Item:
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _input(arguments: str) -> str:
    """Where it was not written as a field, all of it."""
    given = _object(arguments).get("input")
    return given if isinstance(given, str) else arguments


def _action(arguments: str) -> Item:
    given = _object(arguments)
    command, env = given.get("command"), given.get("env")
    return {
        "type": "exec",
        "command": [str(word) for word in command] if isinstance(command, list) else [str(command or "")],
        "env": {str(name): str(value) for name, value in env.items()} if isinstance(env, dict) else {},
        "timeout_ms": given.get("timeout_ms"),
        "working_directory": given.get("working_directory"),
    }


def arguments_of_item(item: Item) -> tuple[str, str]:
    """The function's name and arguments that a call in the input was made of."""
    if item["type"] == "local_shell_call":
        action = item.get("action") or {}
        kept = {name: action[name] for name in SHELL_PARAMETERS["properties"] if action.get(name)}
        return SHELL, json.dumps(kept, ensure_ascii=False)
    name = str(item.get("name"))
    if isinstance(item.get("namespace"), str):
        name = f"{item['namespace']}{JOINT}{name}"
    if item["type"] == "custom_tool_call":
        return name, json.dumps({"input": str(item.get("input", ""))}, ensure_ascii=False)
    given = item.get("arguments", "{}")
    return name, given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
