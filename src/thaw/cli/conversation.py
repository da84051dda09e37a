"""Conversations at the command line: what --chat and the options beside it say, as the arguments of `Session.chat`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from thaw.cli import output, prompts, words
from thaw.core.errors import InvalidRequest

if TYPE_CHECKING:
    from thaw.engines.base import Message
    from thaw.repo.chat import ChatResult
    from thaw.repo.session import Session

NAMES = {
    "system": "--system", "tools": "--tools", "template_vars": "--template-var", "prefill": "--prefill",
    "keep_sampled": "--keep-sampled",
}  # fmt: skip
"""The options, by the verbs' arguments."""


@dataclass(frozen=True)
class ChatOptions:
    """What was said beside --chat. `arguments` are those of `Session.chat` that are no messages."""

    system: str | None
    prefill: str | None
    arguments: dict[str, Any]

    def messages(self, session: Session, content: str) -> list[Message]:
        """What is appended to the session's conversation: the user's words, and what was given around them."""
        return [*([] if self.system is None else _system(session, self.system)), *self._said(content)]

    def after(self, history: list[Any], content: str) -> list[Any]:
        """A conversation that is given whole, with the user's words at its end."""
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*before, *history, *self._said(content)]

    def _said(self, content: str) -> list[Message]:
        after: list[Message] = [] if self.prefill is None else [{"role": "assistant", "content": self.prefill}]
        return [{"role": "user", "content": content}, *after]


def taken(values: dict[str, Any], *, chat: bool) -> ChatOptions:
    """Takes the options out of a verb's arguments. Raises where one of them was given without --chat."""
    given = {name: values.pop(name) for name in NAMES}
    used = [NAMES[name] for name, value in given.items() if value]
    if used and not chat:
        raise click.UsageError(f"{', '.join(used)}: use only with --chat.")
    arguments: dict[str, Any] = {"keep_sampled": given["keep_sampled"]}
    if given["tools"] is not None:
        arguments["tools"] = json_list(given["tools"])
    if given["template_vars"]:
        arguments["chat_template_kwargs"] = dict(_variable(text) for text in given["template_vars"])
    if given["prefill"] is not None:
        arguments["continue_final_message"] = True
    return ChatOptions(given["system"], given["prefill"], arguments)


def json_list(name: str) -> list[Any]:
    """The list in a JSON file; `-` is stdin."""
    try:
        value = json.loads(prompts.from_file(name))
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name} is not JSON: {error}") from None
    if not isinstance(value, list):
        raise InvalidRequest(f"{name}: expected a JSON list, got {type(value).__name__}")
    return value


def _variable(text: str) -> tuple[str, object]:
    """NAME=VALUE; a value that is JSON (true, 3, "text") is read as such, any other is text."""
    name, found, value = text.partition("=")
    if not found or not name:
        raise click.UsageError(f"--template-var {text}: write NAME=VALUE, for example enable_thinking=false.")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def _system(session: Session, text: str) -> list[Message]:
    """The system's message, for a conversation that begins; nothing where it began with it."""
    message: Message = {"role": "system", "content": text}
    held = session.messages
    if not held:
        return [message]
    if held[0] == message:
        return []
    first = output.one_line(str(held[0].get("content")), 60)
    raise InvalidRequest(
        f"this conversation already began with the {held[0]['role']}'s message {first!r}. Leave out --system, or "
        "start another conversation: thaw run --branch NAME --chat …"
    )


def note(result: ChatResult, name: str = "") -> None:
    """Say what of the session was left behind, if anything, and why."""
    if not result.num_dropped_tokens:
        return
    sampled = f", {result.num_dropped_sampled:,} of them sampled" if result.num_dropped_sampled else ""
    left = f"{words.count(result.num_dropped_tokens, 'token')} left behind{sampled}"
    if result.num_dropped_messages:
        why = f"{words.count(result.num_dropped_messages, 'message')} on the branch are not in --history"
        more = " (the previous commit has them)"
    else:
        why = "the template renders this conversation differently"
        more = " (--keep-sampled keeps those)" if sampled else ""
    output.note(f"{name}{why}: continued from token {result.forked_at:,}, {left}{more}")


def plain(result: ChatResult | None) -> dict[str, object]:
    """What --json adds of a chat."""
    if result is None:
        return {}
    names = ("forked_at", "num_dropped_tokens", "num_dropped_sampled", "num_dropped_messages")
    return {name: getattr(result, name) for name in names}
