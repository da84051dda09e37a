"""Laws of forking and hydrating through the porcelain: where, how exact, and what the others notice."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

import thaw
from thaw import Sampling
from thaw.core.errors import Busy, IdentityMismatch, InvalidRequest, PolicyMismatch
from thaw.core.sampling import derive
from thaw.data import pack
from thaw.engines.base import Engine
from thaw.repo import Repository, Session

WARM = Sampling(temperature=1.0, max_tokens=40, ignore_eos=True, logprobs=2)


@pytest.fixture
def parent(repo: Repository) -> Session:
    """A session of two prompts and two completions, committed to main."""
    s = repo.session(seed=42)
    s.append("The document. " * 60)
    s.generate("First? ", WARM)
    s.generate("Second? ", WARM)
    s.commit("done", branch="main")
    return s


def test_a_hydrated_session_is_the_stored_one(repo: Repository, parent: Session) -> None:
    back = repo.session("main")
    assert (back.tokens, back.turns, back.seed, back.num_kv) == (
        parent.tokens, parent.turns, parent.seed, parent.num_kv,
    )  # fmt: skip
    assert back.proof is not None and back.proof.hit and back.proof.num_cached_tokens == parent.num_kv
    assert back.branch == "main" and back.parent == parent.parent
    assert back.generate("x", WARM).logprobs == parent.generate("x", WARM).logprobs


def test_resuming_inside_a_completion_repeats_the_parent_bit_for_bit(repo: Repository, parent: Session) -> None:
    turn = parent.turns[-1]
    for k in (turn.start + 1, turn.start + 17, turn.end - 1):
        out = repo.session(f"main:{k}").resume()
        assert out.token_ids == parent.tokens[turn.start :] and out.logprobs == turn.logprobs
        assert out.text == turn.text and out.top_logprobs == turn.top_logprobs


def test_a_cut_before_the_first_generated_token_repeats_the_parent_too(repo: Repository) -> None:
    s = repo.session(seed=9)
    s.append("Read to the end.")
    s.commit("read", branch="main")
    ours = s.generate("", WARM)
    back = repo.session("main")
    assert back.num_kv == back.num_tokens  # the boundary's hidden state was kept
    assert back.generate("", WARM).logprobs == ours.logprobs


def test_every_interior_point_holds_its_tokens_and_all_but_the_last_ones_kv(repo: Repository, parent: Session) -> None:
    total = parent.num_tokens
    for k in (0, 1, 2, 255, 256, 257, 512, total - 1):
        with repo.session(f"main:{k}") as s:
            assert s.tokens == parent.tokens[:k] and s.num_kv == max(0, k - 1)
            assert not s.turns or s.turns[-1].end == k


def test_four_live_children_equal_four_hydrated_ones(repo: Repository, parent: Session) -> None:
    live = parent.fork(4)
    ours = live.generate("Go", WARM)
    with thaw.load_engine("fake") as other, thaw.open(repo.path, engine=other) as there:
        theirs = there.fork("main", 4).generate("Go", WARM)
    assert [o.token_ids for o in ours] == [t.token_ids for t in theirs]
    assert [o.logprobs for o in ours] == [t.logprobs for t in theirs]
    assert len({o.token_ids for o in ours}) == 4
    assert [kid.seed for kid in live] == [derive(42, parent.num_tokens, i) for i in range(4)]


def test_children_of_a_pivot_resume_apart_and_replay_repeats_the_parent(repo: Repository, parent: Session) -> None:
    turn = parent.turns[-1]
    pivot = turn.start + 7
    stored, live = repo.fork(f"main:{pivot}", 3).resume(), parent.fork(3, at=pivot).resume()
    assert [s.token_ids for s in stored] == [o.token_ids for o in live] and len({s.token_ids for s in stored}) == 3
    assert all(s.token_ids[:7] == parent.tokens[turn.start : pivot] for s in stored)
    for again in (repo.fork(f"main:{pivot}", 2, replay=True), parent.fork(2, at=pivot, replay=True)):
        assert all(out.token_ids == parent.tokens[turn.start :] for out in again.resume())


def test_children_do_not_touch_the_parent_or_one_another(repo: Repository, parent: Session) -> None:
    before = parent.view()
    kids = parent.fork(3)
    kids.generate(["a", "bb", "ccc"], [WARM, Sampling(max_tokens=3, ignore_eos=True), WARM])
    kids[1].close()
    assert parent.view() == before and kids[0].tokens != kids[2].tokens
    assert kids[2].generate("still here", WARM).text


def test_a_group_takes_one_prompt_or_one_each_and_nothing_between(parent: Session) -> None:
    with parent.fork(2) as kids:
        deltas = list(kids.stream("x", WARM))
        assert {d.index for d in deltas} == {0, 1} and len(kids[:1]) == 1 and kids.proofs[0] is not None
        with pytest.raises(InvalidRequest, match="3 prompts for 2 sessions"):
            kids.generate(["a", "b", "c"])
    with pytest.raises(InvalidRequest, match="closed"):
        kids[0].generate("x")


def test_another_model_is_refused_with_both_values(repo: Repository, parent: Session) -> None:
    stored = repo.show("main").model.weights
    with thaw.load_engine("fake", seed=1) as other, thaw.open(repo.path, engine=other) as there:
        with pytest.raises(IdentityMismatch) as caught:
            there.session("main")
        assert caught.value.field == "weights" and stored in str(caught.value)
        assert other.identity().weights in str(caught.value)
        assert there.match(parent.tokens) is None


def test_recomputing_is_allowed_counted_and_shares_no_bytes(repo: Repository, parent: Session) -> None:
    repo.engine.set_policy("2")
    with pytest.raises(PolicyMismatch):
        repo.session("main")
    s = repo.session("main", policy="recompute")
    assert s.proof is not None and s.proof.num_recomputed_tokens == s.num_tokens and not s.proof.hit
    done = s.commit("under the new policy", branch="next")
    assert repo.show("next").model.policy == "2" and done.nbytes_written > 32 * 800
    assert repo.verify("next", fresh_process=False).ok


def test_a_pack_that_gc_moved_is_looked_up_once_more(
    repo: Repository, parent: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []
    hydrate = repo.engine.hydrate

    def moved_once(plan):  # type: ignore[no-untyped-def]
        plans.append(plan)
        if len(plans) == 1:
            raise pack.MissingPack("gc moved it")
        return hydrate(plan)

    monkeypatch.setattr(repo.engine, "hydrate", moved_once)
    assert repo.session("main").tokens == parent.tokens and len(plans) == 2


def test_a_parked_session_comes_back_whole(parent: Session) -> None:
    child = parent.fork(1, replay=True)[0]
    assert child.park().parked
    assert child.generate("x", WARM).logprobs == parent.generate("x", WARM).logprobs


def test_a_trajectory_is_aligned_token_by_token(repo: Repository, parent: Session) -> None:
    t = parent.trajectory()
    assert t.prompt_ids + t.completion_ids == parent.tokens
    assert len(t.completion_ids) == len(t.logprobs) == len(t.mask) == len(t.policy_versions)
    assert sum(t.mask) == 80 and t.mask[:40] == (1,) * 40 and t.mask[40:48] == (0,) * 8
    assert t.logprobs[:40] == parent.turns[2].logprobs and set(t.policy_versions) == {"0"}
    stored = repo.session("main").trajectory()
    assert stored.num_inherited_tokens == parent.num_tokens and not any(stored.own_mask)
    assert msgspec.structs.replace(stored, num_inherited_tokens=0) == t


def test_a_busy_session_is_refused_by_name_and_streams_can_be_cancelled(tmp_path: Path, slow_engine: Engine) -> None:
    with thaw.open(tmp_path / "r", engine=slow_engine) as repo:
        s = repo.session()
        with s.stream("go", Sampling(max_tokens=500, ignore_eos=True)) as stream:
            next(iter(stream))
            with pytest.raises(Busy):
                s.append("too early")
        assert stream.result(10).finish_reason == "abort" and s.num_tokens < 300


def test_objects_refuse_to_work_in_a_forked_process(repo: Repository, parent: Session) -> None:
    group = parent.fork(1)
    pid = os.fork()
    if pid == 0:
        code = 0
        for use in (repo.log, lambda: parent.tokens, group.resume, parent.commit):
            try:
                use()
                code = 1
            except InvalidRequest as error:
                code |= 0 if "forked" in str(error) else 2
            except BaseException:  # noqa: BLE001 - counted
                code |= 4
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_another_librarys_sampling_is_read_by_name_and_extras_are_refused(parent: Session) -> None:
    class SamplingParams:
        n, temperature, top_p, max_tokens, seed, stop, prompt_logprobs = 1, 0.0, 1.0, 3, None, ["zz"], None

    assert len(parent.generate("x", SamplingParams()).token_ids) <= 3
    SamplingParams.prompt_logprobs = 5  # type: ignore[assignment]
    with pytest.raises(thaw.ThawError, match="prompt_logprobs"):
        parent.generate("x", SamplingParams())
    with pytest.raises(InvalidRequest, match=r"thaw\.Sampling"):
        parent.generate("x", {"temperature": 1})
