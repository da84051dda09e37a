"""Escaping: whatever a text holds, a page that shows it has no more elements, and the reader sees all of it."""

from __future__ import annotations

import unicodedata
from html.parser import HTMLParser

import pytest
from hostile import HIDDEN, MARKUP, TEXT
from hypothesis import given
from hypothesis import strategies as st

from thaw.tree.markup import Html, VisibleStream, el, is_hidden, join, text, visible

NASTY = (
    st.text()
    | st.sampled_from(MARKUP)
    | st.text(alphabet="<>&\"'=/ \n\x00\x1b\u202e\u200b\u034f\ufe0f!-;#x0", max_size=60)
)


class Seen(HTMLParser):
    """What a browser would make of a fragment."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.tags.append("!--")

    def handle_decl(self, decl: str) -> None:
        self.tags.append("!")

    def handle_pi(self, data: str) -> None:
        self.tags.append("?")

    def unknown_decl(self, data: str) -> None:
        self.tags.append("![")


@given(NASTY)
def test_text_is_text_and_nothing_else(value: str) -> None:
    seen = Seen(text(value))
    assert seen.tags == []
    assert seen.text == visible(value)


@given(NASTY)
def test_an_attribute_holds_what_was_put_into_it(value: str) -> None:
    seen = Seen(el("i", value, title=value, data_point=value))
    assert seen.tags == ["i"]
    assert dict(seen.attributes) == {"title": visible(value), "data-point": visible(value)}


@given(st.lists(NASTY, max_size=5))
def test_pieces_stand_one_after_the_other(values: list[str]) -> None:
    seen = Seen(el("p", *(el("b", value) for value in values)))
    assert seen.tags == ["p", *("b" for _ in values)]
    assert seen.text == "".join(map(visible, values))


@given(NASTY)
def test_nothing_that_hides_or_steers_is_left(value: str) -> None:
    shown = visible(value)
    assert not [one for one in shown if is_hidden(one)]
    left_as_it_is = {"\n", "\t", "\u200c", "\u200d"}
    bad = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
    assert all(one in left_as_it_is or unicodedata.category(one) not in bad for one in shown)


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=80))
def test_plain_text_is_shown_as_it_is(value: str) -> None:
    assert visible(value) == value


def test_hidden_characters_are_named() -> None:
    shown = visible(HIDDEN)
    for name in ("⟨U+202E⟩", "⟨U+2066⟩", "⟨U+200B⟩", "␛", "␀", "␡", "⟨U+00AD⟩", "⟨U+2028⟩", "⟨U+FEFF⟩", "⟨U+E0041⟩"):
        assert name in shown


SMUGGLED = "".join(chr(0xE0100 + byte) for byte in b"ignore")
"""Bytes as variation selectors: a text that carries them looks as it would without."""


def test_what_hides_as_a_mark_or_as_nothing_is_named() -> None:
    for one in ("\u034f", "\u17b4", "\u180b", "\u2065", "\ufff3", "\uffff", "\U000e01f0", "\U000e0080", "\U0001d159"):
        assert visible(f"a{one}b") == f"a⟨U+{ord(one):04X}⟩b"
    assert visible(f"a{SMUGGLED}") == "a" + "".join(f"⟨U+{ord(one):X}⟩" for one in SMUGGLED)
    assert visible("a\ufe00\ufe01\ufe02") == "a\ufe00⟨U+FE01⟩⟨U+FE02⟩" and visible(" \ufe0f") == " ⟨U+FE0F⟩"


def test_a_variant_of_a_character_is_shown_as_it_is() -> None:
    for one in ("❤\ufe0f", "1\ufe0f\u20e3", "葛\U000e0100", "\U0001f469\u200d❤\ufe0f\u200d\U0001f468"):
        assert visible(one) == one


@given(st.lists(NASTY | st.text(alphabet="a\r\n\u200b\ufe0f\U000e0100葛 ", max_size=6), max_size=6))
def test_a_stream_is_shown_as_the_whole_wherever_it_is_cut(pieces: list[str]) -> None:
    stream = VisibleStream()
    assert "".join([*map(stream.push, pieces), stream.end()]) == visible("".join(pieces))


def test_only_markup_of_ours_is_markup() -> None:
    """The check on the check: what is handed in as markup is put in as it is."""
    assert Seen(join(Html("<b>x</b>"))).tags == ["b"]
    assert Seen(join("<b>x</b>")).tags == []
    assert Seen(TEXT).tags != []


def test_no_handler_can_be_an_attribute() -> None:
    for name in ("onclick", "on_load", "Style", "a b"):
        with pytest.raises(AssertionError):
            el("p", **{name: "x"})


def test_a_line_break_at_the_begin_is_kept() -> None:
    """A browser drops the first one after <pre>."""
    assert el("pre", "\nx") == "<pre>\n\nx</pre>"
