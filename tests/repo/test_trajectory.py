"""A session as training data: one entry a token, each with what it was sampled from and under which policy."""

from __future__ import annotations

import math

import pytest

from thaw import Sampling
from thaw.core.errors import PolicyMismatch
from thaw.core.objects import Turn
from thaw.repo import Repository
from thaw.repo.trajectory import of_turns

PLAIN = Sampling(max_tokens=6, ignore_eos=True)


def test_prompt_and_completion_together_are_the_sessions_tokens(repo: Repository) -> None:
    s = repo.session()
    assert s.trajectory().prompt_ids == () == s.trajectory().mask
    s.append("system ")
    s.append("question")
    assert s.trajectory().prompt_ids == s.tokens and s.trajectory().completion_ids == ()
    out = s.generate(sampling=PLAIN)
    t = s.trajectory()
    assert (t.prompt_ids + t.completion_ids, t.completion_ids) == (s.tokens, out.token_ids)
    assert (t.logprobs, t.mask) == (out.logprobs, (1,) * 6)


def test_what_was_put_in_between_is_masked(repo: Repository) -> None:
    """A tool's result stands in the completion, was not sampled, and may not be trained on."""
    s = repo.session()
    first = s.generate("call a tool", PLAIN)
    s.append("<result>42</result>")
    second = s.generate(sampling=PLAIN)
    t, n = s.trajectory(), len("<result>42</result>")
    assert t.mask == (1,) * 6 + (0,) * n + (1,) * 6
    assert t.logprobs == (*first.logprobs, *(0.0,) * n, *second.logprobs)
    assert t.prompt_ids + t.completion_ids == s.tokens


def test_siblings_share_the_prompt_and_have_logprobs_of_their_own(repo: Repository) -> None:
    trunk = repo.session()
    trunk.append("the trunk, read once")
    with trunk.fork(4) as kids:
        outs = kids.generate(sampling=PLAIN)
        for kid, out in zip(kids, outs, strict=True):
            t = kid.trajectory()
            assert t.prompt_ids == trunk.tokens
            assert (t.completion_ids, t.logprobs) == (out.token_ids, out.logprobs)
        assert len({kid.trajectory().completion_ids for kid in kids}) > 1


def test_every_token_says_which_policy_sampled_it(repo: Repository) -> None:
    s = repo.session()
    s.generate("under one policy", PLAIN)
    s.commit("one", branch="main")
    repo.engine.set_policy("1")
    again = repo.session("main", policy="recompute")
    again.append("and then")
    again.generate(sampling=PLAIN)
    assert again.trajectory().policy_versions == ("0",) * 6 + ("1",) * (len("and then") + 6)
    again.commit("two", branch="main")
    assert repo.session("main").trajectory() == again.trajectory()


def test_a_completion_begun_under_another_policy_is_not_resumed_but_followed(repo: Repository) -> None:
    s = repo.session()
    whole = s.generate("a partial rollout", Sampling(max_tokens=20, ignore_eos=True))
    cut = s.fork(1, at=s.num_tokens - 12, replay=True)[0]
    cut.commit("in the middle", branch="main")
    repo.engine.set_policy("1")
    again = repo.session("main", policy="recompute")
    with pytest.raises(PolicyMismatch, match=r"'0'.*'1'"):
        again.resume()
    again.generate(sampling=PLAIN)
    t = again.trajectory()
    assert t.completion_ids[:8] == whole.token_ids[:8] and t.logprobs[:8] == whole.logprobs[:8]
    assert t.mask == (1,) * 14 and t.policy_versions == ("0",) * 8 + ("1",) * 6


def test_a_grammar_shapes_what_is_sampled() -> None:
    """And so does any field that is not known to be harmless."""
    shaped = Sampling(structured_outputs={"choice": ("yes", "no")})  # type: ignore[arg-type]
    turns = (Turn(kind="completion", start=0, end=1, sampling=shaped, logprobs=(-1.0,)),)
    assert not of_turns((1,), turns).plain_sampling


@pytest.mark.parametrize(
    ("change", "plain"),
    [
        ({"stop_token_ids": (3,)}, True),
        ({}, True), ({"top_k": -1}, True), ({"seed": 3}, True), ({"logprobs": 4}, True), ({"stop": ("x",)}, True),
        ({"temperature": 0.0}, False), ({"temperature": 0.7}, False), ({"top_p": 0.9}, False), ({"top_k": 5}, False),
        ({"min_p": 0.1}, False), ({"repetition_penalty": 1.1}, False), ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": 0.1}, False), ({"min_tokens": 2}, False), ({"logit_bias": {3: 1.0}}, False),
        ({"bad_words": ("x",)}, False),
    ],
    ids=str,
)  # fmt: skip
def test_it_says_whether_logprobs_are_those_of_the_distribution_that_was_sampled(
    repo: Repository, change: dict[str, object], plain: bool
) -> None:
    s = repo.session()
    s.generate("one", PLAIN)
    s.generate("two", Sampling(max_tokens=4, **change))  # type: ignore[arg-type]
    assert s.trajectory().plain_sampling is plain


def test_a_logprob_that_nobody_recorded_is_not_a_number() -> None:
    """0.0 would say that the token was certain."""
    turns = (Turn(kind="prompt", start=0, end=2), Turn(kind="completion", start=2, end=4, sampling=PLAIN))
    t = of_turns((1, 2, 3, 4), turns)
    assert t.mask == (1, 1) and all(math.isnan(x) for x in t.logprobs)


def test_tokens_that_no_turn_covers_yet_were_put_in() -> None:
    """A running append's tokens are seen before its turn is."""
    turns = (
        Turn(kind="prompt", start=0, end=2),
        Turn(kind="completion", start=2, end=4, sampling=PLAIN, logprobs=(-1.0, -2.0), policy="7"),
    )
    t = of_turns((1, 2, 3, 4, 5, 6), turns)
    assert (t.completion_ids, t.mask, t.logprobs) == ((3, 4, 5, 6), (1, 1, 0, 0), (-1.0, -2.0, 0.0, 0.0))
    assert t.policy_versions == ("7",) * 4
