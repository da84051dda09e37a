"""Where history ends because no more of it was fetched: commits that are named as parents and are not stored.

One setting says them all, with the remote that has each (in a namespace as `@NAME/REMOTE`). It changes in the
transaction that stores their children, or that stores them: what it names is never stored. Everything else that a
stored commit needs is there, as in any repository.
"""

from __future__ import annotations

import sqlite3

import msgspec

from thaw.core.errors import CorruptDatabase, NotFetched
from thaw.core.ids import short
from thaw.store.settings import REBUILD, setting

KEY = "user.shallow"
_DECODER = msgspec.json.Decoder(dict[str, str])


def read(connection: sqlite3.Connection) -> dict[str, str]:
    """Commit -> the remote that has it, of all namespaces. Raises `CorruptDatabase`."""
    return decode(setting(connection, KEY))


def decode(text: str | None) -> dict[str, str]:
    """What the setting says; nothing where it is not there. Raises `CorruptDatabase`."""
    if text is None:
        return {}
    try:
        return _DECODER.decode(text)
    except msgspec.DecodeError as error:
        raise CorruptDatabase(f"the setting {KEY!r} is damaged: {error}. {REBUILD}") from None


def encode(absent: dict[str, str]) -> str:
    return msgspec.json.encode(absent, order="sorted").decode()


def not_fetched(commit: str, remote: str) -> NotFetched:
    return NotFetched(
        f"commit {short(commit)} was not fetched: this repository is shallow, and its history begins after it. "
        f"`thaw fetch --unshallow {remote}` brings what is older."
    )
