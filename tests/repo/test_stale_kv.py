"""KV that is kept over a policy step because its owner asked for it: exact, written down by ranges, and nobody else's.

The fake engine's next token is a hash of the KV of the whole prefix under the weights that run, so a byte of KV that
other weights computed than those that are claimed shows in every token after it.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import pytest

import thaw
from thaw import Sampling
from thaw.core.errors import (
    IdentityMismatch,
    InvalidRequest,
    PolicyMismatch,
    Refused,
    StaleSession,
    Unsupported,
)
from thaw.core.kv_ranges import KVRange
from thaw.core.objects import StaleState
from thaw.engines.base import Engine
from thaw.engines.embedded.weights import WeightsWatch
from thaw.repo import Repository, Session
from thaw.repo.timeline import read_entries, read_state

PROMPT = "The same question, asked of two policies in a row. " * 12
GREEDY = Sampling(temperature=0.0, max_tokens=12, ignore_eos=True)
SAMPLED = Sampling(max_tokens=12, ignore_eos=True, seed=7)


def read(repo: Repository, *, stale_kv: bool = True) -> Session:
    session = repo.session(seed=1, stale_kv=stale_kv)
    session.append(PROMPT)
    return session


def step(engine: Engine, version: int) -> None:
    """The weights of a version, and its name."""
    engine.update_weights(str(version))
    engine.set_policy(str(version))


def parts(ranges: tuple[KVRange, ...]) -> list[tuple[int, int, str]]:
    return [(one.start, one.end, one.policy) for one in ranges]


def unwatched(repo: Repository, weights: int, monkeypatch: pytest.MonkeyPatch, *, keep: int) -> Session:
    """What to compare with: a session whose engine does not notice that its weights change after `keep` tokens."""
    with monkeypatch.context() as patch:
        patch.setattr(WeightsWatch, "_look", lambda self: None)
        session = repo.session(seed=1)
        tokens = repo.engine.codec.encode(PROMPT, first=True)
        session.append(token_ids=tokens[:keep])
        change(repo.engine, weights)
        session.append(token_ids=tokens[keep:])
        return session


def change(engine: Engine, weights: int) -> None:
    """In place, and nobody is told."""
    engine._backend.weights_of(str(weights))()  # type: ignore[attr-defined]


# -- a session goes on


@pytest.mark.parametrize("groups", ["one", "two", "latent"])
def test_it_goes_on_over_the_old_kv_and_with_the_new_weights_bit_for_bit(
    tmp_path: Path, groups: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with thaw.load_engine("fake", groups=groups) as engine, thaw.open(tmp_path / "a", engine=engine) as repo:
        session, recomputed = read(repo), read(repo, stale_kv=False)
        recomputed.commit("asked", branch="main")
        step(engine, 1)
        got = session.generate(sampling=GREEDY)
        with repo.session("main", policy="recompute") as again:
            new = again.generate(sampling=GREEDY)
    with thaw.load_engine("fake", groups=groups) as engine, thaw.open(tmp_path / "b", engine=engine) as repo:
        old = read(repo).generate(sampling=GREEDY)
        oracle = unwatched(repo, 1, monkeypatch, keep=len(session_tokens(repo)) - 1)
        with monkeypatch.context() as patch:
            patch.setattr(WeightsWatch, "_look", lambda self: None)
            expected = oracle.generate(sampling=GREEDY)
    assert (got.token_ids, got.logprobs) == (expected.token_ids, expected.logprobs)
    assert len({got.token_ids, new.token_ids, old.token_ids}) == 3, "the control: it depends on KV and on weights"


def session_tokens(repo: Repository) -> list[int]:
    return repo.engine.codec.encode(PROMPT, first=True)


def test_view_proof_and_trajectory_say_which_policy_computed_which_kv(repo: Repository, engine: Engine) -> None:
    session = read(repo)
    n = session.num_tokens
    session.generate(sampling=SAMPLED)
    assert session.trajectory().kv_ranges == () and session.proof is None
    step(engine, 1)
    assert parts(session.view().kv_ranges) == [(0, n + 11, "0")], "also before it is used again"
    done = session.generate(sampling=SAMPLED)
    step(engine, 2)
    session.append(" and then?")
    now = session.trajectory()
    assert parts(now.kv_ranges) == [(0, n + 11, "0"), (n + 11, n + 23, "1"), (n + 23, session.num_kv, "2")]
    assert now.policy_versions == ("0",) * 12 + ("1",) * 12 + ("2",) * 10
    assert done.proof is not None and parts(done.proof.kv_ranges) == [(0, n + 11, "0")]
    assert session.proof is not None and parts(session.proof.kv_ranges) == [(0, n + 11, "0"), (n + 11, n + 23, "1")]


def test_weights_that_changed_under_the_same_policy_are_ranges_too(repo: Repository, engine: Engine) -> None:
    session = read(repo)
    n, former = session.num_tokens, engine.identity().weights
    change(engine, 5)
    session.generate(sampling=GREEDY)
    first, second = session.view().kv_ranges
    assert (first.start, first.end, first.policy, first.weights) == (0, n - 1, "0", former)
    assert (second.start, second.end, second.policy) == (n - 1, n + 11, "0")
    assert second.weights is None or second.weights == engine.identity().weights


def test_weights_that_nobody_asked_about_while_they_ran_are_not_guessed(repo: Repository, engine: Engine) -> None:
    session = read(repo)
    change(engine, 5)
    session.generate(sampling=GREEDY)
    assert session.view().kv_ranges[0].weights is None
    session.commit("kept", branch="main")
    assert [one.weights for one in repo.show("main").kv_ranges] == [None, engine.identity().weights]


def test_back_under_the_first_policy_it_is_all_of_one_again(repo: Repository, engine: Engine) -> None:
    expected = read(repo).generate(sampling=GREEDY)
    session = read(repo)
    with engine.policy(version="7"):
        assert parts(session.view().kv_ranges) == [(0, session.num_kv, "0")]
        session.fork(1).close()
        assert session.proof is not None and session.proof.kv_ranges
    assert session.view().kv_ranges == ()
    got = session.generate(sampling=GREEDY)
    assert (got.token_ids, got.logprobs) == (expected.token_ids, expected.logprobs)
    assert session.proof.kv_ranges == () == session.trajectory().kv_ranges


def test_it_can_be_asked_for_after_the_step(repo: Repository, engine: Engine) -> None:
    asked, before = read(repo, stale_kv=False), read(repo)
    step(engine, 1)
    with pytest.raises(StaleSession, match=r"session\.keep_stale_kv\(\)"):
        asked.generate(sampling=GREEDY)
    asked.keep_stale_kv()
    assert asked.generate(sampling=GREEDY).logprobs == before.generate(sampling=GREEDY).logprobs


def test_a_parked_session_comes_back_with_its_ranges(repo: Repository, engine: Engine) -> None:
    session, twin = read(repo), read(repo)
    session.park()
    step(engine, 1)
    assert parts(session.view().kv_ranges) == [(0, len(session_tokens(repo)), "0")]
    got, expected = session.generate(sampling=GREEDY), twin.generate(sampling=GREEDY)
    assert got.logprobs == expected.logprobs and session.view().kv_ranges == twin.view().kv_ranges


def test_a_chat_that_drops_tokens_keeps_what_was_asked_for(repo: Repository, engine: Engine) -> None:
    session = repo.session(seed=1, stale_kv=True)
    session.chat("what?", SAMPLED)
    step(engine, 1)
    again = session.chat(history=[{"role": "user", "content": "what?"}, {"role": "user", "content": "why?"}],
                         sampling=SAMPLED)  # fmt: skip
    assert again.completion.token_ids and parts(session.view().kv_ranges)[0][2] == "0"
    step(engine, 2)
    session.append(" more")
    assert [policy for _, _, policy in parts(session.view().kv_ranges)] == ["0", "1", "2"]


# -- forks


def test_children_inherit_the_ranges_and_go_on_like_the_parent(repo: Repository, engine: Engine) -> None:
    session = read(repo)
    n = session.num_tokens
    step(engine, 1)
    session.generate(sampling=SAMPLED)
    with session.fork(2) as whole, session.fork(2, at=n + 6) as inside, session.fork(1, at=n - 9) as early:
        for child in (*whole, *inside, *early):
            assert child.proof is not None and child.proof.kv_ranges == child.view().kv_ranges
        assert parts(whole[0].view().kv_ranges) == [(0, n - 1, "0"), (n - 1, n + 11, "1")]
        assert parts(inside[0].view().kv_ranges) == [(0, n - 1, "0"), (n - 1, n + 5, "1")]
        assert parts(early[0].view().kv_ranges) == [(0, n - 10, "0")]
        step(engine, 2)
        assert [parts(child.view().kv_ranges)[-1][2] for child in (*whole, *inside)] == ["1"] * 4
        said = [child.generate(sampling=GREEDY) for child in (session, whole[0])]
        assert said[0].logprobs == said[1].logprobs


def test_a_fork_that_nobody_asked_about_is_refused(repo: Repository, engine: Engine) -> None:
    """Whoever forks by the engine's own verb, as a pool does, gets no stale KV by the way."""
    session = read(repo)
    step(engine, 1)
    (ref,) = engine.fork(session.ref, 1, replay=True).result()
    assert engine.view(ref).kv_ranges == session.view().kv_ranges
    for use in (
        lambda: engine.append(ref, (1,)).result(),
        lambda: engine.fork(ref, 1).result(),
        lambda: engine.park(ref).result(),
    ):
        with pytest.raises(StaleSession, match=r"policy '0'.*nobody asked"):
            use()
    engine.keep_stale_kv(ref)
    assert engine.append(ref, (1,)).result().kv_ranges


def test_a_pool_refuses_such_a_session_and_such_a_commit(repo: Repository, engine: Engine) -> None:
    session = read(repo)
    step(engine, 1)
    session.generate(sampling=GREEDY)
    session.commit("kept", branch="main")
    with thaw.ForkPool(engine, repo=repo) as pool:
        for point in (session, "main"):
            with pytest.raises(Refused, match="policy '0'"):
                pool.fork(point, 2, GREEDY)


# -- refused everywhere else


def updates(engine: Engine) -> dict[str, Callable[[int], None]]:
    """The ways in which weights change: from files, in place without a word, and sent by another process."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    sender = multiprocessing.get_context("spawn").Process(target=send_weights, args=(theirs,), daemon=True)
    sender.start()

    def transfer(version: int) -> None:
        ours.send(version)
        engine._backend.weights[:] = ours.recv()  # type: ignore[attr-defined]
        engine.set_policy(f"sent-{version}")

    def end(_: int) -> None:
        ours.send(None)
        sender.join(10)

    return {
        "disk": lambda version: engine.update_weights(str(version)),
        "in place": lambda version: change(engine, version),
        "transfer": transfer,
        "end": end,
    }


def send_weights(pipe: Connection) -> None:
    """A trainer's process: it is asked for a version and sends its bytes."""
    while (version := pipe.recv()) is not None:
        pipe.send(version.to_bytes(8, "little"))


def test_a_stale_policy_is_refused_in_200_of_200_weight_updates(repo: Repository, engine: Engine) -> None:
    """Live, forked, parked and committed; whatever way the weights changed, and by every verb."""
    ways = updates(engine)
    verbs: dict[str, Callable[[Session], Any]] = {
        "append": lambda s: s.append("x"),
        "generate": lambda s: s.generate(sampling=GREEDY),
        "fork": lambda s: s.fork(2),
        "commit": lambda s: s.commit("late", branch="late"),
        "park": lambda s: s.park(),
    }
    refused = 0
    try:
        for number in range(200):
            with repo.session(seed=1) as session:
                session.append(f"rollout {number}")
                session.commit("before", branch=f"b{number}", expect="any")
                if number % 7 == 3:
                    session.park()
                before = engine.identity()
                ways[("disk", "in place", "transfer")[number % 3]](1000 + number)
                with pytest.raises(StaleSession):
                    verbs[list(verbs)[number % 5]](session)
                with pytest.raises((IdentityMismatch, PolicyMismatch)):
                    repo.session(f"b{number}")
                assert repo.match(session.tokens) is None
                assert engine.identity() != before
                refused += 1
    finally:
        ways["end"](0)
    assert refused == 200 and repo.store.ref("late") is None


def test_what_changed_while_tokens_were_computed_is_never_kept(tmp_path: Path) -> None:
    """Their KV is of no one policy, and no range would tell the truth."""
    with thaw.load_engine("fake", step_s=0.004) as engine, thaw.open(tmp_path / "runs", engine=engine) as repo:
        session = read(repo)
        stream = session.stream("", Sampling(max_tokens=400, ignore_eos=True))
        next(iter(stream))
        engine.set_policy("1")
        with pytest.raises(StaleSession, match="of no one policy"):
            stream.result()
        n = len(session_tokens(repo))
        with pytest.raises(StaleSession, match=rf"while tokens {n} to \d+ of the session were computed"):
            session.generate(sampling=GREEDY)
        with pytest.raises(StaleSession, match="of no one policy"):
            session.commit("torn")


def test_a_generation_that_was_stopped_before_the_step_goes_on_after_it(tmp_path: Path) -> None:
    with thaw.load_engine("fake", step_s=0.004) as engine, thaw.open(tmp_path / "runs", engine=engine) as repo:
        session = read(repo)
        stream = session.stream("", Sampling(max_tokens=400, ignore_eos=True))
        next(iter(stream))
        stream.cancel()
        begun = stream.result()
        step(engine, 1)
        with pytest.raises(PolicyMismatch, match="begun under policy '0'"):
            session.resume()
        rest = session.generate(sampling=GREEDY)
        t = session.trajectory()
        assert t.policy_versions == ("0",) * len(begun.token_ids) + ("1",) * len(rest.token_ids)
        assert [policy for _, _, policy in parts(t.kv_ranges)] == ["0", "1"]


@pytest.mark.parametrize("groups", ["hybrid", "states"])
def test_recurrent_states_are_of_no_one_policy_and_refused_by_name(tmp_path: Path, groups: str) -> None:
    with thaw.load_engine("fake", groups=groups) as engine, thaw.open(tmp_path / "runs", engine=engine) as repo:
        assert "stale-kv" not in engine.info.capabilities
        with pytest.raises(Unsupported, match="stale_kv"):
            repo.session(stale_kv=True)
        with repo.session() as session:
            session.append(PROMPT)
            session.commit("told", branch="main")
            with pytest.raises(Unsupported, match="stale_kv"):
                session.keep_stale_kv()
            with pytest.raises(Unsupported, match="recurrent"):
                engine.keep_stale_kv(session.ref)
        with pytest.raises(Unsupported, match="stale_kv"):
            repo.session("main", stale_kv=True)


# -- commits


@pytest.fixture
def kept(repo: Repository, engine: Engine) -> Session:
    """A session of policies 0 and 1, committed as `main`."""
    session = read(repo)
    session.generate(sampling=SAMPLED)
    session.commit("by policy 0", branch="main")
    step(engine, 1)
    session.generate(sampling=SAMPLED)
    session.commit("by 0 and 1", branch="main")
    return session


def test_a_commit_says_which_policies_computed_its_kv(repo: Repository, kept: Session) -> None:
    n = len(session_tokens(repo))
    shown, tip = repo.show("main"), repo.log("main", limit=2)
    assert parts(shown.kv_ranges) == [(0, n + 11, "0"), (n + 11, n + 23, "1")] == parts(tip[0].kv_ranges)
    assert tip[1].kv_ranges == () == repo.show("main~1").kv_ranges
    assert isinstance(repo.store.get(tip[0].state), StaleState)
    assert shown.model.policy == "1"
    assert repo.fsck().problems == []


def test_it_is_refused_unless_it_is_asked_for(repo: Repository, engine: Engine, kept: Session) -> None:
    n = len(session_tokens(repo))
    with pytest.raises(PolicyMismatch, match=r"policy '0', .* policy '1'.*stale_kv=True"):
        repo.session("main")
    with pytest.raises(PolicyMismatch, match="policy '0'"):
        repo.fork("main", 2)
    with pytest.raises(InvalidRequest, match="give one of"):
        repo.session("main", policy="recompute", stale_kv=True)
    with repo.session("main", policy="recompute") as again:
        assert again.proof is not None and again.proof.num_recomputed_tokens == n + 24
        assert again.view().kv_ranges == ()
    step(engine, 0)
    with pytest.raises(PolicyMismatch):
        repo.session(f"main:token={n}")  # its model is policy 1's


def test_hydrated_as_it_is_it_goes_on_like_the_live_session(repo: Repository, kept: Session) -> None:
    with repo.session("main", stale_kv=True) as back, repo.fork("main", 2, replay=True, stale_kv=True) as children:
        assert back.proof is not None and back.proof.hit and back.proof.kv_ranges == kept.view().kv_ranges
        assert back.branch == "main"
        expected = kept.fork(1, replay=True)[0].generate(sampling=GREEDY)
        for session in (back, *children):
            assert session.trajectory().kv_ranges == kept.trajectory().kv_ranges
            got = session.generate(sampling=GREEDY)
            assert (got.token_ids, got.logprobs) == (expected.token_ids, expected.logprobs)
    with repo.session("main", policy="recompute") as other:
        assert other.generate(sampling=GREEDY).logprobs != expected.logprobs, (
            "the control: the bits are those of the KV"
        )


def test_at_a_prompts_end_nothing_decides_by_the_old_weights(repo: Repository, engine: Engine) -> None:
    """A commit there has the hidden state that the old weights computed: under others the last token runs again."""
    live = read(repo)
    live.commit("asked", branch="main")
    step(engine, 1)
    with repo.session("main", stale_kv=True) as back:
        got, expected = back.generate(sampling=GREEDY), live.generate(sampling=GREEDY)
    assert (got.token_ids, got.logprobs) == (expected.token_ids, expected.logprobs)
    assert got.usage.num_prefilled_tokens == 1
    assert repo.show("main").kv_ranges == (), "the commit itself is of one policy"


def test_a_later_commit_has_the_kv_that_was_computed_again(repo: Repository, engine: Engine, kept: Session) -> None:
    """The last token of what is stored runs again after a step, and its KV is another then."""
    n = len(session_tokens(repo))
    kept.append(" more")
    kept.commit("read by 1", branch="main")
    step(engine, 2)
    kept.generate(sampling=GREEDY)
    done = kept.commit("by 0, 1 and 2", branch="main")
    assert done.nbytes_written > 0
    assert parts(repo.show("main").kv_ranges) == [(0, n + 11, "0"), (n + 11, n + 28, "1"), (n + 28, n + 40, "2")]
    with repo.session("main", stale_kv=True) as back:
        assert back.view().kv_ranges == kept.view().kv_ranges
        expected, got = kept.generate(sampling=GREEDY), back.generate(sampling=GREEDY)
        assert got.logprobs == expected.logprobs


def test_it_shares_no_segment_with_a_commit_of_one_policy(repo: Repository, engine: Engine) -> None:
    """Segments are found by their model's prefix hash; and the last token of what one policy stored ran again."""
    session = read(repo)
    session.commit("asked", branch="main")
    step(engine, 1)
    session.generate(sampling=GREEDY)
    session.commit("answered", branch="main")
    used = [
        {entry.segment for entry in read_entries(repo.store, read_state(repo.store, repo.resolve(point).state))}
        for point in ("main~1", "main")
    ]
    assert used[0] and used[1] and not used[0] & used[1]
    with repo.session("main", stale_kv=True) as back:
        expected, got = session.generate(sampling=GREEDY), back.generate(sampling=GREEDY)
        assert got.logprobs == expected.logprobs


def test_commits_between_steps_write_what_is_new(repo: Repository, engine: Engine, kept: Session) -> None:
    kept.append("a few more words")
    small = kept.commit("more", branch="main").nbytes_written
    step(engine, 2)
    kept.append("and more still")
    after = kept.commit("more under 2", branch="main").nbytes_written
    whole = repo.show("main").nbytes
    assert 0 < small < whole // 4 and 0 < after < whole // 4


def test_match_never_finds_it(repo: Repository, engine: Engine, kept: Session) -> None:
    """Under either policy, with an engine or without; what policy 0 alone computed is found under policy 0."""
    tokens = kept.tokens
    assert repo.match(tokens) is None
    step(engine, 0)
    found = repo.match(tokens)
    assert found is not None and repo.show(found).kv_ranges == ()
    with thaw.open(repo.path) as plain:
        found = plain.match(tokens)
        assert found is not None and plain.show(found).kv_ranges == ()
        assert found.commit == plain.resolve("main~1").commit


def test_a_prefix_that_the_models_own_weights_computed_needs_no_asking(repo: Repository, engine: Engine) -> None:
    session = repo.session(seed=1, stale_kv=True)
    session.append("of policy one. ")
    n = session.num_tokens
    engine.set_policy("other")
    session.append("of another. ")
    engine.set_policy("0")
    session.append("of the first again.")
    session.commit("three", branch="main")
    assert [policy for _, _, policy in parts(repo.show("main").kv_ranges)] == ["0", "other", "0"]
    with repo.session(f"main:token={n}") as early:
        assert early.view().kv_ranges == () and early.proof is not None and early.proof.hit
    with pytest.raises(PolicyMismatch):
        repo.session(f"main:token={n + 4}")


def test_only_policy_and_weights_may_be_others(tmp_path: Path, repo: Repository, kept: Session) -> None:
    with (
        thaw.load_engine("fake", max_model_len=4096) as shorter,
        thaw.open(repo.path, engine=shorter) as there,
        pytest.raises(IdentityMismatch, match="max_model_len"),
    ):
        there.session("main", stale_kv=True)
    with thaw.load_engine("fake", seed=9) as elsewhere, thaw.open(repo.path, engine=elsewhere) as there:
        with pytest.raises((IdentityMismatch, PolicyMismatch)):
            there.session("main")
        with there.session("main", stale_kv=True) as asked:
            assert [one.policy for one in asked.view().kv_ranges] == ["0", "1"]
            asked.generate(sampling=GREEDY)
            assert [one.policy for one in asked.view().kv_ranges] == ["0", "1", "0"]


def test_an_engine_that_cannot_refuses_by_name(repo: Repository, engine: Engine, kept: Session) -> None:
    engine.info = msgspec.structs.replace(engine.info, capabilities=engine.info.capabilities - {"stale-kv"})
    for use in (
        lambda: repo.session(stale_kv=True),
        lambda: repo.session("main", stale_kv=True),
        lambda: repo.fork("main", 2, stale_kv=True),
        lambda: read(repo, stale_kv=False).keep_stale_kv(),
    ):
        with pytest.raises(Unsupported, match="the fake engine keeps no KV"):
            use()
    with pytest.raises(PolicyMismatch):
        repo.session("main")


def test_verify_takes_it_as_it_is_and_says_so(repo: Repository, engine: Engine, kept: Session) -> None:
    report = repo.verify("main", fresh_process=False)
    assert report.ok and report.kv_ranges == kept.view().kv_ranges
    assert {law.name: law.held for law in report.laws} == {
        "bytes": True, "identity": True, "cached": True, "state": True, "boundary": True,
    }  # fmt: skip
    assert repo.verify("main:turn=1", fresh_process=False).kv_ranges
    step(engine, 2)
    failed = {law.name for law in repo.verify("main", fresh_process=False).laws if law.held is False}
    assert failed == {"identity"}


def test_it_travels_and_is_whole(repo: Repository, engine: Engine, kept: Session, tmp_path: Path) -> None:
    repo.add_remote("origin", f"file://{tmp_path / 'bucket'}")
    repo.push("main", remote="origin")
    repo.gc(keep_reflog_s=0)
    with thaw.init(tmp_path / "there", engine=engine) as there:
        there.add_remote("origin", f"file://{tmp_path / 'bucket'}")
        with pytest.raises(PolicyMismatch):
            there.session("origin/main", fetch=True)
        with there.session("origin/main", fetch=True, stale_kv=True) as back:
            expected, got = kept.generate(sampling=GREEDY), back.generate(sampling=GREEDY)
            assert got.logprobs == expected.logprobs
        assert there.fsck().problems == []


def test_a_namespace_keeps_its_own(repo: Repository, engine: Engine) -> None:
    acme = repo.within("acme")
    session = acme.session(seed=1, stale_kv=True)
    session.append(PROMPT)
    step(engine, 1)
    session.generate(sampling=GREEDY)
    session.commit("kept", branch="main")
    assert parts(acme.show("main").kv_ranges) and repo.match(session.tokens) is None is acme.match(session.tokens)
    with acme.session("main", stale_kv=True) as back:
        assert back.view().kv_ranges == session.view().kv_ranges
    assert repo.fsck().problems == []
