"""HTML that escapes by construction: a `str` is text, only an `Html` is markup.

`el` and `join` make `Html` out of both. Attributes are always quoted. Text that steers what is shown around it (control
characters, direction overrides, invisible characters) is shown as what it is: U+202E becomes `⟨U+202E⟩`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from html import escape

VOID = frozenset({"meta", "input", "link", "br"})
EATS_NEWLINE = frozenset({"pre", "textarea"})
"""A browser leaves out a line break that such an element begins with, so it gets one of its own."""
_PLAIN = frozenset("\n\t\u200c\u200d")
"""Of control and format characters those that stay as they are: some scripts and emoji need the joiners."""
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\uffa0\ufdd0-\ufdef\ufff0-\uffff\U0001d159"
    "\U000e0000-\U000e00ff\U000e01f0-\U000e0fff]"
)
"""Letters, marks or nothing by their category, and nothing to see."""
_SELECTOR = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")
"""Choose a variant of the character before them, as emoji and Han characters need it; anywhere else they only hide."""
_IDEOGRAPH = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_SUSPECT = re.compile(r"[^\x20-\x7e\n\t\u00a1-\u00ac\u00ae-\u02ff\u0370-\u0377\u3040-\u30ff\u4e00-\u9fff]")
"""Everything that has to be looked at; the rest is known to be visible."""
_TAG = re.compile(r"[a-z][a-z0-9]*\Z")
_ATTRIBUTE = re.compile(r"[a-z][a-z-]*\Z")


class Html(str):
    """Markup that is safe to send as it is."""

    __slots__ = ()


Piece = str | None
"""`Html` is put in as it is, any other text escaped, None not at all."""


def visible(text: str, after: str = "") -> str:
    """`text` with every character that would not be seen spelled out. Never longer than 12 times as long. `after`: what
    comes before it."""
    text = text.replace("\r\n", "\n")

    def spelled(match: re.Match[str]) -> str:
        character, at = match[0], match.start()
        if _SELECTOR.match(character):
            return character if _selects(character, text[at - 1] if at else after[-1:]) else named(character)
        return named(character) if is_hidden(character) else character

    return _SUSPECT.sub(spelled, text)


def _selects(selector: str, before: str) -> bool:
    """Whether there is a character that it can belong to: at most one of a kind, and seen."""
    if selector >= "\U000e0100":
        return _IDEOGRAPH.match(before) is not None
    return not (before == "" or before.isspace() or _SELECTOR.match(before) or is_hidden(before))


class VisibleStream:
    """`visible` of a text that comes in pieces: wherever it is cut, the whole is shown alike."""

    def __init__(self) -> None:
        self._before, self._held = "", ""

    def push(self, piece: str) -> str:
        text = self._held + piece
        self._held = "\r" if text.endswith("\r") else ""
        text = text.removesuffix("\r")
        shown = visible(text, self._before)
        self._before = text[-1:] or self._before
        return shown

    def end(self) -> str:
        held, self._held = self._held, ""
        return visible(held)


def is_hidden(character: str) -> bool:
    """Whether it steers or hides text rather than being some."""
    if character in _PLAIN:
        return False
    return _BLANK.match(character) is not None or unicodedata.category(character) in _HIDDEN


def named(character: str) -> str:
    """How a hidden character is shown: `␛` for control characters, else its number."""
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"\u27e8U+{code:04X}\u27e9"


def text(value: str) -> Html:
    """`value` as text: visible and escaped."""
    return Html(escape(visible(value), quote=True))


def join(*pieces: Piece) -> Html:
    return Html("".join(piece if isinstance(piece, Html) else text(piece) for piece in pieces if piece is not None))


def each(pieces: Iterable[Piece]) -> Html:
    return join(*pieces)


def el(tag: str, *content: Piece, **attributes: str | int | bool | None) -> Html:
    """An element. `class_` is the attribute class, `data_id` is data-id; True is an attribute without a value, None and
    False are left out."""
    assert _TAG.match(tag), tag
    given = [(name, value) for name, value in attributes.items() if value is not None and value is not False]
    shown = "".join(_attribute(name, value) for name, value in given)
    if tag in VOID:
        return Html(f"<{tag}{shown}>")
    begin = "\n" if tag in EATS_NEWLINE else ""
    return Html(f"<{tag}{shown}>{begin}{join(*content)}</{tag}>")


def _attribute(name: str, value: str | int | bool | None) -> str:
    name = name.rstrip("_").replace("_", "-")
    assert _ATTRIBUTE.match(name) and not name.startswith("on"), name
    return f" {name}" if value is True else f' {name}="{text(str(value))}"'
