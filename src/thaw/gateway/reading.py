"""How what a model says is read: by the readers here, or by an engine's parsers in a process of their own.

A job reads its deltas as they come, or all of them at its end if no client follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from thaw.core.errors import InvalidRequest
from thaw.engines.base import Codec, Message
from thaw.gateway.parsers.process import ParserProcess, ProcessReader
from thaw.gateway.parsers.registry import modules
from thaw.gateway.speech import CALLS, NONE, THINK, Said, TextReader, TextReaders, read_all

TAIL = 32
"""Tokens of the prompt's end that say whether it opens a thought."""


class SpeechReader(Protocol):
    """Of one completion. `push` gives what is certain by now, `end` the rest; or `whole` all of it at once."""

    async def push(self, text: str, token_ids: Sequence[int]) -> list[Said]: ...

    async def end(self) -> list[Said]: ...

    async def whole(self, text: str, token_ids: Sequence[int]) -> list[Said]: ...

    async def close(self) -> None: ...


class OwnReader:
    """The readers of `speech`, which need no process."""

    def __init__(self, make: Callable[[], TextReader]) -> None:
        self._make, self._reader = make, make()

    async def push(self, text: str, token_ids: Sequence[int]) -> list[Said]:
        return list(self._reader.push(text))

    async def end(self) -> list[Said]:
        return list(self._reader.end())

    async def whole(self, text: str, token_ids: Sequence[int]) -> list[Said]:
        return read_all(self._make(), text)

    async def close(self) -> None:
        pass


class SpeechReaders:
    """Makes them, as the settings say."""

    def __init__(self, tools: str, reasoning: str, python: str, model: str) -> None:
        """Raises `InvalidRequest` for names that are not known, or do not go together."""
        self._tools, self._reasoning = tools, reasoning
        engine = _engine_of(tools, reasoning)
        self._process: ParserProcess | None = None
        if engine is not None:
            self._process = ParserProcess(python, engine, model, _name(tools), _name(reasoning))

    async def start(self) -> None:
        """Raises `InvalidRequest` where the engine's parsers do not run."""
        if self._process is not None:
            await self._process.start()

    async def close(self) -> None:
        if self._process is not None:
            await self._process.close()

    def reader(
        self,
        codec: Codec,
        prompt_ids: tuple[int, ...],
        tools: Sequence[Message],
        variables: dict[str, Any],
        tail: str | None = None,
    ) -> SpeechReader:
        """Of the completion of a prompt. `tail`: how its text ends, where that is known better than by its tokens."""
        if tail is None:
            tail = codec.decode(prompt_ids[-TAIL:], skip_special_tokens=False) if prompt_ids else ""
        if self._process is not None:
            return ProcessReader(self._process, tools, variables, prompt_ids, tail)
        opened = self._reasoning == THINK and tail.rstrip().endswith("<think>")
        return OwnReader(lambda: TextReaders(self._tools, self._reasoning, opened=opened))


def _name(given: str) -> str:
    return "" if given == NONE else given.partition(":")[2]


def _engine_of(tools: str, reasoning: str) -> str | None:
    """Whose parsers are named; None for those here."""
    found = {
        engine
        for what, given, own in (("--tool-calls", tools, CALLS), ("--reasoning", reasoning, (THINK,)))
        if (engine := _engine(what, given, tuple(own))) is not None
    }
    theirs = found - {""}
    if not theirs:
        return None
    if len(found) > 1:
        raise InvalidRequest(
            f"--tool-calls {tools} and --reasoning {reasoning}: name parsers of one engine for both, or none for one"
        )
    return next(iter(theirs))


def _engine(what: str, given: str, own: tuple[str, ...]) -> str | None:
    """None for none, "" for one of those here."""
    if given == NONE:
        return None
    if given in own:
        return ""
    engine, _, name = given.partition(":")
    engines = modules()
    if name and engine in engines:
        return engine
    *known, last = (NONE, *own, *(f"{engine}:NAME" for engine in engines))
    raise InvalidRequest(f"{what} {given}: expected {', '.join(known)} or {last}")
