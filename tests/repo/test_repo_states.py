"""Repositories of a model with recurrent layers: a small random Qwen3-Next and a short convolution, run for real."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import thaw
from thaw import Sampling
from thaw.core.cache import point_groups, token_nbytes
from thaw.core.errors import InvalidRequest, NotKept
from thaw.engines.base import Engine
from thaw.repo import Repository
from thaw.repo.timeline import read_entries, read_state
from thaw.testing.laws.kit import ids

GREEDY = Sampling(temperature=0.0, max_tokens=6, ignore_eos=True)
READ = 300


@pytest.fixture(params=["qwen3_next", "lfm2"])
def engine(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    with thaw.load_engine("transformers", model=str(tiny_model(request.param))) as running:
        yield running


def state_nbytes(engine: Engine) -> int:
    return sum(group.nbytes for group in point_groups(engine.info.groups))


def count_forwarded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each feed that the model runs from here on, as the engine's backend gets them."""
    backend, fed = engine._backend, []  # type: ignore[attr-defined]
    run = backend.forward

    def counted(feeds: list[object]) -> object:
        fed.extend(len(feed.tokens) for feed in feeds)  # type: ignore[attr-defined]
        return run(feeds)

    monkeypatch.setattr(backend, "forward", counted)
    return fed


def test_a_point_that_was_asked_for_is_forked_from_and_nothing_before_it_runs_again(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    with repo.session(seed=1) as s:
        s.append(token_ids=ids(READ), points=[128, 256])
        s.commit("read", branch="main")
    fed = count_forwarded(repo.engine, monkeypatch)
    with repo.fork("main:token=128", 3) as kids:
        assert {kid.num_kv for kid in kids} == {128}
        outs = kids.generate(["a", "bc", "def"], GREEDY)
        assert [out.usage.num_prefilled_tokens for out in outs] == [1, 2, 3]
        assert [out.num_cached_tokens for out in outs] == [128] * 3
        assert sum(fed) == 6 + 3 * 5, "the new tokens, and those that were generated"
        with pytest.raises(NotKept, match=r"128 tokens is kept.*give a prompt, or fork at token 129"):
            repo.fork("main:token=128", 1)[0].generate("", GREEDY)
    with repo.session("main:token=129") as one_more:
        assert one_more.generate("", GREEDY).usage.num_prefilled_tokens == 1


def test_what_is_appended_after_a_point_has_the_bits_of_the_session_that_stopped_there(repo: Repository) -> None:
    with repo.session(seed=1) as parent:
        parent.append(token_ids=ids(READ), points=[128])
        parent.commit("read", branch="main")
        whole = parent.generate("", GREEDY)
    with repo.session("main:token=128") as child:
        child.append(token_ids=ids(READ)[128:])
        assert child.generate("", GREEDY).logprobs == whole.logprobs


def test_points_of_any_iterable_of_integers_are_kept(repo: Repository) -> None:
    """An iterator can be read once only: its points were dropped without a word."""
    for wanted in (iter([128]), {128}, range(128, 129), numpy.array([128]), [numpy.int64(128), 128]):
        with repo.session(seed=1) as s:
            s.append(token_ids=ids(READ), points=wanted)  # type: ignore[arg-type]
            with s.fork(2, at=128) as kids:
                assert {kid.num_kv for kid in kids} == {128}


@pytest.mark.parametrize("wrong", ["128", b"\x80", ["128"], [128.0], [True], [[128]], [None], None, 128, {128: 1}])
def test_points_that_are_no_integers_are_refused_and_named(repo: Repository, wrong: Sequence[int]) -> None:
    with repo.session(seed=1) as s:
        with pytest.raises(InvalidRequest, match=r"point.*(must be an integer|give a list)"):
            s.append(token_ids=ids(READ), points=wrong)
        with pytest.raises(InvalidRequest, match=r"point.*(must be an integer|give a list)"):
            s.keep_points(wrong)
        assert s.num_tokens == 0


@pytest.mark.parametrize("wrong", ["128", 128.0, True, [128]])
def test_a_token_that_is_no_integer_is_refused_and_named(repo: Repository, wrong: int) -> None:
    with repo.session(seed=1) as s:
        s.append(token_ids=ids(READ), points=[128])
        for verb in (s.reread, lambda at: s.fork(2, at=at)):
            with pytest.raises(InvalidRequest, match=r"at=.*must be an integer"):
                verb(wrong)


def test_points_beyond_the_longest_session_are_refused(repo: Repository) -> None:
    longest = repo.engine.info.max_model_len
    with repo.session(seed=1) as s:
        s.append(token_ids=ids(READ))
        with pytest.raises(InvalidRequest, match=rf"one of {READ + 1}\.\.{longest},"):
            s.keep_points([longest + 1])
        with pytest.raises(InvalidRequest, match=rf"points \[320\]: no token comes after the {READ}"):
            s.append(points=[320])


def test_points_elsewhere_are_refused_and_named(repo: Repository) -> None:
    multiple = repo.engine._backend.point_multiple  # type: ignore[attr-defined]
    with repo.session(seed=1) as s:
        for outside in (0, READ + 1):
            with pytest.raises(InvalidRequest, match=rf"{outside}.*1\.\.{READ}"):
                s.append(token_ids=ids(READ), points=[outside])
        if multiple > 1:
            with pytest.raises(InvalidRequest, match=r"point at token 100.*64 or 128.*unaligned"):
                s.append(token_ids=ids(READ), points=[100])
        assert s.num_tokens == 0
        s.append(token_ids=ids(READ), points=[100], unaligned=True)
        with pytest.raises(InvalidRequest, match="still to be read"):
            s.keep_points([128])
        s.commit("read", branch="main")
        assert len(s.fork(2, at=100)) == 2
        with pytest.raises(NotKept, match=r"200 tokens.*100, 299, 300 tokens"):
            s.fork(1, at=201)
    assert repo.session("main:token=100").num_kv == 100
    with pytest.raises(NotKept, match=r"from these: 101, 300; with new tokens also 100, 299\."):
        repo.session("main:token=200")


def test_a_gap_is_replayed_where_that_is_allowed_and_counted(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    with repo.session(seed=1) as s:
        s.append(token_ids=ids(READ), points=[128])
        s.commit("read", branch="main")
    fed = count_forwarded(repo.engine, monkeypatch)
    with repo.session("main:token=200", policy="recompute") as again:
        proof = again.proof
        assert proof is not None and not proof.hit and proof.continuation == "close"
        assert (proof.num_cached_tokens, proof.num_recomputed_tokens, proof.first_mismatch) == (128, 72, 128)
        assert "no state was kept after 199 tokens" in proof.reason and sum(fed) == 72
        again.generate("", GREEDY)
        again.commit("on", branch="on")
    assert repo.stats().kv_nbytes < 2 * repo.show("main").nbytes, "what was loaded is shared"


def test_twenty_turns_of_a_live_session_prefill_new_tokens_only(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each turn's two tokens, and the last one that was sampled before them; by what the model is fed, too."""
    fed = count_forwarded(repo.engine, monkeypatch)
    with repo.session(seed=1) as s:
        s.append(token_ids=ids(READ))
        ends = [READ]
        for turn in range(20):
            fed.clear()
            out = s.generate(token_ids=ids(2, turn), sampling=GREEDY)
            assert out.usage.num_prefilled_tokens == (2 if turn == 0 else 3)
            assert sum(fed) == out.usage.num_prefilled_tokens + 5
            ends += [s.num_tokens - 6, s.num_tokens]
        s.commit("talked", branch="main")
    shown = repo.show("main")
    assert set(ends) <= set(shown.resumable or ()), "every turn can be gone back to"
    assert shown.entry.points == tuple(end - 1 for end in ends)


def test_twelve_forks_share_all_but_their_own_tokens_and_states(repo: Repository) -> None:
    with repo.session(seed=1) as s:
        s.append(token_ids=ids(1200), points=[512])
        s.commit("read", branch="main")
    one, groups, state = repo.stats().kv_nbytes, repo.engine.info.groups, state_nbytes(repo.engine)
    with repo.fork("main", 12) as kids:
        kids.commit("same")
        assert repo.stats().kv_nbytes <= 1.01 * one
        kids.generate([""] * 12, GREEDY)
        kids.commit("on")
    own = 12 * (5 * token_nbytes(groups) + state)
    assert repo.stats().kv_nbytes <= 1.01 * one + own
    points = repo.show("on/3").entry.points
    assert points == (512, 1199, 1200, 1205), "the parent's, and one of its own"


def test_a_child_shares_the_state_and_the_pages_until_it_runs(repo: Repository) -> None:
    """Law 4: no KV of its own, one tail block, and a state when it has run."""
    engine = repo.engine
    with repo.session(seed=1) as s:
        s.append(token_ids=ids(700))
        parent = engine._get(s.ref).kv  # type: ignore[attr-defined]
        for kid in s.fork(3):
            kv = engine._get(kid.ref).kv  # type: ignore[attr-defined]
            assert kv.points[700] is parent.points[700]
            assert [run.extent for run in kv.runs[:-1]] == [parent.runs[0].extent] and kv.runs[-1].count == 1
            kid.generate("x", GREEDY)
            kv = engine._get(kid.ref).kv  # type: ignore[attr-defined]
            assert kv.points[700] is parent.points[700] and kv.points[kv.num_tokens] is not parent.points[700]


def test_match_and_gc_and_verify_know_points(repo: Repository) -> None:
    with repo.session(seed=1) as s:
        s.append(token_ids=ids(READ), points=[128])
        s.commit("read", branch="main")
    tokens = ids(READ)
    assert repo.match(token_ids=(*tokens[:200], 1)).num_tokens == 129  # type: ignore[union-attr]
    assert repo.match(token_ids=(*tokens[:128], 1)).num_tokens == 128  # type: ignore[union-attr]
    assert repo.match(token_ids=tokens[:128]) is None, "nothing new follows, so nothing says what comes next"
    for point in ("main", "main:token=128", "main:token=129"):
        report = repo.verify(point, num_tokens=3, fresh_process=False)
        assert all(law.held is not False for law in report.laws), (point, report.laws)
    before = repo.stats().kv_nbytes
    with repo.session("main:token=128") as child:
        child.append(token_ids=ids(200, 4), points=[192, 256])
        child.commit("other", branch="other")
    added, state = repo.stats().kv_nbytes - before, state_nbytes(repo.engine)
    assert added >= 4 * state, "after 192, 256, 327 and 328 tokens"
    repo.delete_branch("other")
    repo.gc(keep_reflog_s=0)
    assert repo.stats().kv_nbytes == before
    assert repo.session("main:token=128").num_kv == 128


def test_a_live_fork_elsewhere_reads_the_gap_again_where_that_is_allowed(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for all children. What was read again is stored anew, and continues from disk with the bits that it has."""
    with repo.session(seed=1) as s:
        s.append(token_ids=ids(READ), points=[128])
        s.commit("read", branch="main")
        with pytest.raises(NotKept):
            s.fork(3, at=200)
        fed = count_forwarded(repo.engine, monkeypatch)
        again = s.reread(200)
    kids = again.fork(3)
    assert sum(fed) == 72
    proof = again.proof
    assert proof is not None and (proof.num_cached_tokens, proof.num_recomputed_tokens) == (128, 72)
    assert not proof.hit and proof.continuation == "close"
    kids.commit("k")
    entries = read_entries(repo.store, read_state(repo.store, repo.resolve("k/0").state))
    assert [(entry.start, entry.length) for entry in entries] == [(0, 128), (128, 72)]
    whole = kids[0].generate("", GREEDY)
    with repo.session("k/0") as restored:
        assert restored.generate("", GREEDY).logprobs == whole.logprobs


def test_what_a_chat_reads_again_is_counted_as_prefilled(
    engine: Engine, repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the model ran: the answer is asked for again where no state was kept at the end of its prompt."""
    asked = [{"role": "user", "content": "Who are you? " * 20}]
    with repo.session(seed=1) as s:
        s.chat(history=asked, sampling=GREEDY)
        s.commit("asked", branch="main")
    with repo.session("main") as s:
        ran = count_forwarded(engine, monkeypatch)
        usage = s.chat(history=asked, sampling=GREEDY).completion.usage
        assert sum(ran) == usage.num_prefilled_tokens + usage.num_completion_tokens - 1
        assert usage.num_cached_tokens + usage.num_prefilled_tokens == usage.num_prompt_tokens
        assert usage.num_prefilled_tokens > 100


def test_a_chat_that_drops_what_it_said_goes_back_to_a_point(repo: Repository) -> None:
    """A conversation that is given whole, with another answer: what comes after the last point is read again."""
    with repo.session(seed=1) as s:
        s.chat("Who are you?", GREEDY)
        told = [
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": "Nobody at all"},
            {"role": "user", "content": "Really?"},
        ]
        s.chat(history=told, sampling=GREEDY)
        assert "Nobody at all" in s.text and "Really?" in s.text
        s.commit("told", branch="main")
    report = repo.verify("main", num_tokens=2, fresh_process=False)
    assert all(law.held is not False for law in report.laws), report.laws
