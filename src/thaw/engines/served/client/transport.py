"""How requests reach an engine: one small interface, an implementation for each way in."""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from thaw.core.errors import Unsupported
from thaw.engines.served.mailbox import Mailbox
from thaw.engines.served.protocol import EngineFacts, Message

LogprobsOfToken = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter as a server knows it: by its name, where it is read from, and the id of its content."""

    name: str
    folder: str
    id: str


@dataclass(frozen=True)
class Submission:
    """One request. `sampling`: fields of vLLM's SamplingParams; `salt` None: blocks are shared with everybody."""

    name: str
    tokens: list[int]
    sampling: dict[str, Any]
    salt: str | None
    message: Message
    adapter: ServedAdapter | None = None


@dataclass(frozen=True)
class Chunk:
    """News of a request: tokens with their log probabilities (`tops[i]` are all that came for token i), and with the
    last one why it ended."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    tops: tuple[LogprobsOfToken, ...] = ()
    finish_reason: str | None = None
    more: dict[str, Any] = field(default_factory=dict)


class Transport(abc.ABC):
    """All methods run on the client's event loop, except `connect`, which may block."""

    mail: Mailbox
    facts: EngineFacts
    always_served: ClassVar[bool] = True
    """Whether the engine takes a request at any time; else only while its owner waits for a verb of thaw's."""
    stays: bool = True
    """Whether the engine goes on when this client closes."""

    @abc.abstractmethod
    async def connect(self) -> None:
        """Reach the engine and learn its facts. Raises `NotFound` when no thaw connector answers."""

    @abc.abstractmethod
    def stream(self, submission: Submission) -> AsyncIterator[Chunk]:
        """Send the request and give its news. Raises `EngineDied` when the engine is gone."""

    @abc.abstractmethod
    async def abort(self, name: str) -> None: ...

    async def collective_rpc(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Call a method of every worker. Raises `Unsupported` where this way in does not reach them."""
        raise Unsupported("this engine is reached by requests only; call collective_rpc where it runs")

    async def reload_weights(self, folder: str) -> None:
        """Have every worker load the weights of `folder` in place, and the engine empty its own cache. Raises
        `Unsupported` where this way in cannot, `InvalidRequest` where the engine refuses."""
        raise Unsupported("the weights of this engine cannot be changed from here; change them where it runs")

    async def sleep(self, level: int) -> None:
        """Put the engine to sleep by its own sleep mode; nothing of thaw's runs there. Raises `Unsupported`."""
        raise Unsupported("this engine cannot be put to sleep from here; do it where it runs")

    async def wake(self, level: int) -> None:
        """Wake it, with the weights that ran. Raises as `sleep`."""
        raise Unsupported("this engine cannot be woken from here; do it where it runs")

    async def post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """Call one of the server's own routes. Raises `Unsupported` where this way in has none."""
        raise Unsupported(f"this engine has no route {route}; call what it stands for where it runs")

    async def adapters(self) -> dict[str, str]:
        """The folders of the adapters that the server has, by the names that requests call them."""
        return {}

    async def load_adapter(self, name: str, folder: str) -> None:
        """Have the server load an adapter. Raises `Unsupported` where this way in cannot, `InvalidRequest` where it
        refuses."""
        raise Unsupported("adapters cannot be loaded from here; start the engine with them")

    @abc.abstractmethod
    async def close(self) -> None:
        """Let go; an engine that this transport booted ends."""
