"""`tool_choice`, in each API's words: which tools the model is shown, and whether it must call one.

A call is forced by structured output, so only where the engine has it: the model then writes JSON alone, the arguments
of the function that was named, or a list of calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from thaw.engines.base import Engine, Message
from thaw.gateway.problems import invalid, unsupported
from thaw.gateway.speech import ForcedCalls

DEFINITIONS = ("$defs", "definitions")


class ChosenTools(msgspec.Struct, frozen=True):
    """`shown`: to the model. `forced`: what it must call. `single`: at most one call."""

    shown: tuple[Message, ...]
    forced: ForcedCalls | None = None
    single: bool = False

    def schema(self) -> dict[str, Any] | None:
        """Of what it must write; None where it is free. Raises `ApiError` for schemas that cannot stand together."""
        if self.forced is None:
            return None
        schemas = {_name(tool): _parameters(tool) for tool in self.shown if _name(tool) in self.forced.names}
        if self.forced.named:
            return schemas[self.forced.names[0]]
        shared = _definitions(schemas)
        calls = [_call(name, schema) for name, schema in schemas.items()]
        most = {"maxItems": 1} if self.single else {}
        return {"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}, **shared}


def chosen(
    tools: tuple[Message, ...], choice: object, engine: Engine, *, parallel: bool = True, param: str = "tool_choice"
) -> ChosenTools:
    """What OpenAI's APIs say, in either one's shape. Raises `ApiError` naming the field."""
    single = not parallel
    if choice in (None, "auto"):
        return ChosenTools(tools, single=single)
    if choice == "none":
        return ChosenTools(())
    if choice == "required":
        return forced(tools, [_name(tool) for tool in tools], engine, named=False, single=single, param=param)
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = choice["function"] if isinstance(choice.get("function"), dict) else choice
        return forced(tools, [str(function.get("name"))], engine, named=True, single=True, param=param)
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        return _allowed(tools, choice, engine, single=single, param=param)
    raise unsupported(param, "it is 'auto', 'none', 'required', a function, or allowed_tools that are required")


def _allowed(
    tools: tuple[Message, ...], choice: Mapping[str, Any], engine: Engine, *, single: bool, param: str
) -> ChosenTools:
    allowed = choice["allowed_tools"] if isinstance(choice.get("allowed_tools"), dict) else choice
    if allowed.get("mode") != "required":
        raise unsupported(param, "allowed_tools are only supported with mode 'required'; send only the tools meant")
    listed = [one for one in allowed.get("tools") or () if isinstance(one, dict)]
    names = [str((one["function"] if isinstance(one.get("function"), dict) else one).get("name")) for one in listed]
    return forced(tools, names, engine, named=False, single=single, param=param)


def forced(
    tools: tuple[Message, ...], names: list[str], engine: Engine, *, named: bool, single: bool, param: str
) -> ChosenTools:
    """A choice that forces a call. Raises `ApiError` where the engine cannot, or nothing is to be called."""
    known = {_name(tool) for tool in tools}
    missing = [name for name in names if name not in known]
    if missing or not names:
        raise invalid(param, f"there is no tool {', '.join(missing)[:80]!r}" if missing else "there are no tools")
    if "structured" not in engine.info.capabilities:
        raise unsupported(param, f"the engine {engine.info.name} cannot force a call; leave it out")
    return ChosenTools(tools, ForcedCalls(tuple(names), named), single)


def _name(tool: Message) -> str:
    function = tool["function"]
    assert isinstance(function, dict)
    return str(function["name"])


def _parameters(tool: Message) -> dict[str, Any]:
    function = tool["function"]
    assert isinstance(function, dict)
    return dict(function.get("parameters") or {"type": "object", "properties": {}})


def _call(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    inner = {key: value for key, value in schema.items() if key not in DEFINITIONS}
    properties = {"name": {"type": "string", "enum": [name]}, "parameters": inner}
    return {
        "type": "object", "properties": properties, "required": ["name", "parameters"], "additionalProperties": False
    }  # fmt: skip


def _definitions(schemas: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Those of all tools, at the root, where references look for them."""
    out: dict[str, Any] = {}
    for name, schema in schemas.items():
        for key in DEFINITIONS:
            for what, meaning in (schema.get(key) or {}).items():
                if out.setdefault(key, {}).setdefault(what, meaning) != meaning:
                    raise unsupported("tools", f"{name} defines {what!r} unlike another tool; send only one of them")
    return out
