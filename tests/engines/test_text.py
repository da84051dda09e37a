"""The text of a stream: a pure function of the ids, in whole characters, cut at stop strings, the same at any cut."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_tokenizers import PlainCodec, byte_level, byte_tokens, sentencepiece

from thaw.core.objects import Turn
from thaw.engines.base import Codec
from thaw.engines.fake.codec import BOS, EOS, FakeCodec
from thaw.engines.session.text import TextStream
from thaw.engines.text import WINDOW, cut_turns, left_open, text_after, whole_characters

TEXT = "Grüße, 123 – ok\n☃ 東京 👩‍👩‍👧 end"
SPOKEN = "我是你！👏👏👏 ☃, and \ufffd too."
RAGGED = b"ok \xff\xfe\xf0\x9f\x91\x8f\xe2\x98\xf0\x9f\xed\xa0\x80 \xc3\x28 end\xf0\x9f\x98"
"""Bytes of which some are no UTF-8, and which end inside a character."""


def stream(
    tokens: Sequence[int], stop: Sequence[str] = (), codec: Codec | None = None, context: Sequence[int] = ()
) -> tuple[TextStream, list[str], str | None]:
    """Push all tokens as a generation does: (the stream, the pieces it gave out, the stop string that ended it)."""
    one, pieces, hit = TextStream(codec or FakeCodec(), context, stop), [], None
    for token in tokens:
        one.push(token)
        hit = one.cut_at_stop()
        if hit is not None:
            break
        pieces.append(one.news(final=False))
    pieces.append(one.news(final=True))
    return one, pieces, hit


def in_turns(codec: Codec, tokens: Sequence[int], cuts: Sequence[int]) -> list[str]:
    """The text of each turn, where the tokens come in turns that end at `cuts`."""
    ends = [*sorted(cuts), len(tokens)]
    return [
        stream(tokens[start:end], codec=codec, context=tokens[:start])[0].text
        for start, end in zip([0, *ends], ends, strict=False)
    ]


def hf(tokenizer: object) -> Codec:
    from thaw.engines.hf.codec import HFCodec

    return HFCodec(tokenizer)


STRADDLING = [b"\xe6\x88\x91\xe6", b"\x9f\x91", b"\x8f\xf0", b"!!"]
KINDS: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "byte-level with tokens across characters": lambda: byte_level(merges=STRADDLING),
    "sentencepiece": sentencepiece,
    "sentencepiece with a normalizer": lambda: sentencepiece("normalizer", merges=["▁and", "too"]),
}


@given(st.text(max_size=40))
def test_pieces_add_up_to_the_text(text: str) -> None:
    one, pieces, _ = stream(list(text.encode(errors="ignore")))
    assert one.text == "".join(pieces) == text.encode(errors="ignore").decode()


@given(st.lists(st.integers(0, 257), max_size=40), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_any_ids_give_pieces_that_add_up(tokens: list[int], stops: list[str]) -> None:
    one, pieces, hit = stream(tokens, stops)
    assert one.text == "".join(pieces)
    if hit is not None:
        assert hit in stops
        assert not any(s in one.text for s in stops)


def test_a_character_is_given_whole() -> None:
    _, pieces, _ = stream(list("a☃b".encode()))
    assert pieces == ["a", "", "", "☃", "b", ""]


def test_a_character_belongs_to_the_turn_that_ends_it() -> None:
    snowman = "☃".encode()
    assert in_turns(FakeCodec(), b"a" + snowman + b"b", [2, 3]) == ["a", "", "☃b"]
    assert in_turns(FakeCodec(), b"a" + snowman[:2] + b"b", [2, 3]) == ["a", "", "\ufffdb"], "or that shows it broken"


@given(st.lists(st.integers(0, EOS), max_size=60), st.lists(st.integers(0, 60), max_size=6))
def test_turns_add_up_to_what_the_tokens_say(tokens: list[int], cuts: list[int]) -> None:
    """Any bytes, cut anywhere, also inside a character; what is left open at the end is what no turn has."""
    codec, cuts = FakeCodec(), [cut for cut in cuts if cut <= len(tokens)]
    said = "".join(in_turns(codec, tokens, cuts))
    assert said == codec.decode_settled(tokens)
    assert said + left_open(codec, tokens) == codec.decode(tokens)
    ends = [*sorted(cuts), len(tokens)]
    assert "".join(text_after(codec, tokens[:a], tokens[a:b]) for a, b in zip([0, *ends], ends, strict=False)) == said


class Asked(FakeCodec):
    """Counts how often it is asked to decode."""

    num_times = 0

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.num_times += 1
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)


def test_a_long_prompt_is_decoded_once() -> None:
    """Not token by token as well: where a codec is slow, that took seconds of a fork from inside a long prompt."""
    codec, tokens = Asked(), list(b"word " * 2000)
    assert text_after(codec, [], tokens) == "word " * 2000
    assert codec.num_times < 100


@pytest.mark.parametrize("text", [SPOKEN, TEXT])
@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_of_every_kind_of_tokenizer(kind: str, text: str) -> None:
    pytest.importorskip("transformers")
    codec = hf(KINDS[kind]())
    tokens = codec.encode(text, first=True)
    assert codec.decode(tokens) == text
    for step in (1, 2, 3, 5, 7):
        assert "".join(in_turns(codec, tokens, range(0, len(tokens), step))) == text
    for cut in range(len(tokens)):
        before, after = in_turns(codec, tokens, [cut])
        assert before + after == text
        assert before == codec.decode_settled(tokens[:cut]) == text_after(codec, [], tokens[:cut])
        assert after == text_after(codec, tokens[:cut], tokens[cut:])


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_are_no_text_are_the_same_at_any_cut(kind: str) -> None:
    pytest.importorskip("transformers")
    tokenizer = KINDS[kind]()
    codec, tokens, whole = hf(tokenizer), byte_tokens(tokenizer, RAGGED), whole_characters(RAGGED)
    assert codec.decode_settled(tokens) == whole and codec.decode(tokens) == RAGGED.decode(errors="replace")
    for step in (1, 2, 3, 5, 40):
        assert "".join(in_turns(codec, tokens, range(0, len(tokens), step))) == whole
    _, pieces, _ = stream(tokens, codec=codec)
    assert "".join(pieces) == whole


@given(st.text(max_size=40), st.integers(0, 100))
def test_a_codec_that_only_decodes_is_enough(text: str, cut: int) -> None:
    codec = PlainCodec()
    tokens = codec.encode(text.encode(errors="ignore").decode(), first=True)
    said = "".join(in_turns(codec, tokens, [min(cut, len(tokens))]))
    assert said == codec.decode_settled(tokens) and said + left_open(codec, tokens) == codec.decode(tokens)


ODD = ["é", "Ġ", "<|né☃|>", " two words ", "\u0100\u0101"]
"""Added tokens: of the characters that stand for bytes, of others, and of both."""


@given(st.lists(st.integers(0, 300), max_size=24), st.booleans())
def test_where_tokens_are_bytes_they_say_what_the_library_makes_of_them(tokens: list[int], skip: bool) -> None:
    codec = odd_codec()
    parts = [codec.token_bytes(token, skip_special_tokens=skip) for token in tokens]
    assert all(part is not None for part in parts)
    whole = b"".join(part or b"" for part in parts)
    assert codec.decode(tokens, skip_special_tokens=skip) == whole.decode(errors="replace")
    said = text_after(codec, (), tokens, skip_special_tokens=skip)
    assert said == codec.decode_settled(tokens, skip_special_tokens=skip) == whole_characters(whole)
    for cut in range(len(tokens)):
        assert text_after(codec, (), tokens[:cut]) + text_after(codec, tokens[:cut], tokens[cut:]) == text_after(
            codec, (), tokens
        )


@functools.cache
def odd_codec() -> Codec:
    return hf(byte_level(merges=STRADDLING, specials=ODD))


@pytest.mark.parametrize("codec", [FakeCodec(), PlainCodec(), lambda: hf(sentencepiece())])
def test_where_what_a_token_says_depends_on_its_neighbours_it_has_no_bytes(codec: Any) -> None:
    one = codec if isinstance(codec, Codec) else codec()
    assert {one.token_bytes(token) for token in range(40)} == {None}


@pytest.mark.parametrize("byte", [0xFF, 0x80, 0xEF])
@pytest.mark.parametrize("codec", [FakeCodec(), PlainCodec()])
def test_a_run_of_bytes_that_are_no_text_streams(codec: Codec, byte: int) -> None:
    """Each byte is given when it is known to be none: at once, or with the next where it may begin a character."""
    _, pieces, _ = stream([byte] * 200, codec=codec)
    late = byte == 0xEF or type(codec) is PlainCodec
    assert pieces == ["", *["\ufffd"] * 199, ""] if late else pieces == [*["\ufffd"] * 200, ""]


class Counting(FakeCodec):
    def __init__(self) -> None:
        self.num_decoded = 0

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.num_decoded += len(token_ids)
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    def decode_settled(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.num_decoded += len(token_ids)
        return super().decode_settled(token_ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("token", [ord("a"), 0xFF, 0xF0, 0x80, BOS, EOS])
def test_every_token_costs_the_same(token: int) -> None:
    """Text, bytes that are none, beginnings of characters, and tokens that say nothing."""
    for num_tokens in (100, 1000, 4000):
        codec = Counting()
        stream([token] * num_tokens, ["stop"], codec, context=[ord("x")] * num_tokens)
        assert codec.num_decoded <= 3 * WINDOW * num_tokens


def test_tokens_that_say_nothing_part_no_character() -> None:
    """As where all is decoded at once: what a text leaves out is not there."""
    codec, smile = FakeCodec(), "😀".encode()
    tokens = [*b"so ", *smile[:2], *[EOS] * 100, *smile[2:], *b"!"]
    assert codec.decode(tokens) == "so 😀!" == "".join(in_turns(codec, tokens, [4, 20, 60, 107]))


@pytest.mark.parametrize("stop", ["3 –", "☃", "ok\n", "end", "👧", "G"])
def test_a_stop_string_across_tokens_is_cut_and_never_shown(stop: str) -> None:
    one, pieces, hit = stream(list(TEXT.encode()), ["not there", stop])
    assert hit == stop
    assert one.text == "".join(pieces) == TEXT[: TEXT.index(stop)]


@pytest.mark.parametrize("stop", ["☃", "☃ 東"])
@pytest.mark.parametrize("cut", [1, 2])
def test_a_stop_string_whose_first_character_an_earlier_turn_began(stop: str, cut: int) -> None:
    at = len(TEXT[: TEXT.index("☃")].encode()) + cut
    tokens = list(TEXT.encode())
    one, pieces, hit = stream(tokens[at:], [stop], context=tokens[:at])
    assert (one.text, "".join(pieces), hit) == ("", "", stop)


def test_a_stop_string_is_looked_for_in_the_turn_alone() -> None:
    assert stream(list(b"op"), ["stop"], context=list(b"st"))[2] is None


def test_the_earliest_stop_wins() -> None:
    one, _, hit = stream(list(b"hello world"), ["world", "lo w"])
    assert (one.text, hit) == ("hel", "lo w")


def test_what_might_become_a_stop_is_held_back() -> None:
    one, pieces, hit = stream(list(b"aSTOaSTOPb"), ["STOP"])
    assert (one.text, hit) == ("aSTOa", "STOP")
    assert not any("S" in piece for piece in pieces[:4])
    assert stream(list(b"abSTO"), ["STOP"])[0].text == "abSTO"


def test_a_turn_that_is_cut_has_the_text_of_its_first_tokens() -> None:
    """In the words of the turn: a prompt's special tokens where it shows them, and a character that the turn before
    began."""
    codec = FakeCodec()
    chat = codec.render_chat([{"role": "user", "content": "hi ☃"}], add_generation_prompt=True)
    said = "☃ and so on".encode()
    tokens = [*chat, *said]
    end, half = len(chat), len(chat) + 2
    turns = (
        Turn(kind="prompt", start=0, end=end, text=codec.decode(chat, skip_special_tokens=False)),
        Turn(kind="completion", start=end, end=half, text=""),
        Turn(kind="completion", start=half, end=len(tokens), text="☃ and so on", finish_reason="stop"),
    )
    (cut,) = cut_turns(turns, tokens, 8, codec)
    assert cut.text == "<s>user\nhi"
    plain = (Turn(kind="prompt", start=0, end=end, text=codec.decode(chat)),)
    assert cut_turns(plain, tokens, 8, codec)[0].text == "user\nhi"
    *_, last = cut_turns(turns, tokens, half + 5, codec)
    assert (last.text, last.finish_reason) == ("☃ and", None)
    assert cut_turns(turns, tokens, half + 5, None)[-1].text == "", "without a codec there is none"


def test_smollm2s_tokenizer_too(demo_model: Path) -> None:
    """Merges, byte pieces and leading spaces."""
    transformers = pytest.importorskip("transformers")

    codec = hf(transformers.AutoTokenizer.from_pretrained(demo_model))
    for text in (TEXT, SPOKEN):
        tokens = codec.encode(text, first=False)
        assert len(tokens) < len(text.encode())
        one, pieces, _ = stream(tokens, codec=codec)
        assert one.text == "".join(pieces) == text
        for step in range(1, 8):
            assert "".join(in_turns(codec, tokens, range(0, len(tokens), step))) == text
    _, _, hit = stream(codec.encode(TEXT, first=False), ["ok\n☃"], codec)
    assert hit == "ok\n☃"
