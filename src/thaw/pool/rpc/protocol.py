"""What a pool and an engine's host process say to one another: msgpack over a socket pair (`connection.py`).

A message is a call of the engine contract (its answer carries the same `id`), or news of one. Only small values
travel: sessions, plans, tokens, deltas. KV goes between the engine and the tiers that a plan names.
"""

from __future__ import annotations

from typing import Any

import msgspec

from thaw.core.canonical import U64
from thaw.core.errors import EngineDied, IdentityMismatch, ThawError
from thaw.core.identity import ModelIdentity
from thaw.core.objects import Chat
from thaw.engines.base import (
    Captured,
    CapturePlan,
    Completion,
    Delta,
    EngineInfo,
    GenerateRequest,
    Hydrated,
    HydratePlan,
    SessionRef,
    SessionView,
)
from thaw.engines.error_kinds import made

PROTOCOL = 3


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    id: int


class Boot(_Message, frozen=True, kw_only=True, tag=True):
    """The first message: which engine to load. `update` is a function to run before it is used (see `Invoke`)."""

    protocol: int
    engine: str
    options: dict[str, Any]


class Open(_Message, frozen=True, kw_only=True, tag=True):
    seed: int | None = None
    salt: str | None = None
    share_prefix: bool = False


class Append(_Message, frozen=True, kw_only=True, tag=True):
    session: SessionRef
    token_ids: tuple[int, ...]
    text: str = ""
    role: str | None = None
    chat: Chat | None = None


class Generate(_Message, frozen=True, kw_only=True, tag=True):
    requests: tuple[GenerateRequest, ...]


class Capture(_Message, frozen=True, kw_only=True, tag=True):
    session: SessionRef
    plan: CapturePlan


class Hydrate(_Message, frozen=True, kw_only=True, tag=True):
    plan: HydratePlan


class Fork(_Message, frozen=True, kw_only=True, tag=True):
    session: SessionRef
    n: int
    at: int | None = None
    replay: bool = False
    seeds: tuple[int, ...] | None = None


class View(_Message, frozen=True, kw_only=True, tag=True):
    session: SessionRef


class Park(_Message, frozen=True, kw_only=True, tag=True):
    session: SessionRef


class CloseSession(_Message, frozen=True, kw_only=True, tag=True):
    session: SessionRef


class SetPolicy(_Message, frozen=True, kw_only=True, tag=True):
    version: str


class Identity(_Message, frozen=True, kw_only=True, tag=True):
    """Ask for the running model's identity."""


class Encode(_Message, frozen=True, kw_only=True, tag=True):
    text: str
    first: bool


class Decode(_Message, frozen=True, kw_only=True, tag=True):
    """`settled`: without a character at the end that has only begun."""

    token_ids: tuple[int, ...]
    skip_special_tokens: bool = True
    settled: bool = False


class ChatText(_Message, frozen=True, kw_only=True, tag=True):
    """Render a conversation; `moment` is the time that the template reads, ISO 8601."""

    messages: tuple[dict[str, Any], ...]
    add_generation_prompt: bool
    tools: tuple[dict[str, Any], ...] | None = None
    variables: dict[str, Any] | None = None
    moment: str | None = None


class EncodeChat(_Message, frozen=True, kw_only=True, tag=True):
    """`inside`: it is a piece that stands behind other text."""

    text: str
    inside: bool = False


class Invoke(_Message, frozen=True, kw_only=True, tag=True):
    """Run `module:function` on the engine, with keyword arguments, in its process: how weights are synced. What it
    returns are plain values."""

    function: str
    arguments: dict[str, Any] = {}


class Cancel(_Message, frozen=True, kw_only=True, tag=True):
    """Stop call `id`."""


class Ping(_Message, frozen=True, kw_only=True, tag=True):
    """Answered at once, whatever the engine does."""


class Bye(_Message, frozen=True, kw_only=True, tag=True):
    """Close the engine and end."""


Call = (
    Boot | Open | Append | Generate | Capture | Hydrate | Fork | View | Park | CloseSession | SetPolicy | Identity
    | Encode | Decode | ChatText | EncodeChat | Invoke | Cancel | Ping | Bye
)  # fmt: skip


class Booted(msgspec.Struct, frozen=True, kw_only=True):
    """The engine of a host process."""

    info: EngineInfo
    options: dict[str, Any]
    policy_version: str
    pid: int


class Settled(_Message, frozen=True, kw_only=True, tag=True):
    """The value of call `id`, of the type in `RESULTS`."""

    value: msgspec.Raw


class Failed(_Message, frozen=True, kw_only=True, tag=True):
    """The error of call `id`; `fields` are those of `IdentityMismatch`."""

    kind: str
    message: str
    fields: tuple[str, str, str] = ("", "", "")


class News(_Message, frozen=True, kw_only=True, tag=True):
    deltas: tuple[Delta, ...]


class Pong(_Message, frozen=True, kw_only=True, tag=True):
    pass


Reply = Settled | Failed | News | Pong
RESULTS: dict[type, Any] = {
    Boot: Booted,
    Open: SessionRef,
    Append: SessionView,
    Generate: list[Completion],
    Capture: Captured,
    Hydrate: Hydrated,
    Fork: list[SessionRef],
    View: SessionView,
    Park: SessionView,
    CloseSession: None,
    SetPolicy: None,
    Identity: ModelIdentity,
    Encode: list[int],
    Decode: str,
    ChatText: str,
    EncodeChat: list[int],
    Invoke: Any,
    Bye: None,
}
OUT_OF_MEMORY = "out-of-memory"


class OutOfMemory(EngineDied):
    """A worker had no memory left for a batch; the batch is tried again in halves."""


def _enc_hook(value: Any) -> Any:
    return int(value) if isinstance(value, U64) else str(value)


def _dec_hook(kind: type, value: Any) -> Any:
    return U64(value) if kind is U64 else kind(value)


ENCODER = msgspec.msgpack.Encoder(enc_hook=_enc_hook)
CALLS: msgspec.msgpack.Decoder[Call] = msgspec.msgpack.Decoder(Call, dec_hook=_dec_hook)
REPLIES: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply, dec_hook=_dec_hook)
_VALUES = {call: msgspec.msgpack.Decoder(kind, dec_hook=_dec_hook) for call, kind in RESULTS.items()}


def settled(number: int, value: Any) -> Settled:
    return Settled(id=number, value=msgspec.Raw(ENCODER.encode(value)))


def value_of(call: type, reply: Settled) -> Any:
    """The typed value of the answer to a `call`."""
    return _VALUES[call].decode(reply.value)


def failed(number: int, error: BaseException) -> Failed:
    """Any error as a message; one that thaw does not know carries its type's name."""
    if isinstance(error, IdentityMismatch):
        fields = (error.field, error.stored, error.running)
        return Failed(id=number, kind=error.kind, message=str(error), fields=fields)
    if isinstance(error, ThawError) and not isinstance(error, OutOfMemory):
        return Failed(id=number, kind=error.kind, message=str(error))
    kind = OUT_OF_MEMORY if is_out_of_memory(error) else "engine-died"
    return Failed(id=number, kind=kind, message=f"{type(error).__name__} in the engine: {str(error)[:1000]}")


def is_out_of_memory(error: BaseException) -> bool:
    """Python's own, and what torch raises (found without importing torch)."""
    return isinstance(error, (MemoryError, OutOfMemory)) or type(error).__name__ == "OutOfMemoryError"


def error_of(reply: Failed) -> ThawError:
    if reply.kind == OUT_OF_MEMORY:
        return OutOfMemory(reply.message)
    if reply.kind == IdentityMismatch.kind:
        field, stored, running = reply.fields
        return IdentityMismatch(reply.message, field=field, stored=stored, running=running)
    return made(reply.kind, reply.message)
