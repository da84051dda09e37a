"""Rebase: the same tokens under other weights; the drift of each is what the other weights really say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import thaw
from thaw import Sampling
from thaw.cli.app import run
from thaw.core.errors import InvalidRequest, RefConflict, Refused
from thaw.engines.base import Engine, GenerateRequest
from thaw.repo import Repository

ANSWER = Sampling(max_tokens=24, ignore_eos=True, temperature=0.9)


def rollout(repo: Repository) -> tuple[int, ...]:
    session = repo.session(seed=5)
    session.append("The river is long. ")
    session.generate("Why? ", ANSWER)
    session.append("And a tool says so. ")
    session.generate("", ANSWER)
    session.commit("rollout", branch="main")
    return session.tokens


def test_under_the_same_weights_nothing_drifts(repo: Repository) -> None:
    rollout(repo)
    found = repo.rebase("main")
    assert found.changed == "" and found.largest == 0.0 and len(found.drifts) == 48
    assert repo.live_sessions() == [] or all(one.is_open for one in repo.live_sessions())


def test_each_drift_is_what_the_other_weights_say(repo: Repository) -> None:
    tokens = rollout(repo)
    with thaw.load_engine("fake", seed=7) as other, thaw.open(repo.path, engine=other) as there:
        found = there.rebase("main")
        assert found.changed == "weights" and found.largest > 0.1
        num_seen = 0
        for one in found.drifts[::5]:
            session = there.session()
            session.append(token_ids=tokens[: one.position])
            top = session.generate("", Sampling(temperature=0.0, max_tokens=1, logprobs=100)).top_logprobs
            assert top is not None and one.now is not None
            told = dict(top[0])
            best = max(told, key=lambda token: told[token])
            assert one.best == best and one.margin == pytest.approx(told[best] - one.now, abs=1e-9)
            if one.token_id in told:
                num_seen += 1
                assert one.now == told[one.token_id]
        assert num_seen >= 2
        stored = [x for turn in there.show("main").turns if turn.logprobs for x in turn.logprobs]
        assert [one.stored for one in found.drifts] == stored


def test_a_branch_goes_on_under_the_new_weights(repo: Repository) -> None:
    tokens = rollout(repo)
    with thaw.load_engine("fake", seed=7) as other, thaw.open(repo.path, engine=other) as there:
        found = there.rebase("main", branch="step-2")
        assert found.commit == there.resolve("step-2").commit
        session = there.session("step-2")
        assert session.tokens == tokens and session.proof is not None
        assert session.proof.num_recomputed_tokens == 0  # the branch has KV of these weights
        assert [t.kind for t in session.turns] == [t.kind for t in there.show("main").turns]
        with pytest.raises(RefConflict):
            there.rebase("main", branch="step-2")


def test_by_default_a_partial_rollout_keeps_its_tokens_and_is_prefilled_again(repo: Repository) -> None:
    """What it goes on to is what the new weights say after these tokens, and nothing of the old KV is in it."""
    session = repo.session(seed=5)
    session.append("The river is long. ")
    session.generate("Why? ", ANSWER)
    session.commit("cut", branch="main")
    tokens = session.tokens
    with thaw.load_engine("fake", seed=7, policy="1") as other, thaw.open(repo.path, engine=other) as there:
        with pytest.raises(Refused):
            there.session("main")
        again = there.session("main", policy="recompute")
        assert again.tokens == tokens and again.proof is not None
        assert again.proof.num_recomputed_tokens == len(tokens) and again.proof.num_cached_tokens == 0
        done = again.generate("", ANSWER)
        assert again.trajectory().policy_versions == ("0",) * 24 + ("1",) * 24
        plain = other.open(seed=5)
        other.append(plain, tokens).result()
        alone = other.generate([GenerateRequest(session=plain, sampling=ANSWER)]).result()[0]
        assert (done.token_ids, done.logprobs) == (alone.token_ids, alone.logprobs)
    old = session.generate("", ANSWER)
    assert old.logprobs != done.logprobs  # the old weights say something else


def test_nothing_sampled_is_nothing_to_compare(repo: Repository) -> None:
    session = repo.session()
    session.append("one ")
    session.commit("read", branch="main")
    with pytest.raises(InvalidRequest, match="nothing was sampled"):
        repo.rebase("main")


def test_the_verb_prints_a_table_and_json(repo: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    rollout(repo)
    assert run(["-C", str(repo.path), "rebase", "main", "--engine", "fake", "--rows", "3"]) == 0
    out = capsys.readouterr().out
    assert "48 sampled tokens" in out and "margin" in out and "+0.0000" in out
    assert run(["-C", str(repo.path), "rebase", "main", "--engine", "fake", "--branch", "again", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["tokens"]) == 48 and told["largest_drift"] == 0.0 and told["branch"] == "again"
    assert run(["-C", str(repo.path), "rebase", "nothing", "--engine", "fake"]) == 2


@pytest.mark.slow("loads two models")
def test_transformers_drifts_under_other_weights_alone(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    with thaw.load_engine("transformers", model=str(tiny_model("llama"))) as engine:
        repo = thaw.open(tmp_path / "r", engine=engine)
        rollout(repo)
        same = repo.rebase("main")
        assert same.changed == "" and same.largest < 1e-4
    with thaw.load_engine("transformers", model=str(tiny_model("llama", seed=1))) as other:
        there = thaw.open(repo.path, engine=other)
        found = there.rebase("main")
        assert found.changed == "weights" and found.largest > 0.05


def test_a_drained_engine_replays_nothing(repo: Repository, engine: Engine) -> None:
    rollout(repo)
    repo.drain()
    with pytest.raises(thaw.ThawError, match="drained"):
        repo.rebase("main")
    assert engine.policy_version == "0"
