"""What an object store's failures mean: obstore's errors as thaw's own.

Their texts are never passed on: they hold whole URLs, and a URL may hold a signature. What is taken from them is the
HTTP status, the store's own code for it (`SlowDown`), and the kind of a broken connection.
"""

from __future__ import annotations

import re

from thaw.core.errors import RemoteDenied, RemoteError, RemoteMissing, RemoteUnreachable

REPAIR = (
    "If that stays so, delete the branches that need it there (`thaw forget --remote`), then push them again from "
    "where they still are."
)
"""What to do about data of a remote that is missing or damaged. A push alone does not send it again: the branch is
where it should be."""
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_BROKEN = re.compile(r"kind: (Connect|Timeout|Request|Interrupted|Decode|Unknown)\b")
_PROVIDER = re.compile(r"credential provider: (\w{1,64})")
_NO_BUCKET = frozenset({"NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted"})
_BUSY = frozenset({408, 425, 429})
"""Statuses below 500 after which it is worth trying again."""


class Failure:
    """One failed request: what is known of it, apart from its text."""

    def __init__(self, error: Exception) -> None:
        text = str(error)
        self.name = type(error).__name__
        found, code, broken = _STATUS.search(text), _CODE.search(text), _BROKEN.search(text)
        self.status = int(found[1]) if found else None
        self.code = code[1] if code else ""
        provider = _PROVIDER.search(text)
        self.provider = provider[1] if provider else ""
        self.broken = broken[1].lower() if broken else ""

    @property
    def missing(self) -> bool:
        """The object is not there; its bucket is, as far as the store says."""
        return self.name == "FileNotFoundError" and not self.no_bucket

    @property
    def no_bucket(self) -> bool:
        return self.code in _NO_BUCKET or (self.status == 404 and "ucket" in self.code)

    @property
    def conflict(self) -> bool:
        """409: another write was under way, and this one was not made. It says nothing about what is there now."""
        return self.status == 409

    @property
    def refused_condition(self) -> bool:
        """412: the condition does not hold. Where the object is gone S3 says 404, and Azure says 409 to a create."""
        return self.name in ("PreconditionError", "AlreadyExistsError", "NotModifiedError") and not self.no_bucket

    @property
    def denied(self) -> bool:
        return self.name in ("PermissionDeniedError", "UnauthenticatedError") or self.status in (401, 403)

    @property
    def transient(self) -> bool:
        """Worth another try; a write may have been made, or not."""
        if self.status is not None:
            return (self.status >= 500 and self.status != 501) or self.status in _BUSY
        return self.name == "GenericError" and bool(self.broken)

    @property
    def leaves_it_open(self) -> bool:
        """Of a conditional write: what is there now tells whether to try again."""
        if self.no_bucket or self.denied:
            return False
        return self.transient or self.conflict or self.refused_condition or self.missing

    def __str__(self) -> str:
        if self.status is not None:
            return f"HTTP {self.status}" + (f" {self.code}" if self.code else "")
        if self.provider:
            return self.provider
        words = {"connect": "no connection", "timeout": "no answer in time", "decode": "an answer that broke off"}
        return words.get(self.broken, "the connection broke") if self.broken else self.name


def remote_error(failure: Failure, doing: str, url: str) -> RemoteError:
    """The error that says what `failure` means for `doing` (as in "read refs/main") at `url`."""
    what = f"cannot {doing} at {url}: {failure}"
    if failure.no_bucket:
        return RemoteMissing(f"{what}. There is no such bucket: make it, or check its name and the endpoint.")
    if failure.denied:
        return RemoteDenied(
            f"{what}. The credentials are wrong, have expired, or lack this right: check the profile (aws sso login) "
            "or the keys in the environment, and the endpoint and region that they are for."
        )
    if failure.transient or failure.conflict:
        return RemoteUnreachable(f"{what}. It was tried several times: check the endpoint and the network, then retry.")
    if failure.status in (301, 307, 400):
        return RemoteError(
            f"{what}. The endpoint, region or path style may be those of another store: check the options."
        )
    return RemoteError(f"{what}. The store would not do it.")
