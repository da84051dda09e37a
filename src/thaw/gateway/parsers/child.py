"""The process that runs an engine's parsers: `python -m thaw.gateway.parsers.child MODULE MODEL TOOLS REASONING`.

Messages come on stdin and go to what was stdout; what the engine prints goes to stderr. It ends with its input.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import IO, Any, Protocol

import msgspec

from thaw.gateway.parsers.wire import CloseParse, OpenParse, ParseMessage, ParseReply, ParserReady
from thaw.gateway.speech import Said, Thought, ToolCall
from thaw.gateway.speech import Text as SaidText


class EngineParser(Protocol):
    """Of one completion."""

    def push(self, text: str, token_ids: list[int], *, finished: bool) -> list[Said]: ...

    def whole(self, text: str, token_ids: list[int]) -> list[Said]: ...


class EngineParsers(Protocol):
    """An engine's. Names are those of its own flags; "" is none."""

    def __init__(self, model: str, tools: str, reasoning: str) -> None: ...

    def open(self, opened: OpenParse) -> EngineParser: ...


class CallParts:
    """Calls in pieces, as engines stream them, to whole ones."""

    def __init__(self) -> None:
        self._index: int | None = None
        self._name = self._arguments = ""

    def add(self, index: int, name: str | None, arguments: str | None) -> list[Said]:
        """The call before, where this one is another."""
        out = self.end() if self._index is not None and index != self._index else []
        self._index = index
        self._name = self._name or name or ""
        self._arguments += arguments or ""
        return out

    def end(self) -> list[Said]:
        done: list[Said] = [ToolCall(self._name, self._arguments or "{}")] if self._index is not None else []
        self._index, self._name, self._arguments = None, "", ""
        return done


def said_of(thought: str | None, text: str | None) -> list[Said]:
    out: list[Said] = [Thought(thought)] if thought else []
    return [*out, SaidText(text)] if text else out


def main() -> None:
    module, model, tools, reasoning = sys.argv[1:]
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        parsers = importlib.import_module(module).PARSERS(model, tools, reasoning)
    except Exception as error:  # noqa: BLE001 - the gateway says it
        _tell(out, ParserReady(f"{type(error).__name__}: {error}"))
        return
    _tell(out, ParserReady())
    _serve(parsers, out)


def _serve(parsers: EngineParsers, out: IO[bytes]) -> None:
    read = msgspec.json.Decoder(ParseMessage)
    streams: dict[int, EngineParser] = {}
    for line in sys.stdin.buffer:
        message: ParseMessage = read.decode(line)
        try:
            said = _answer(parsers, streams, message)
        except Exception as error:  # noqa: BLE001 - the rest of that completion is text
            _tell(out, ParseReply(error=type(error).__name__))
        else:
            _tell(out, ParseReply(tuple(said)))


def _answer(parsers: EngineParsers, streams: dict[int, EngineParser], message: ParseMessage) -> list[Said]:
    if isinstance(message, OpenParse):
        streams[message.stream] = parsers.open(message)
        return []
    if isinstance(message, CloseParse):
        streams.pop(message.stream, None)
        return []
    stream = streams[message.stream]
    if message.whole:
        return stream.whole(message.text, list(message.token_ids))
    return stream.push(message.text, list(message.token_ids), finished=message.finished)


def _tell(out: IO[bytes], message: Any) -> None:
    out.write(msgspec.json.encode(message) + b"\n")
    out.flush()


if __name__ == "__main__":
    main()
