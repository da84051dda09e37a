"""Options that every served engine has, whatever way they travel into it. No engine and no torch here."""

from __future__ import annotations

import secrets
from typing import Annotated, TypeAlias, TypeVar

import msgspec

from thaw.engines.served.budget import Shares
from thaw.engines.served.mailbox import default_folder

MAX_LOGPROBS = 100
"""What `Sampling.logprobs` may ask for; vLLM, unless told, allows 20."""

NumBytes: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Seconds: TypeAlias = Annotated[float, msgspec.Meta(gt=0)]
NumReaders: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=64)]
Fraction: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1)]


class ServedSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options. An unknown one is an error, and so is a value out of its range. A rank is a process of the engine
    that has a part of the model: vLLM calls it a worker."""

    mail: str = ""
    """The folder through which client and engine leave each other files. Empty: one of this engine's own, below the
    user's runtime folder."""
    stores: dict[str, str] = {}
    """By a store's UUID, its folder of packs: the engine may read and write these from its start. A client of the same
    user adds its own."""
    arena_nbytes: NumBytes = 4 << 30
    """Host memory for the KV of sessions, of each rank. What is beyond it goes to `spill`."""
    spill: str | None = None
    """The folder of the file that holds what is beyond `arena_nbytes`. None: the system's temporary folder."""
    spill_nbytes: NumBytes = 64 << 30
    """How much that file may hold, of each rank."""
    readers: NumReaders = 0
    """Processes beside each rank's that read packs into the arena. 0: threads of the rank's own process read them."""
    caller_fraction: Fraction = 1.0
    """The part of `arena_nbytes`, of `spill_nbytes`, of the records and of the commands held at once that one client of
    thaw's may have."""
    guest_fraction: Fraction = 0.125
    """The part that all those may have together who do not share the mail folder, but may send requests (they have the
    server's API key, say)."""
    session_ttl_s: Seconds = 86_400.0
    """A session that nobody used for so long is forgotten."""
    pin_fraction: Fraction = 0.25
    """At most this part of the engine's own KV cache may be pinned."""
    pin_seconds: Seconds = 600.0
    """A pin ends by itself after so long."""
    enabled: bool = True
    """Off: thaw is loaded and refuses its requests; all others run as they would without it."""

    def shares(self) -> Shares:
        return Shares(self.caller_fraction, self.guest_fraction)


S = TypeVar("S", bound=ServedSettings)


def settled(settings: S) -> S:
    """`settings` with a mail folder of its own where none was named, so that all who read them use the same one."""
    if settings.mail:
        return settings
    return msgspec.structs.replace(settings, mail=str(default_folder(secrets.token_hex(8))))


def changed(settings: ServedSettings) -> dict[str, object]:
    """The options that differ from their defaults, as plain values."""
    plain: dict[str, object] = msgspec.to_builtins(settings)
    usual = msgspec.to_builtins(type(settings)())
    return {name: value for name, value in plain.items() if value != usual[name]}
