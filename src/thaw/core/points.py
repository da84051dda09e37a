"""Points: how people name a place in history.

    main            a branch, a tag, HEAD, or an id: at least 4 of its hex digits, with or without `b3:`
    main~2          two first-parents back          main@{1}        where the branch stood one move ago
    main:turn=3     after the third turn            main:token=1200 after 1,200 tokens        main:1200   the same

`~N` and `@{N}` come before `:`; all are safe in shells (unquoted braces apart) and in URLs.
"""

from __future__ import annotations

import re

import msgspec

from thaw.core.errors import BadPoint

_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_./-]*[A-Za-z0-9_-])?\Z")
_POINT = re.compile(
    r"(?P<name>[^:~@\s]+)(?:@\{(?P<moved>\d{1,6})\})?(?:~(?P<back>\d{0,6}))?"
    r"(?::(?:(?P<what>turn|token)=)?(?P<number>\d{1,9}))?\Z"
)
MAX_NAME = 200
HELP = "Write a branch, tag or id, then ~N or @{N}, then :turn=N or :token=N, for example main~2:token=1200."


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed point; `turn` and `token` exclude one another."""

    name: str
    moved: int | None = None
    back: int = 0
    turn: int | None = None
    token: int | None = None

    def __str__(self) -> str:
        text = self.name
        if self.moved is not None:
            text += f"@{{{self.moved}}}"
        if self.back:
            text += f"~{self.back}"
        if self.turn is not None:
            text += f":turn={self.turn}"
        if self.token is not None:
            text += f":token={self.token}"
        return text


def parse(text: str) -> Point:
    """The point that `text` spells. Raises `BadPoint` with the rule."""
    match = _POINT.match(text.removeprefix("b3:")) if len(text) <= MAX_NAME + 40 else None
    if match is None:
        raise BadPoint(f"{text[:80]!r} is not a point. {HELP}")
    name, back, moved, number = match["name"], match["back"], match["moved"], match["number"]
    check_name(name)
    value = None if number is None else int(number)
    return Point(
        name=name,
        moved=None if moved is None else int(moved),
        back=0 if back is None else int(back or 1),
        turn=value if match["what"] == "turn" else None,
        token=value if match["what"] != "turn" else None,
    )


def check_name(name: str) -> str:
    """`name` if it may name a branch or tag, else `BadPoint`."""
    if len(name) > MAX_NAME or not _NAME.match(name) or ".." in name or "//" in name or name.endswith(".lock"):
        raise BadPoint(
            f"{name[:80]!r} cannot name a branch or tag: use letters, digits, '_', '-', '.', '/' "
            f"(at most {MAX_NAME}, no '..', no '//')."
        )
    return name
