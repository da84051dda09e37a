"""Conversations in history: every commit made with --chat records the messages that it added.

They stand in the commit's meta under `chat.messages`, as JSON; the conversation of a point is what its first-parent
ancestors recorded, oldest first. Templates cannot be read backwards, so a session's tokens alone would not tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from thaw.core.errors import InvalidRequest
from thaw.core.objects import Commit

if TYPE_CHECKING:
    from thaw.repo.chat import Message
    from thaw.repo.resolve import ResolvedPoint
    from thaw.store import Store

KEY = "chat.messages"


def meta(new: Sequence[Message]) -> dict[str, str]:
    """What a commit's meta says of the messages that it adds."""
    return {KEY: msgspec.json.encode(list(new)).decode()}


def of(store: Store, point: ResolvedPoint) -> list[Message]:
    """The conversation at a commit's end. Raises `InvalidRequest` inside one."""
    if not point.at_end:
        raise InvalidRequest(
            f"{point} lies inside a commit, where --chat cannot tell which messages are whole. "
            "Name a commit, or go on without --chat."
        )
    parts: list[list[Message]] = []
    identifier: str | None = point.commit
    while identifier is not None:
        commit = store.get_as(identifier, Commit)
        if KEY in commit.meta:
            parts.append(msgspec.json.decode(commit.meta[KEY], type=list[dict[str, object]]))
        identifier = commit.parents[0] if commit.parents else None
    return [message for part in reversed(parts) for message in part]
