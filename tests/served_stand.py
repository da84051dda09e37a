"""thaw's client of a served engine, and what it talks to: the mail, and a process that answers as an engine's would.

Nothing is computed there. As in SGLang's ranks, a message of an id is begun once, and a command's request stays open
until the client takes it back."""

from __future__ import annotations

import asyncio
import json
import os
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from thaw.core.errors import InvalidRequest, NotFound
from thaw.core.identity import ModelIdentity
from thaw.engines import load_engine
from thaw.engines.served import protocol
from thaw.engines.served.client.event_loop import LoopThread
from thaw.engines.served.client.transport import Chunk, ServedAdapter, Submission, Transport
from thaw.engines.served.mailbox import SCHEDULER, Mailbox
from thaw.engines.served.protocol import Answer, EngineFacts, Message, WorkerFacts
from thaw.engines.vllm.client.engine import VllmEngine

BY_THE_SCHEDULER = (protocol.Run, protocol.Pin, protocol.Unpin, protocol.EndRun)
FACTS: dict[str, Any] = {
    "protocol": protocol.VERSION, "thaw": "0", "version": "0", "model": "m", "dtype": "float32", "max_model_len": 4096,
    "max_logprobs": 5, "block_size": 16, "num_blocks": 100, "world_size": 1, "prefix_caching": True, "runner": "V1",
    "vocab_size": 256, "eos_token_ids": (1,), "sleep_levels": (1, 2),
}  # fmt: skip


class Stand(Transport):
    """`heard`: every message that came. `answer` says what comes of each; messages of the kind `slow` are answered once
    `go_on` is set."""

    def __init__(self, mail: Mailbox, identity: ModelIdentity, **facts: Any) -> None:
        self.mail, self.facts = mail, EngineFacts(**{**FACTS, "pid": os.getpid(), **facts})
        self.heard: list[Message] = []
        self.answer: Callable[[Any], Answer] = self.agree
        self.slow: type[Message] | None = None
        self.go_on = asyncio.Event()
        self.slept: list[int] = []
        self.folders: dict[str, str] = {}
        """Of the server's adapters, by name. Two ranks of one server have one dict."""
        for rank in range(self.facts.world_size):
            told = WorkerFacts(rank=rank, world_size=1, pid=os.getpid(), groups=identity.groups, layout={})
            mail.post(rank, told)
        mail.post(SCHEDULER, self.facts)
        self.named: list[ServedAdapter] = []
        """The adapters under which requests came."""
        self._begun: set[str] = set()
        self._over: dict[str, asyncio.Event] = {}

    @staticmethod
    def agree(message: Message) -> Answer:
        if isinstance(message, protocol.GetStats):
            return Answer(counts={"running": 0})
        return Answer(local=message.num_kv if isinstance(message, protocol.Run) else 0)

    async def connect(self) -> None:
        """It is there."""

    async def stream(self, submission: Submission) -> AsyncIterator[Chunk]:
        message, over = submission.message, self._over.setdefault(submission.name, asyncio.Event())
        if submission.adapter is not None and self.folders.get(submission.adapter.name) is None:
            raise NotFound(f"the model {submission.adapter.name!r} does not exist")
        if submission.adapter is not None:
            self.named.append(submission.adapter)
        if message.id not in self._begun:
            self._begun.add(message.id)
            self.heard.append(message)
            if self.slow is not None and isinstance(message, self.slow):
                await self.go_on.wait()
            sender = SCHEDULER if isinstance(message, BY_THE_SCHEDULER) else 0
            count = len(submission.tokens)
            answer = msgspec.structs.replace(self.answer(message), num_tokens=count + 1, num_kv=count)
            self.mail.answer(message.id, sender, answer)
        if not isinstance(message, protocol.Run):
            await over.wait()
        yield Chunk(token_ids=(7,), logprobs=(-0.5,), tops=((),), finish_reason="length")

    async def abort(self, name: str) -> None:
        self._over.setdefault(name, asyncio.Event()).set()

    async def sleep(self, level: int) -> None:
        self.slept.append(level)

    async def wake(self, level: int) -> None:
        """Nothing was taken from it."""

    async def adapters(self) -> dict[str, str]:
        return dict(self.folders)

    async def load_adapter(self, name: str, folder: str) -> None:
        """As vLLM's server has it: a name is taken once."""
        if name in self.folders:
            raise InvalidRequest(f"the LoRA adapter {name!r} has already been loaded")
        self.folders[name] = folder

    async def close(self) -> None:
        """It goes on."""


class Joined:
    """The client and its other side."""

    def __init__(self, engine: VllmEngine, stand: Stand) -> None:
        self.engine, self.stand = engine, stand

    def go_on(self) -> None:
        self.engine._loop.inner.call_soon_threadsafe(self.stand.go_on.set)

    def of(self, kind: type[Message]) -> list[Any]:
        return [message for message in self.stand.heard if isinstance(message, kind)]


@contextmanager
def joined(folder: Path, **facts: Any) -> Iterator[Joined]:
    """A client of the vLLM that says these facts of itself, with the model and the tokenizer of the fake engine."""
    with load_engine("fake") as fake:
        identity = fake.identity()
        stand = Stand(Mailbox(folder), identity, **facts)
        engine = VllmEngine(
            stand, codec=fake.codec, identity=lambda _: identity, eos_token_ids=(1,), vocab_size=256, name="m",
            policy=fake.policy_version, loop=LoopThread("stand"),
        )  # fmt: skip
        engine.options = {}
        with engine:
            yield Joined(engine, stand)


def adapter_folder(folder: Path, byte: int = 0) -> Path:
    """An adapter as PEFT writes it: one tensor, of this byte."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    header = json.dumps({"a": {"dtype": "U8", "shape": [4096], "data_offsets": [0, 4096]}}).encode()
    data = struct.pack("<Q", len(header)) + header + bytes([byte]) * 4096
    (folder / "adapter_model.safetensors").write_bytes(data)
    return folder
