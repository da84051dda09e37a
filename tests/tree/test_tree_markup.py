"""Escaping: whatever a text holds, a page that shows it has no more elements, and the reader sees all of it."""

from __future__ import annotations

import unicodedata
from html.parser import HTMLParser

import pytest
from hostile import HIDDEN, MARKUP, TEXT
from hypothesis import given
from hypothesis import strategies as st

from thaw.tree.markup import Html, el, is_hidden, join, text, visible

NASTY = st.text() | st.sampled_from(MARKUP) | st.text(alphabet="<>&\"'=/ \n\x00\x1b\u202e\u200b!-;#x0", max_size=60)


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
