"""A chat template of Hugging Face's kind: how it wants content, and what becomes of its errors.

Templates are programs, and each reads a message in its own way. What this one does with content is found out by asking
it: a message of one part is rendered, once for each role.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError

from thaw.core.errors import InvalidRequest
from thaw.engines import content
from thaw.engines.base import Message

Render = Callable[[list[Message]], str]
"""The template itself, with no generation prompt, tools or variables."""
PROBE = "90210417"
"""Digits: a template may capitalise what it says."""
BEFORE: dict[str, list[Message]] = {
    "assistant": [{"role": "user", "content": "a"}],
    "tool": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
}
AFTER: dict[str, list[Message]] = {"system": [{"role": "user", "content": "a"}]}
"""What stands around a message of a role in the shortest conversation that has one."""
ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template raises: on purpose the first, the others as any program that was given what it did not expect."""


class ContentFit:
    """Messages as one template reads them. What it finds out it keeps; safe from any thread."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self._parts: dict[str, bool] = {}
        self._strings: dict[str, bool] = {}
        self._objects: bool | None = None

    def fit(self, messages: Sequence[Message]) -> list[Message]:
        """The same messages in a shape that the template says whole: content as a list of parts where it iterates over
        them, else text; arguments of calls as objects, or as JSON text where it writes them down as they are. Raises
        `Unsupported` for parts that are no text."""
        return [self._fit(message, f"message {i}") for i, message in enumerate(messages)]

    def _fit(self, message: Message, where: str) -> Message:
        role = str(message.get("role"))
        several = isinstance(message.get("content"), (list, tuple))
        as_parts = self.takes_parts(role) if several else not self.takes_text(role) and self.takes_parts(role)
        shaped = content.as_parts(message, where) if as_parts else content.as_text(message, where)
        if not shaped.get("tool_calls"):
            return shaped
        return content.with_arguments(shaped, as_objects=self.takes_objects())

    def takes_parts(self, role: str) -> bool:
        """Whether the template iterates over content that is a list, rather than printing the list."""
        if role not in self._parts:
            said = self._said(role, [{"type": "text", "text": PROBE}])
            self._parts[role] = PROBE in said and "type'" not in said.lower() and 'type"' not in said.lower()
        return self._parts[role]

    def takes_text(self, role: str) -> bool:
        if role not in self._strings:
            self._strings[role] = PROBE in self._said(role, PROBE)
        return self._strings[role]

    def takes_objects(self) -> bool:
        """Whether arguments of calls are to be objects: unless the template says them as JSON text alone, or prints an
        object as Python does and the text as it is."""
        if self._objects is None:
            said = self._said_of_call({PROBE: PROBE})
            printed = f"{{'{PROBE}'" in said
            self._objects = (PROBE in said and not printed) or PROBE not in self._said_of_call(f'{{"{PROBE}": "a"}}')
        return self._objects

    def _said_of_call(self, arguments: object) -> str:
        call = {"id": "thawcall1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        answer: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        result: Message = {"role": "tool", "name": "f", "tool_call_id": call["id"], "content": "b"}
        return self._tried([*BEFORE["assistant"], answer, result])

    def _said(self, role: str, said: object) -> str:
        return self._tried([*BEFORE.get(role, []), {"role": role, "content": said}, *AFTER.get(role, [])])

    def _tried(self, messages: list[Message]) -> str:
        try:
            return self._render(messages)
        except ERRORS:
            return ""


@contextmanager
def explained() -> Iterator[None]:
    """The template's own errors as `InvalidRequest`, with what it said."""
    try:
        yield
    except ERRORS as error:
        what = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise InvalidRequest(
            f"the model's chat template refuses this conversation: {what[:500] or type(error).__name__}. Templates "
            "differ in the roles, their order and the fields that they take."
        ) from None


RESERVED = frozenset(
    {
        "messages", "conversation", "tools", "add_generation_prompt", "continue_final_message", "chat_template",
        "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
        "return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs", "sanitize_control_tokens",
        "strftime_now", "raise_exception", "self",
    }
)  # fmt: skip
"""Names that are not a template's variables: they mean something to what renders it."""


def check_variables(variables: Mapping[str, Any] | None) -> dict[str, Any]:
    """`variables` as keyword arguments. Raises `InvalidRequest` for a name that is taken."""
    for name in variables or {}:
        if name in RESERVED or not name.isidentifier():
            raise InvalidRequest(f"{name!r} is no variable of a chat template; those are names of the template's own")
    return dict(variables or {})
