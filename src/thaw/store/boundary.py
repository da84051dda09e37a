"""Changing what `thaw.store.shallow` notes, in the transaction that stores commits or deletes them."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping

from thaw.store import objects, shallow
from thaw.store.links import links
from thaw.store.refs import bump_sequence
from thaw.store.schema import SHALLOW
from thaw.store.settings import admit, set_setting


def add(connection: sqlite3.Connection, absent: Mapping[str, str]) -> bool:
    """Notes commits that are not stored, and takes out those that are now; whether that changed anything."""
    before = shallow.read(connection)
    after = {**before, **absent}
    stored = objects.present(connection, "objects", after)
    return _write(connection, before, {one: remote for one, remote in after.items() if one not in stored})


def prune(connection: sqlite3.Connection) -> None:
    """Takes out what no stored commit has as a parent any more. Raises `CorruptBlob`."""
    before = shallow.read(connection)
    if not before:
        return
    rows = connection.execute("SELECT id FROM objects WHERE kind = 'commit'").fetchall()
    named = {one for (commit,) in rows for one in links(objects.read_bytes(connection, commit)).parents}
    _write(connection, before, {one: remote for one, remote in before.items() if one in named})


def _write(connection: sqlite3.Connection, before: dict[str, str], after: dict[str, str]) -> bool:
    if after == before:
        return False
    admit(connection, SHALLOW)
    set_setting(connection, shallow.KEY, shallow.encode(after))
    bump_sequence(connection)
    return True
