"""The text of a stream: a pure function of the ids, in whole characters, cut at stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thaw.engines.base import Codec
from thaw.engines.embedded.text import TextStream
from thaw.engines.fake.codec import FakeCodec

TEXT = "Grüße, 123 – ok\n☃ 東京 👩‍👩‍👧 end"


def stream(
    tokens: Sequence[int], stop: Sequence[str] = (), codec: Codec | None = None
) -> tuple[TextStream, list[str], str | None]:
    """Push all tokens as a generation does: (the stream, the pieces it gave out, the stop string that ended it)."""
    one, pieces, hit = TextStream(codec or FakeCodec(), [], stop), [], None
    for token in tokens:
        before = len(one.text)
        one.push(token)
        hit = one.cut_at_stop(before)
        if hit is not None:
            break
        pieces.append(one.news(final=False))
    if hit is None:
        one.flush()
    pieces.append(one.news(final=True))
    return one, pieces, hit


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


def test_half_a_character_at_the_end_is_given_at_the_end() -> None:
    one, pieces, _ = stream(list("a☃".encode())[:-1])
    assert pieces[:-1] == ["a", "", ""] and one.text == "a\ufffd"


@given(st.integers(0, len(TEXT.encode())))
def test_rebuilt_equals_incremental(cut: int) -> None:
    """A stream taken up again from its ids goes on as if it had never been away."""
    tokens = list(TEXT.encode())
    whole, _, _ = stream(tokens)
    again = TextStream(FakeCodec(), [], ())
    for token in tokens[:cut]:
        again.push(token)
    for token in tokens[cut:]:
        again.push(token)
    again.flush()
    assert again.text == whole.text == TEXT


@pytest.mark.parametrize("stop", ["3 –", "☃", "ok\n", "end", "👧", "G"])
def test_a_stop_string_across_tokens_is_cut_and_never_shown(stop: str) -> None:
    one, pieces, hit = stream(list(TEXT.encode()), ["not there", stop])
    assert hit == stop
    assert one.text == "".join(pieces) == TEXT[: TEXT.index(stop)]


def test_the_earliest_stop_wins() -> None:
    one, _, hit = stream(list(b"hello world"), ["world", "lo w"])
    assert (one.text, hit) == ("hel", "lo w")


def test_what_might_become_a_stop_is_held_back() -> None:
    one, pieces, hit = stream(list(b"aSTOaSTOPb"), ["STOP"])
    assert (one.text, hit) == ("aSTOa", "STOP")
    assert not any("S" in piece for piece in pieces[:4])
    assert stream(list(b"abSTO"), ["STOP"])[0].text == "abSTO"


def test_the_real_kind_of_tokenizer_too(tiny_model: Callable[..., Path]) -> None:
    transformers = pytest.importorskip("transformers")
    from thaw.engines.hf.codec import HFCodec

    codec = HFCodec(transformers.AutoTokenizer.from_pretrained(tiny_model()))
    one, pieces, _ = stream(codec.encode(TEXT, first=False), codec=codec)
    assert one.text == "".join(pieces) == TEXT


def test_smollm2s_tokenizer_too(demo_model: Path) -> None:
    """Merges, byte pieces and leading spaces."""
    transformers = pytest.importorskip("transformers")
    from thaw.engines.hf.codec import HFCodec

    codec = HFCodec(transformers.AutoTokenizer.from_pretrained(demo_model))
    tokens = codec.encode(TEXT, first=False)
    assert len(tokens) < len(TEXT.encode())
    one, pieces, _ = stream(tokens, codec=codec)
    assert one.text == "".join(pieces) == TEXT
    _, _, hit = stream(tokens, ["ok\n☃"], codec)
    assert hit == "ok\n☃"
