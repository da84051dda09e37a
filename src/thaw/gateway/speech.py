"""What a model says, as text and calls of tools. A reader takes the text as it comes; which one, `--tools` says.

    none     everything is text
    hermes   <tool_call>{"name": …, "arguments": {…}}</tool_call>, as Hermes, Qwen and SmolLM write it

A call that cannot be read is given as the text that it is: nothing is lost, and the client sees what was said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

import msgspec

from thaw.core.errors import InvalidRequest


class Text(msgspec.Struct, frozen=True):
    text: str


class ToolCall(msgspec.Struct, frozen=True):
    """`arguments` is JSON text, as it was said."""

    name: str
    arguments: str


Said: TypeAlias = Text | ToolCall


class Reader(Protocol):
    """Of one completion. `push` gives what is certain by now, `end` the rest."""

    def push(self, text: str) -> Iterator[Said]: ...

    def end(self) -> Iterator[Said]: ...


class PlainSpeech:
    def push(self, text: str) -> Iterator[Said]:
        if text:
            yield Text(text)

    def end(self) -> Iterator[Said]:
        return iter(())


class Hermes:
    """Holds back what may be the beginning of a call."""

    OPEN, CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self) -> None:
        self._held = ""
        self._called = False
        self._blanks = ""
        """Behind a call: of the format, unless text follows."""

    def push(self, text: str) -> Iterator[Said]:
        self._held += text
        while True:
            before, opened, rest = self._held.partition(self.OPEN)
            if not opened:
                yield from self._sure()
                return
            inside, closed, behind = rest.partition(self.CLOSE)
            yield from self._text(before)
            if not closed:
                self._held = opened + inside
                return
            self._held = behind
            yield from self._call(inside)

    def end(self) -> Iterator[Said]:
        held, self._held = self._held, ""
        yield from self._text(held)

    def _sure(self) -> Iterator[Said]:
        keep = next(n for n in reversed(range(len(self.OPEN))) if self._held.endswith(self.OPEN[:n]))
        sure, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        yield from self._text(sure)

    def _text(self, text: str) -> Iterator[Said]:
        if self._called and not text.strip():
            self._blanks += text
        elif text:
            yield Text(self._blanks + text)
            self._blanks, self._called = "", False

    def _call(self, inside: str) -> Iterator[Said]:
        try:
            said = json.loads(inside)
            name, arguments = said["name"], said.get("arguments", {})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            name = arguments = None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            yield from self._text(f"{self.OPEN}{inside}{self.CLOSE}")
            return
        self._called, self._blanks = True, ""
        yield ToolCall(name, json.dumps(arguments, ensure_ascii=False))


READERS: dict[str, Callable[[], Reader]] = {"none": PlainSpeech, "hermes": Hermes}


def reader_of(name: str) -> Callable[[], Reader]:
    if name not in READERS:
        raise InvalidRequest(f"tools={name!r}: expected one of {', '.join(READERS)}")
    return READERS[name]


def read_all(reader: Reader, text: str) -> list[Said]:
    """What a whole text says; neighbouring texts are one."""
    out: list[Said] = []
    for said in (*reader.push(text), *reader.end()):
        if isinstance(said, Text) and out and isinstance(out[-1], Text):
            out[-1] = Text(out[-1].text + said.text)
        else:
            out.append(said)
    return out
