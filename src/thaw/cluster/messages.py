"""What is asked of a node's daemon, and what it answers. Small values alone: no KV, no tokens.

Every question may be asked again: where the answer was lost, a second one does no harm. `FetchPack` and `AttachEngine`
take their connection over after the answer: the pack's bytes follow, or the engine's own messages
(`thaw.pool.rpc.protocol`).
"""

from __future__ import annotations

from typing import Any

import msgspec

from thaw.core.errors import EngineDied, ThawError
from thaw.data.tiers.base import MissingPack
from thaw.engines.error_kinds import made


class _Question(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


class ServeStore(_Question, frozen=True, kw_only=True, tag=True):
    """Keep packs of the store `uuid`: in `folder`, which the pool gives for a store that lies on this node, or in one
    of the node's own. Answered with the folder."""

    uuid: str
    folder: str | None = None


class SpawnEngine(_Question, frozen=True, kw_only=True, tag=True):
    """An engine's process may be started by whoever shows `ticket` (`AttachEngine`)."""

    ticket: str
    name: str
    env: dict[str, str] = {}


class AttachEngine(_Question, frozen=True, kw_only=True, tag=True):
    """Start the process of `ticket` on this connection. Answered with its pid, once."""

    ticket: str


class KillEngine(_Question, frozen=True, kw_only=True, tag=True):
    ticket: str


class EngineLog(_Question, frozen=True, kw_only=True, tag=True):
    """The last lines that the process of `ticket` has written."""

    ticket: str


class PackSource(msgspec.Struct, frozen=True, kw_only=True):
    """Another node's daemon."""

    key: str
    host: str
    port: int


class PullPacks(_Question, frozen=True, kw_only=True, tag=True):
    """Have the packs `names` of a store here: those that are not are fetched, each from the first source that has it,
    hashed as they arrive."""

    uuid: str
    names: tuple[str, ...]
    sources: tuple[PackSource, ...]


class PulledPacks(msgspec.Struct, frozen=True, kw_only=True):
    """`by_source`: bytes fetched from each node, by its key; `seconds` of fetching."""

    num_packs: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    by_source: dict[str, int] = {}


class DropPacks(_Question, frozen=True, kw_only=True, tag=True):
    """Nobody needs these any more. Only from folders of the node's own."""

    uuid: str
    names: tuple[str, ...]


class ForgetStore(_Question, frozen=True, kw_only=True, tag=True):
    """Its pool is closed: a folder of the node's own goes, one that the pool gave stays as it is."""

    uuid: str


class Landing(msgspec.Struct, frozen=True, kw_only=True):
    """Memory that a pack may be pushed to: a NIXL agent, and the addresses of slots there (`nixl_agent.py`)."""

    agent: bytes
    slots: tuple[int, ...]


class PushBegun(msgspec.Struct, frozen=True, kw_only=True):
    """So many bytes come to the landing."""

    nbytes: int


class FetchPack(_Question, frozen=True, kw_only=True, tag=True):
    """Answered with the pack's size; its bytes follow. With a `landing`, and where the other side can: answered with
    `PushBegun`."""

    uuid: str
    name: str
    landing: Landing | None = None


class RenewLease(_Question, frozen=True, kw_only=True, tag=True):
    """The pool is there."""


class LookAtNode(_Question, frozen=True, kw_only=True, tag=True):
    pass


class NodeCounts(msgspec.Struct, frozen=True, kw_only=True):
    """A daemon since it began. `sent` and `received`: bytes of packs; `pushed`: those of `sent` that NIXL carried;
    `num_fallbacks`: fetches that NIXL did not carry though it was tried. `strangers`: callers that did not know the
    secret."""

    key: str
    pid: int
    folder: str
    engines: dict[str, int]
    nbytes: int
    sent_nbytes: int
    received_nbytes: int
    num_pulls: int
    num_refused: int
    strangers: int
    lease_left_s: float
    pushed_nbytes: int = 0
    num_fallbacks: int = 0


class EndNode(_Question, frozen=True, kw_only=True, tag=True):
    """The pool is closed: end the engines, remove the folder, end."""


Question = (
    ServeStore | SpawnEngine | AttachEngine | KillEngine | EngineLog | PullPacks | DropPacks | ForgetStore | FetchPack
    | RenewLease | LookAtNode | EndNode
)  # fmt: skip


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The value, or the kind and the text of an error."""

    value: Any = None
    kind: str = ""
    text: str = ""


QUESTIONS: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)
REPLIES: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
ENCODE = msgspec.msgpack.Encoder().encode


def failed(error: BaseException) -> Reply:
    """Any error as an answer."""
    if isinstance(error, ThawError):
        return Reply(kind=error.kind, text=str(error))
    return Reply(kind=EngineDied.kind, text=f"{type(error).__name__} in the node's daemon: {str(error)[:500]}")


def value_of(data: bytes) -> Any:
    """The value of an answer. Raises the error that it is."""
    reply = REPLIES.decode(data)
    if reply.kind == MissingPack.kind:
        raise MissingPack(reply.text)
    if reply.kind:
        raise made(reply.kind, reply.text)
    return reply.value
