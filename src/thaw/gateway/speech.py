"""What a model says, as text, thoughts and calls of tools, in the forms that are read here, without an engine.

    --tool-calls hermes   <tool_call>{"name": …, "arguments": {…}}</tool_call>, as Hermes, Qwen and SmolLM write it
    --reasoning think     <think>…</think>, or …</think> where the prompt has opened it
    none                  everything is text

A call that cannot be read is given as the text that it is: nothing is lost, and the client sees what was said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, Protocol, TypeAlias

import msgspec


class Text(msgspec.Struct, frozen=True, array_like=True, tag="text"):
    text: str


class Thought(msgspec.Struct, frozen=True, array_like=True, tag="thought"):
    """What was thought before the answer."""

    text: str


class ToolCall(msgspec.Struct, frozen=True, array_like=True, tag="call"):
    """`arguments` is JSON text, as it was said."""

    name: str
    arguments: str


Said: TypeAlias = Text | Thought | ToolCall


class TextReader(Protocol):
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
        keep = _begun(self._held, self.OPEN)
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


class ThinkTags:
    """Holds back what may be a tag. `opened`: the prompt ends inside a thought."""

    OPEN, CLOSE = "<think>", "</think>"

    def __init__(self, *, opened: bool) -> None:
        self._held = ""
        self._state: Literal["before", "inside", "blanks", "behind"] = "inside" if opened else "before"
        self._first = opened
        """Line breaks that begin a thought are the format's."""

    def push(self, text: str) -> Iterator[Said]:
        self._held += text
        if self._state == "before":
            yield from self._begin()
        if self._state == "inside":
            yield from self._think()
        if self._state == "blanks":
            self._held = self._held.lstrip("\n")
            self._state = "behind" if self._held else "blanks"
        if self._state == "behind" and self._held:
            yield Text(self._held)
            self._held = ""

    def end(self) -> Iterator[Said]:
        if self._held and self._state != "blanks":
            yield Thought(self._held) if self._state == "inside" else Text(self._held)
        self._held = ""

    def _begin(self) -> Iterator[Said]:
        """A thought comes first or not at all."""
        said = self._held.lstrip()
        if said.startswith(self.OPEN):
            self._held, self._state, self._first = said[len(self.OPEN) :], "inside", True
        elif not self.OPEN.startswith(said):
            self._state = "behind"
        return iter(())

    def _think(self) -> Iterator[Said]:
        if self._first:
            self._held = self._held.lstrip("\n")
            self._first = not self._held
        thought, closed, behind = self._held.partition(self.CLOSE)
        if not closed:
            sure = len(self._held) - _begun(self._held, self.CLOSE)
            sure = len(self._held[:sure].rstrip("\n"))
            thought, behind = self._held[:sure], self._held[sure:]
        thought = thought.rstrip("\n") if closed else thought
        self._held, self._state = behind, "blanks" if closed else "inside"
        if thought:
            yield Thought(thought)


def _begun(text: str, mark: str) -> int:
    """How many of its last characters may be the beginning of `mark`."""
    return next(n for n in reversed(range(len(mark))) if text.endswith(mark[:n]))


NONE = "none"
CALLS: dict[str, Callable[[], TextReader]] = {"hermes": Hermes}
THINK = "think"


class TextReaders:
    """Thoughts first, then calls in what follows them."""

    def __init__(self, tools: str, reasoning: str, *, opened: bool) -> None:
        self._thoughts: TextReader = ThinkTags(opened=opened) if reasoning == THINK else PlainSpeech()
        self._calls = CALLS.get(tools, PlainSpeech)()

    def push(self, text: str) -> Iterator[Said]:
        for said in self._thoughts.push(text):
            yield from self._calls.push(said.text) if isinstance(said, Text) else (said,)

    def end(self) -> Iterator[Said]:
        for said in self._thoughts.end():
            yield from self._calls.push(said.text) if isinstance(said, Text) else (said,)
        yield from self._calls.end()


class ForcedCalls(msgspec.Struct, frozen=True):
    """Calls that the model has to write, as JSON: the arguments of the one that is named, or a list of calls."""

    names: tuple[str, ...]
    named: bool


class ForcedReader:
    """Reads them at the end. What is no call, because it was cut short, is text."""

    def __init__(self, forced: ForcedCalls) -> None:
        self._forced, self._held = forced, ""

    def push(self, text: str) -> Iterator[Said]:
        self._held += text
        return iter(())

    def end(self) -> Iterator[Said]:
        held, self._held = self._held, ""
        try:
            found = json.loads(held)
            calls = [(self._forced.names[0], found)] if self._forced.named else [
                (call["name"], call["parameters"]) for call in found
            ]  # fmt: skip
        except (ValueError, TypeError, KeyError, RecursionError):
            calls = []
        if not calls or not all(isinstance(arguments, dict) for _, arguments in calls):
            yield from [Text(held)] if held else []
            return
        for name, arguments in calls:
            yield ToolCall(str(name), json.dumps(arguments, ensure_ascii=False))


def merged_said(all_said: Iterable[Said]) -> list[Said]:
    """Neighbouring texts are one, and neighbouring thoughts."""
    out: list[Said] = []
    for said in all_said:
        last = out[-1] if out else None
        if isinstance(said, Text) and isinstance(last, Text):
            out[-1] = Text(last.text + said.text)
        elif isinstance(said, Thought) and isinstance(last, Thought):
            out[-1] = Thought(last.text + said.text)
        else:
            out.append(said)
    return out


def read_all(reader: TextReader, text: str) -> list[Said]:
    """What a whole text says."""
    return merged_said([*reader.push(text), *reader.end()])
