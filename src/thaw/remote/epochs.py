"""What gc says to pushes: in which epoch the remote is, what is condemned, and whether it is being deleted now.

    waiting    a list of data that nothing reached was written down; nothing is deleted before a grace period is over
    sweeping   what of that list still is reached by nothing is being deleted
    done       it is deleted

Data is written under the number of the epoch, and the list of an epoch names data of earlier ones alone. Before it
moves a ref, a push compares the state that it finds with the one that it began with (`push.py`, `gc.py`).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from thaw.core.errors import CorruptBlob
from thaw.core.ids import digest
from thaw.remote import layout, values
from thaw.remote.bucket import Bucket, Version


class GcState(values.Checked, frozen=True, kw_only=True, tag="thaw.remote-gc/1"):
    """`condemned`: the key of the list. `since`: when the list was written, by the store's clock."""

    epoch: int = 0
    phase: Literal["waiting", "sweeping", "done"] = "done"
    condemned: str = ""
    since: float = 0.0
    sweep: int = 0


FIRST = GcState(writer="")
"""Of a remote in which no gc ever ran."""


def read(bucket: Bucket) -> tuple[GcState, Version | None]:
    found = bucket.read(layout.GC)
    if found is None:
        return FIRST, None
    return values.decode(found.data, GcState, "the state of gc in the remote (gc.json)"), found.version


def write(bucket: Bucket, state: GcState, version: Version | None) -> Version | None:
    """The state's new version; None where another one is there meanwhile."""
    data = values.encode(state)
    return bucket.create(layout.GC, data) if version is None else bucket.swap(layout.GC, data, version)


def write_list(bucket: Bucket, epoch: int, keys: list[str]) -> str:
    """Writes what an epoch condemns; returns the list's key."""
    data = msgspec.json.encode(sorted(keys))
    key = f"{layout.CONDEMNED}{epoch}-{digest(data)[3:]}.json"
    bucket.put(key, data)
    return key


def is_older_list(key: str, epoch: int) -> bool:
    """Whether this is the list of an epoch before `epoch`, by its key."""
    number = key.removeprefix(layout.CONDEMNED).partition("-")[0]
    return number.isdecimal() and int(number) < epoch


def read_list(bucket: Bucket, state: GcState) -> frozenset[str]:
    """The keys that the state's epoch condemns. Raises `CorruptBlob`."""
    if not state.condemned:
        return frozenset()
    what = f"the list of condemned data in the remote ({state.condemned[:100]})"
    found = bucket.read(state.condemned)
    if found is None or digest(found.data)[3:] not in state.condemned:
        raise CorruptBlob(f"{what} is missing or was changed after it was written.")
    try:
        return frozenset(
            layout.check_data_key(key, "", what) for key in msgspec.json.decode(found.data, type=list[str])
        )
    except msgspec.DecodeError as error:
        raise CorruptBlob(f"{what} cannot be read: {error}") from None
