"""A chat template rendered as transformers renders it, by jinja2 in a sandbox.

Templates are programs that come with a model. They see the conversation, the tools, and what transformers gives them:
`raise_exception`, `strftime_now`, `tojson` as plain JSON, loop controls, and a tag `generation` that changes nothing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Messages = Sequence[Mapping[str, Any]]
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names that a message's reasoning goes by; templates read the first, and gpt-oss the second."""


def render(
    template: str,
    messages: Messages,
    *,
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    variables: Mapping[str, Any],
) -> str:
    """The conversation's text. Raises `jinja2.TemplateError`, and whatever else a program may."""
    given = {
        "messages": [_message(message) for message in messages],
        "tools": None if tools is None else [tool if isinstance(tool, Mapping) else _schema(tool) for tool in tools],
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    return _compiled(template).render({**given, **variables})


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is None: many templates take a missing field and not a null. Reasoning goes by each of its names."""
    said = {key: value for key, value in message.items() if value is not None}
    reasoning = next((said[name] for name in REASONING if name in said), None)
    return said if reasoning is None else {"thinking": reasoning, **said, "reasoning_content": reasoning}


def _schema(function: Any) -> Any:
    """A function as a tool, from its signature and its docstring."""
    from transformers.utils import get_json_schema

    return get_json_schema(function)


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`, which marks what an assistant said for who trains on it."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own way)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [nodes.Scope(body).set_lineno(line)]


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = _strftime_now
    return env.from_string(template)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """jinja2's own would escape what HTML does not allow."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
