"""A conversation that was encoded to look for its prefix is not encoded again by the chat that follows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import thaw
from thaw import Sampling
from thaw.engines.base import Engine
from thaw.repo.encoded import ENTRY, EncodedTexts

ASKED = [{"role": "user", "content": "a river"}]


@pytest.fixture
def engine() -> Iterator[Engine]:
    with thaw.load_engine("fake") as booted:
        yield booted


@pytest.fixture
def encoded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The conversations that the engine's codec encodes."""
    texts: list[str] = []
    encode = engine.codec.encode_chat

    def counted(text: str, **more: Any) -> list[int]:
        texts.append(text)
        return encode(text, **more)

    monkeypatch.setattr(engine.codec, "encode_chat", counted)
    return texts


def said(engine: Engine) -> str:
    return engine.codec.chat_text(ASKED, add_generation_prompt=True)


def test_what_was_encoded_is_known_to_the_chat_that_says_it(tmp_path: Path, engine: Engine, encoded: list[str]) -> None:
    with thaw.open(tmp_path / "runs", engine=engine, create=True) as repo:
        ids = repo.encode_chat(said(engine))
        with repo.session(seed=1) as session:
            session.chat(history=ASKED, sampling=Sampling(max_tokens=2))
            assert session.tokens[: len(ids)] == ids
        assert encoded == [said(engine)]
        with repo.session(seed=1) as session:
            session.chat(history=[{"role": "user", "content": "a lake"}], sampling=Sampling(max_tokens=2))
        assert len(encoded) == 2


def test_a_namespace_knows_its_own_texts_alone(tmp_path: Path, engine: Engine, encoded: list[str]) -> None:
    """Else the time of an answer would say that another tenant has said the same."""
    with thaw.open(tmp_path / "runs", engine=engine, create=True) as repo:
        mine, others = repo.within("a"), repo.within("b")
        assert mine.encode_chat(said(engine)) == others.encode_chat(said(engine)) == repo.encode_chat(said(engine))
        assert len(encoded) == 3
        mine.encode_chat(said(engine))
        assert len(encoded) == 3


def test_the_oldest_are_forgotten_and_one_that_is_too_long_is_not_kept(engine: Engine, encoded: list[str]) -> None:
    known = EncodedTexts(max_characters=2 * ENTRY + 10)
    long = "l" * (ENTRY + 11)
    for text in ("four", "five5", "four", "six666", "four", long, long):
        assert known.encode(engine.codec, "", text) == tuple(text.encode())
    assert encoded == ["four", "five5", "six666", long, long]
    known.encode(engine.codec, "", "five5")
    assert encoded[-1] == "five5"
