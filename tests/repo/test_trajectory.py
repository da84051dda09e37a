"""A session as training data: one entry a token, each with what it was sampled from and under which policy."""

from __future__ import annotations

import math

import msgspec
import pytest

from thaw import Sampling
from thaw.core.errors import PolicyMismatch, StaleSession
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


def test_a_child_tells_its_own_tokens_from_those_it_was_forked_with(repo: Repository) -> None:
    trunk = repo.session()
    trunk.generate("the prompt", PLAIN)
    at = trunk.num_tokens - 2
    with trunk.fork(3, at=at) as kids:
        assert kids[0].trajectory().own_mask == (0,) * 4
        kids.generate(sampling=PLAIN)
        kids[0].append("a tool's result")
        kids[0].generate(sampling=PLAIN)
        for kid in kids:
            t = kid.trajectory()
            assert (t.num_inherited_tokens, t.mask[:10], t.own_mask[:10]) == (at, (1,) * 10, (0,) * 4 + (1,) * 6)
        t = kids[0].trajectory()
        assert t.own_mask[4:] == t.mask[4:] == (1,) * 6 + (0,) * len("a tool's result") + (1,) * 6
    assert trunk.trajectory().own_mask == trunk.trajectory().mask == (1,) * 6


def test_in_a_tree_of_forks_every_sampled_token_is_some_sessions_own_and_only_one_s(repo: Repository) -> None:
    """What N children share was trained on N times by whoever took `mask`."""
    root = repo.session()
    root.generate("the prompt", Sampling(max_tokens=12, ignore_eos=True))
    family = [root]
    for at in (14, 17, 22):
        family += root.fork(2, at=at)
    family += [grandchild for child in family[1:] for grandchild in child.fork(2, at=child.num_tokens - 1)]
    for session in family[1:]:
        session.generate(sampling=PLAIN)
    family += family[-1].fork(2)
    ts = [session.trajectory() for session in family]
    assert sum(sum(t.own_mask) for t in ts) == 12 + 6 * (len(family) - 3)
    assert sum(sum(t.mask) for t in ts) > 2 * sum(sum(t.own_mask) for t in ts)


def test_a_fork_inside_a_prompt_or_at_its_end_inherits_no_completion(repo: Repository) -> None:
    trunk = repo.session()
    trunk.append("the prompt")
    for at in (4, None):
        child = trunk.fork(1, at=at)[0]
        child.generate(sampling=PLAIN)
        t = child.trajectory()
        assert t.own_mask == t.mask == (1,) * 6 and t.num_inherited_tokens == len(t.prompt_ids) == (at or 10)


def test_a_session_from_a_commit_inherits_what_the_commit_has(repo: Repository) -> None:
    """However it continues from there: alone, as one of a fork, or with the completion that the point cuts through."""
    s = repo.session()
    s.generate("the prompt", PLAIN)
    s.commit("one", branch="main")
    for session in (repo.session("main"), repo.fork("main", 2)[1]):
        session.generate(sampling=PLAIN)
        assert session.trajectory().own_mask == (0,) * 6 + (1,) * 6
    cut = repo.session("main:token=13")
    cut.resume()
    assert cut.trajectory().own_mask == (0,) * 3 + (1,) * 3
    assert cut.trajectory().completion_ids == s.trajectory().completion_ids


def test_a_rollout_is_exported_after_the_step_that_ended_it(repo: Repository) -> None:
    """Only its KV is refused, and the refusal says so. What was committed is shown whatever runs."""
    s = repo.session()
    s.generate("the prompt", Sampling(max_tokens=6, ignore_eos=True, entropy=True))
    done = s.commit("one", branch="main")
    child = s.fork(1)[0]
    child.generate(sampling=PLAIN)
    before = [(one.tokens, one.text, one.turns, one.trajectory(), one.seed, one.proof) for one in (s, child)]
    shown = repo.show("main")
    repo.engine.set_policy("1")
    assert before == [(one.tokens, one.text, one.turns, one.trajectory(), one.seed, one.proof) for one in (s, child)]
    for verb in (s.commit, s.park, s.resume, lambda: s.fork(1), lambda: s.append("more"), lambda: child.adopt("main")):
        with pytest.raises(StaleSession, match="tokens, text and trajectory can still be read"):
            verb()
    assert repo.show("main") == shown and shown.turns[-1].entropies == before[0][3].entropies
    assert repo.session(done.commit, policy="recompute").tokens == s.tokens
    again = repo.session()
    again.append(token_ids=child.tokens)
    assert again.tokens == child.tokens


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
    stored = repo.session("main").trajectory()
    assert msgspec.structs.replace(stored, num_inherited_tokens=again.trajectory().num_inherited_tokens) == (
        again.trajectory()
    )


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
