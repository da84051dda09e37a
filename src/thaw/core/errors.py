"""The one exception tree, grouped by what the caller does next.

    ThawError
    ├── InvalidRequest          change the call: it can never work as written
    │   ├── BadPoint            the point is misspelled
    │   ├── BadSampling         a sampling parameter is out of range or not supported
    │   ├── NotFound            no such ref, commit, session, engine, file
    │   │   └── NotFetched      a commit that a shallow fetch left in its remote
    │   ├── TooLong             more tokens than the model or the limit allows
    │   └── Unsupported         this engine or model cannot do it; the message says what
    ├── Refused                 fail closed: bytes exist, but using them would be wrong
    │   ├── IdentityMismatch    different weights, dtype, rope, tokenizer, adapter or layout
    │   ├── IncompleteModel     a model's files are truncated, missing, or do not match its config
    │   ├── NotKept             the window or state that the point needs was not kept
    │   ├── PolicyMismatch      the KV belongs to another policy version
    │   └── StaleSession        the weights changed under a live session
    ├── Conflict                somebody else was first; check, then try again
    │   ├── RefConflict         a ref moved since it was read
    │   └── Busy                the session or repository is in use
    ├── Damaged                 stored bytes are not what was written; run `thaw fsck`
    │   ├── CorruptBlob         a blob, pack or object fails its hash or its format
    │   ├── CorruptDatabase     the index is lost or unreadable (`thaw fsck --rebuild`)
    │   └── NewerFormat         written by a newer thaw; upgrade
    ├── StorageFailed           the disk is full or read-only, or there is no permission
    ├── LawBroken               a restore did not do what thaw guarantees
    │   └── NotHit              the engine did not count the restored tokens as cached
    ├── RemoteError             a remote did not do what it was asked; nothing here has changed
    │   ├── RemoteDenied        credentials are missing, wrong, or lack a right
    │   ├── RemoteMissing       the bucket, or an object that must be in it, is not there or is shorter
    │   ├── RemoteUncertain     a write's answer was lost, and whether it was made cannot be told; read, then decide
    │   ├── RemoteUnreachable   no answer, or the server failed, through all retries; try again
    │   └── RemoteUnsafe        its conditional writes do not hold: refs would be lost; use another store
    └── Stopped                 the work stopped before it was done
        ├── Cancelled           the caller asked for it
        ├── TimedOut            the caller's time limit ran out
        └── EngineDied          the engine closed or failed

Each class has a stable `kind` (what `--json` and logs carry) and an `exit_code` for the command line.
A message says what happened, with the values, and what to do.
"""

from __future__ import annotations

from typing import ClassVar


class ThawError(Exception):
    """Base of everything thaw raises on purpose."""

    kind: ClassVar[str] = "thaw"
    exit_code: ClassVar[int] = 1


class InvalidRequest(ThawError):
    kind = "invalid-request"
    exit_code = 2


class BadPoint(InvalidRequest):
    kind = "bad-point"


class BadSampling(InvalidRequest):
    kind = "bad-sampling"


class NotFound(InvalidRequest):
    kind = "not-found"


class NotFetched(NotFound):
    """A commit of a remote that a shallow fetch left there."""

    kind = "not-fetched"


class TooLong(InvalidRequest):
    kind = "too-long"


class Unsupported(InvalidRequest):
    kind = "unsupported"


class Refused(ThawError):
    kind = "refused"
    exit_code = 3


class IdentityMismatch(Refused):
    """The state and the engine differ in `field`; `stored` and `running` are the two values."""

    kind = "identity-mismatch"

    def __init__(self, message: str, *, field: str = "", stored: str = "", running: str = "") -> None:
        super().__init__(message)
        self.field = field
        self.stored = stored
        self.running = running


class IncompleteModel(Refused):
    """What would run is not what the files say: a tensor would be random, left out, or of another shape."""

    kind = "incomplete-model"


class NotKept(Refused):
    """On models with sliding windows or recurrent states not every token can be gone on from."""

    kind = "not-kept"
    way_out = (
        "have what comes after the nearest earlier point read again (`reread`), or append the tokens to a new session"
    )
    """Of a live session, beside its points."""


class PolicyMismatch(Refused):
    kind = "policy-mismatch"


class StaleSession(Refused):
    """Only its KV: what the session said can still be read."""

    kind = "stale-session"
    way_out = (
        "Its tokens, text and trajectory can still be read. To go on, open a session and append its tokens again, or "
        "hydrate a commit with policy='recompute'."
    )


class Conflict(ThawError):
    kind = "conflict"
    exit_code = 4


class RefConflict(Conflict):
    kind = "ref-conflict"


class Busy(Conflict):
    kind = "busy"


class Damaged(ThawError):
    kind = "damaged"
    exit_code = 5


class CorruptBlob(Damaged):
    kind = "corrupt-blob"


class CorruptDatabase(Damaged):
    kind = "corrupt-database"


class NewerFormat(Damaged):
    kind = "newer-format"


class StorageFailed(ThawError):
    kind = "storage-failed"
    exit_code = 6


class LawBroken(ThawError):
    kind = "law-broken"
    exit_code = 7


class NotHit(LawBroken):
    kind = "not-hit"


class RemoteError(ThawError):
    kind = "remote-error"
    exit_code = 9


class RemoteDenied(RemoteError):
    kind = "remote-denied"


class RemoteMissing(RemoteError):
    kind = "remote-missing"


class RemoteUncertain(RemoteError):
    kind = "remote-uncertain"


class RemoteUnreachable(RemoteError):
    kind = "remote-unreachable"


class RemoteUnsafe(RemoteError):
    kind = "remote-unsafe"


class Stopped(ThawError):
    kind = "stopped"
    exit_code = 8


class Cancelled(Stopped):
    kind = "cancelled"


class TimedOut(Stopped):
    kind = "timed-out"


class EngineDied(Stopped):
    kind = "engine-died"
