"""The conversation of a session, read from its turns: which messages, and up to which token each is in it.

A prompt that was rendered from messages records them (`ChatTurn`); a completion right behind it is the answer to it.
What else was appended to the session is no message: plain text may stand before the conversation, in it or behind it.

Nothing is kept here: turns travel with the session through forks, cuts and commits, and a conversation is read from
them when it goes on. A prompt that was cut through has lost its messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import msgspec

from thaw.core.errors import CorruptBlob
from thaw.core.objects import Chat, ChatSettings, ChatTurn, Turn
from thaw.engines.base import Message
from thaw.repo import messages


class TemplateSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a conversation is rendered with, besides its messages."""

    tools: tuple[Message, ...] = ()
    variables: dict[str, object] = {}
    moment: datetime | None = None


class MessageSpan(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens [begin, end), the messages that they add, and the settings that hold behind them. `sampled`: it is an
    answer. `open`: the piece ends inside its last message, which the answer behind it completes."""

    begin: int
    end: int
    messages: tuple[Message, ...]
    settings: TemplateSettings
    sampled: bool = False
    open: bool = False


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """`start`: the token where it begins; the session's end where there is none.

    `plain_end`: the end of the last text in it that is no message, else `start`. `untold`: a turn that has a role and
    no messages to render it from, if there is one.
    """

    start: int
    pieces: tuple[MessageSpan, ...] = ()
    plain_end: int = 0
    untold: Turn | None = None

    @property
    def messages(self) -> list[Message]:
        return joined(self.pieces)

    @property
    def settings(self) -> TemplateSettings:
        return self.pieces[-1].settings if self.pieces else TemplateSettings()


def joined(pieces: Sequence[MessageSpan]) -> list[Message]:
    """The messages of these pieces, in order; one that an answer completes is one."""
    out: list[Message] = []
    for before, piece in zip((None, *pieces), pieces, strict=False):
        rest = list(piece.messages)
        if piece.sampled and before is not None and (before.open or before.sampled):
            out[-1] = completed(out[-1], str(rest.pop(0)["content"]))
        out += rest
    return out


def completed(message: Message, more: str) -> Message:
    """`message` with `more` at the end of its text."""
    content = message.get("content")
    if isinstance(content, list) and content and isinstance(content[-1], dict):
        last = {**content[-1], "text": f"{content[-1].get('text', '')}{more}"}
        return {**message, "content": [*content[:-1], last]}
    return {**message, "content": f"{content or ''}{more}"}


def read(turns: Sequence[Turn], num_tokens: int, earlier: tuple[Sequence[Message], int] | None = None) -> Conversation:
    """The conversation of a session with these turns. `earlier`: messages of its first tokens that no turn records, and
    up to which token they go. Raises `CorruptBlob` for a record that cannot be read."""
    pieces: list[MessageSpan] = []
    others: list[Turn] = []
    if earlier is not None:
        told, end = earlier
        begin = next((turn.start for turn in turns if turn.role is not None), 0)
        pieces.append(MessageSpan(begin=begin, end=end, messages=tuple(told), settings=TemplateSettings()))
        turns = [turn for turn in turns if turn.start >= end]
    for turn in turns:
        if isinstance(turn, ChatTurn):
            pieces = [piece for piece in pieces if piece.end <= turn.chat.begin]
            others = [other for other in others if other.end <= turn.chat.begin]
            pieces.append(_told(turn, pieces[-1].settings if pieces else TemplateSettings()))
        elif turn.kind == "completion" and pieces and pieces[-1].end == turn.start:
            answer: Message = {"role": "assistant", "content": turn.text}
            settings = pieces[-1].settings
            pieces.append(
                MessageSpan(begin=turn.start, end=turn.end, messages=(answer,), settings=settings, sampled=True)
            )
        else:
            others.append(turn)
    start = pieces[0].begin if pieces else num_tokens
    plain = [turn.end for turn in others if turn.role is None and turn.start >= start]
    return Conversation(
        start=start,
        pieces=tuple(pieces),
        plain_end=max([start, *plain]),
        untold=next((turn for turn in others if turn.role is not None), None),
    )


def record(begin: int, added: Sequence[Message], settings: TemplateSettings | None, *, open: bool) -> Chat:
    """What the turn that ends with `added` keeps. `settings` None: as before `begin`."""
    return Chat(
        begin=begin,
        messages=tuple(messages.written(message) for message in added),
        continue_final_message=open,
        settings=None if settings is None else _written(settings),
    )


def _written(settings: TemplateSettings) -> ChatSettings:
    return ChatSettings(
        tools=tuple(messages.written(tool) for tool in settings.tools),
        variables={name: messages.written(value) for name, value in settings.variables.items()},
        moment=None if settings.moment is None else settings.moment.isoformat(),
    )


def _told(turn: ChatTurn, before: TemplateSettings) -> MessageSpan:
    try:
        told = tuple(dict(messages.read(text)) for text in turn.chat.messages)
    except (ValueError, TypeError, RecursionError) as error:
        raise CorruptBlob(f"the messages of the turn at token {turn.start} cannot be read: {error}") from None
    settings = before if turn.chat.settings is None else _settings(turn.chat.settings)
    open = turn.chat.continue_final_message and bool(told)
    return MessageSpan(begin=turn.chat.begin, end=turn.end, messages=told, settings=settings, open=open)


def _settings(kept: ChatSettings) -> TemplateSettings:
    try:
        return TemplateSettings(
            tools=tuple(messages.read(tool) for tool in kept.tools),
            variables={name: messages.read(value) for name, value in kept.variables.items()},
            moment=None if kept.moment is None else datetime.fromisoformat(kept.moment),
        )
    except (ValueError, RecursionError) as error:
        raise CorruptBlob(f"what a conversation is rendered with cannot be read: {error}") from None
