"""What the gateway and a parser's process say to one another: a line of JSON each way, answered in order."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from thaw.gateway.speech import Said


class OpenParse(msgspec.Struct, frozen=True, tag="open"):
    """A completion begins. `tail`: the end of the prompt's text; `variables`: of the template."""

    stream: int
    tools: tuple[dict[str, Any], ...]
    variables: dict[str, Any]
    prompt_ids: tuple[int, ...]
    tail: str


class PushParse(msgspec.Struct, frozen=True, tag="push"):
    """More of it. `whole`: this is all of it, and it was not streamed."""

    stream: int
    text: str
    token_ids: tuple[int, ...]
    finished: bool
    whole: bool = False


class CloseParse(msgspec.Struct, frozen=True, tag="close"):
    stream: int


ParseMessage: TypeAlias = OpenParse | PushParse | CloseParse


class ParseReply(msgspec.Struct, frozen=True):
    """`error`: the kind of what the parser raised; its message may hold what was said."""

    said: tuple[Said, ...] = ()
    error: str = ""


class ParserReady(msgspec.Struct, frozen=True):
    """The first line: it is ready, or why not."""

    error: str = ""
