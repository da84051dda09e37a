"""A session's text: what its tokens say, however they came in."""

from __future__ import annotations

import thaw
from thaw.repo import Repository

SMILE = list("😀".encode())


def test_a_character_in_pieces_is_whole_in_the_text(repo: Repository) -> None:
    session = repo.session(seed=1)
    session.append("Hi ")
    session.append(token_ids=SMILE[:2])
    assert session.text == "Hi "
    session.append(token_ids=[*SMILE[2:], ord("x")])
    assert session.text == "Hi 😀x" == repo.engine.codec.decode(session.tokens)
    session.commit("said", branch="main")
    for at in range(1, session.num_tokens + 1):
        back = repo.session(repo.at("main", token=at))
        assert back.text == session.fork(1, at=at)[0].text == repo.engine.codec.decode_settled(session.tokens[:at])
    back = repo.session(repo.at("main", token=5))
    back.append(token_ids=[*SMILE[2:], *b" and more"])
    assert back.text == "Hi 😀 and more"


def test_what_follows_a_broken_character_says_so(repo: Repository) -> None:
    session = repo.session(seed=1)
    session.append(token_ids=[*b"Hi ", *SMILE[:2]])
    session.append("no")
    assert session.text == "Hi \ufffdno" == repo.engine.codec.decode(session.tokens)
    assert [turn.text for turn in session.turns] == ["Hi ", "\ufffdno"]


def test_chunks_of_an_answer_add_up(repo: Repository) -> None:
    """However many tokens each has; the fake model says bytes that are no UTF-8, too."""
    whole, chunks = repo.session(seed=3), repo.session(seed=3)
    for session in (whole, chunks):
        session.append("Say something")
    said = whole.generate("", thaw.Sampling(max_tokens=70, ignore_eos=True)).text
    parts = [chunks.generate("", thaw.Sampling(max_tokens=7, ignore_eos=True)).text for _ in range(10)]
    assert chunks.tokens == whole.tokens and "".join(parts) == said
    assert chunks.text == whole.text == repo.engine.codec.decode_settled(whole.tokens)
