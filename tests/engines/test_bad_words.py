"""Bad words as token ids, and what an engine says to those that it cannot mean."""

from __future__ import annotations

import pytest

from thaw.core.errors import BadSampling
from thaw.core.sampling import Sampling
from thaw.engines import load_engine
from thaw.engines.base import GenerateRequest
from thaw.engines.fake.codec import VOCAB, FakeCodec
from thaw.engines.session.bad_words import bad_ids, endings, straddling

WORDS = ((3,), (1, 2), (4, 5, 6), (7, 7))


def test_a_word_in_bytes_has_one_form() -> None:
    assert bad_ids(FakeCodec(), ("ab", " c")) == ((97, 98), (99,))


def test_the_last_token_is_banned_while_the_others_stand_at_the_end() -> None:
    assert endings(WORDS, []) == {3}
    assert endings(WORDS, [4, 5]) == {3, 6}
    assert endings(WORDS, [4]) == endings(WORDS, [5]) == endings(WORDS, [4, 5, 6]) == {3}
    assert endings(WORDS, [9, 7]) == {3, 7} and endings(WORDS, [7, 1]) == {3, 2}


def test_a_word_that_has_begun_is_known() -> None:
    assert straddling(WORDS, [9, 4]) == straddling(WORDS, [4, 5]) == (4, 5, 6)
    assert straddling(WORDS, [7]) == (7, 7)
    assert straddling(WORDS, []) is straddling(WORDS, [3]) is straddling(WORDS, [1, 2]) is straddling((), [4]) is None


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        (Sampling(logit_bias={VOCAB: 1.0}), f"vocabulary has {VOCAB}"),  # type: ignore[arg-type]
        (Sampling(bad_words=("ab", "gone")), "gone"),
        (Sampling(structured_outputs={"regex": "a+"}), "no grammars"),  # type: ignore[arg-type]
    ],
    ids=["a bias beyond the vocabulary", "a word without tokens", "structured output in an engine that has none"],
)
def test_refused_before_the_session_is_touched(sampling: Sampling, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = FakeCodec.encode
    monkeypatch.setattr(
        FakeCodec, "encode", lambda s, t, first: [] if t.strip() == "gone" else encode(s, t, first=first)
    )
    with load_engine("fake") as engine:
        session = engine.open()
        with pytest.raises(BadSampling, match=says):
            engine.generate([GenerateRequest(session=session, prompt=(1, 2), sampling=sampling)]).result()
        assert engine.view(session).tokens == ()
