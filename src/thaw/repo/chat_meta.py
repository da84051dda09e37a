"""Conversations of an older thaw: each commit of its `run --chat` has in its meta the messages that it added.

Newer commits record messages with their turns (`conversation.py`); these are only read.
"""

from __future__ import annotations

import msgspec

from thaw.core.errors import CorruptBlob
from thaw.core.objects import Commit, State
from thaw.store import Store

KEY = "chat.messages"


def read(store: Store, commit: str | None) -> tuple[list[dict[str, object]], int] | None:
    """The messages that `commit` and its first-parent ancestors recorded, oldest first, and the token up to which they
    go. None where none did. Raises `CorruptBlob` for meta that is no list of messages, `NotFetched` where the beginning
    is not here."""
    parts: list[list[dict[str, object]]] = []
    end = 0
    while commit is not None:
        found = store.get_as(commit, Commit)
        if KEY in found.meta:
            parts.append(_messages(found.meta[KEY], commit))
            end = end or store.get_as(found.state, State).num_tokens
        commit = store.first_parent(found)
        if commit is None and found.parents and parts:
            store.get_as(found.parents[0], Commit)  # says that it was not fetched: the beginning is in older ones
    return ([message for part in reversed(parts) for message in part], end) if parts else None


_MESSAGES = msgspec.json.Decoder(list[dict[str, object]])


def _messages(text: str, commit: str) -> list[dict[str, object]]:
    try:
        return _MESSAGES.decode(text)
    except msgspec.DecodeError as error:
        raise CorruptBlob(f"meta {KEY} of commit {commit} is not a list of messages: {error}") from None
