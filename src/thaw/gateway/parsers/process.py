"""The gateway's end of a parser's process. It is started when it is first needed, and again after it ended.

Used by one event loop. A completion whose process ended is sent to the next one from its start, so nothing is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence
from itertools import count
from typing import Any

import msgspec

from thaw.core.errors import EngineDied, InvalidRequest
from thaw.data.fresh_process import with_this_thaw
from thaw.gateway.parsers.registry import modules
from thaw.gateway.parsers.wire import CloseParse, OpenParse, ParseMessage, ParseReply, ParserReady, PushParse
from thaw.gateway.speech import Said
from thaw.gateway.speech import Text as SaidText

READY_S = 120.0
ANSWER_S = 30.0
LINE_NBYTES = 64 << 20
TRIES = 3
"""Of a push: the process may have ended before it, and again with it."""
log = logging.getLogger("thaw.gateway")


class ParserProcess:
    """`engine`: one that has parsers (`registry`); `tools` and `reasoning`: their names, "" for none."""

    def __init__(self, python: str, engine: str, model: str, tools: str, reasoning: str) -> None:
        self._python, self._engine, self._words = python, engine, (modules()[engine], model, tools, reasoning)
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._numbers = count()
        self.generation = 0
        """Of the process: another number is another process, which knows nothing of what was said to the one before."""

    def number(self) -> int:
        """Of a completion; no other one has it."""
        return next(self._numbers)

    async def start(self) -> None:
        """Raises `InvalidRequest` with what its Python says where it cannot run."""
        async with self._lock:
            await self._started()

    async def ask(self, message: ParseMessage, generation: int | None = None) -> ParseReply:
        """Raises `EngineDied` where it ends or says nothing for `ANSWER_S`, and where it is not that of `generation`.
        Who asks next gets another process."""
        async with self._lock:
            process = await self._started()
            if generation not in (None, self.generation):
                raise EngineDied(f"the process of {self._engine}'s parsers has been replaced by another")
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(msgspec.json.encode(message) + b"\n")
                await process.stdin.drain()
                line = await asyncio.wait_for(process.stdout.readline(), ANSWER_S)
                return msgspec.json.decode(line, type=ParseReply)
            except (OSError, asyncio.TimeoutError, msgspec.DecodeError, asyncio.CancelledError) as error:
                await self._end()
                if isinstance(error, asyncio.CancelledError):
                    raise
                raise EngineDied(f"the process of {self._engine}'s parsers ended ({type(error).__name__})") from None

    async def close(self) -> None:
        async with self._lock:
            await self._end()

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await self._start()
            self.generation += 1
        return self._process

    async def _start(self) -> asyncio.subprocess.Process:
        command = (self._python, "-m", "thaw.gateway.parsers.child", *self._words)
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, env=with_this_thaw(os.environ), limit=LINE_NBYTES
            )
        except OSError as error:
            raise InvalidRequest(f"--python {self._python}: it cannot be run ({error.strerror})") from None
        assert process.stdout is not None
        ready = ParserReady("it ended, or did not get ready")
        with contextlib.suppress(asyncio.TimeoutError, msgspec.DecodeError):
            ready = msgspec.json.decode(await asyncio.wait_for(process.stdout.readline(), READY_S), type=ParserReady)
        if ready.error:
            await _killed(process)
            raise InvalidRequest(
                f"{self._engine}'s parsers do not run in {self._python}: {ready.error}. Name the Python that has "
                f"{self._engine} and thaw with --python"
            )
        return process

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await _killed(process)


async def _killed(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


class ProcessReader:
    """A completion, as that process reads it. Where its parser fails, the rest is text."""

    def __init__(
        self, process: ParserProcess, tools: Sequence[dict[str, Any]], variables: dict[str, Any],
        prompt_ids: tuple[int, ...], tail: str,
    ) -> None:  # fmt: skip
        self._process = process
        self._opened = OpenParse(process.number(), tuple(tools), variables, prompt_ids, tail)
        self._text, self._ids = "", list[int]()
        self._generation = 0
        self._failed = False

    async def push(self, text: str, token_ids: Sequence[int]) -> list[Said]:
        return await self._push(text, token_ids, finished=False)

    async def end(self) -> list[Said]:
        return await self._push("", (), finished=True)

    async def whole(self, text: str, token_ids: Sequence[int]) -> list[Said]:
        return await self._push(text, token_ids, finished=True, whole=True)

    async def close(self) -> None:
        if self._generation == self._process.generation:
            with contextlib.suppress(EngineDied, InvalidRequest):
                await self._process.ask(CloseParse(self._opened.stream), self._generation)

    async def _push(self, text: str, token_ids: Sequence[int], *, finished: bool, whole: bool = False) -> list[Said]:
        told = [SaidText(text)] if text else []
        if self._failed:
            return list(told)
        pushed = PushParse(self._opened.stream, text, tuple(token_ids), finished, whole)
        for _ in range(TRIES):
            with contextlib.suppress(EngineDied):
                await self._begin()
                reply = await self._process.ask(pushed, self._generation)
                break
        else:
            reply = ParseReply(error="EngineDied")
        self._text, self._ids = self._text + text, [*self._ids, *token_ids]
        if reply.error:
            self._failed = True
            log.warning("a parser failed (%s); the rest of its completion is text", reply.error)
            return list(told)
        return list(reply.said)

    async def _begin(self) -> None:
        """The process knows all that came before."""
        if self._generation and self._generation == self._process.generation:
            return
        await self._process.ask(self._opened)
        self._generation = self._process.generation
        if self._text:
            before = PushParse(self._opened.stream, self._text, tuple(self._ids), finished=False)
            await self._process.ask(before, self._generation)
