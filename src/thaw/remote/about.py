"""`thaw.json`: what tells that a prefix is a remote, which one, and the branch that a clone starts on."""

from __future__ import annotations

import contextlib
from uuid import uuid4

from thaw.core.errors import NotFound, RemoteUncertain
from thaw.remote import layout, values
from thaw.remote.bucket import Bucket


class RemoteAbout(values.Checked, frozen=True, kw_only=True, tag="thaw.remote/1"):
    """`id`: drawn when the remote was made. `head`: a branch's name, a hint."""

    id: str
    head: str


def read(bucket: Bucket) -> RemoteAbout | None:
    """None where nothing was ever pushed. Raises `CorruptBlob`, `NewerFormat`."""
    found = bucket.read(layout.ABOUT)
    return None if found is None else values.decode(found.data, RemoteAbout, f"{layout.ABOUT} of the remote")


def require(bucket: Bucket, url: str) -> RemoteAbout:
    """Raises `NotFound` where there is no remote."""
    about = read(bucket)
    if about is None:
        raise NotFound(
            f"there is no thaw remote at {url}: nothing was pushed there yet. Check the address, or push first."
        )
    return about


def make(bucket: Bucket, head: str) -> RemoteAbout:
    """The remote's description, made now if there is none."""
    while True:
        found = read(bucket)
        if found is not None:
            return found
        with contextlib.suppress(RemoteUncertain):
            fresh = RemoteAbout(id=str(uuid4()), head=head, writer=values.nonce())
            bucket.create(layout.ABOUT, values.encode(fresh))
