"""Laws of committing: what is written, what is shared, what a conflict leaves."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import thaw
from thaw import Sampling
from thaw.core.errors import BadPoint, InvalidRequest, NotFound, RefConflict
from thaw.core.ids import CommitId
from thaw.core.objects import NODE_ENTRIES, Segment, SegmentEntry, SegmentNode, State
from thaw.engines.base import Engine
from thaw.repo import CommitConflict, Repository
from thaw.repo.kept import MAX_PIECES, Kept
from thaw.repo.timeline import read, read_entries, read_segments, read_state

DOCUMENT = "All of this was read once. " * 130


def blobs(repo: Repository, point: str) -> set[str]:
    line = read(repo.store, read_state(repo.store, repo.resolve(point).state))
    return {blob for segment in line.segments for ids in segment.blobs.values() for blob in ids}


def payload(repo: Repository, points: list[str]) -> int:
    """Bytes of KV that these points need together."""
    found = repo.store.locate(set().union(*(blobs(repo, p) for p in points)))
    return sum(location.nbytes for location in found.values())


def test_a_commit_holds_tokens_turns_seed_and_every_segment(repo: Repository) -> None:
    s = repo.session(seed=11)
    s.append(DOCUMENT)
    out = s.generate("What?", Sampling(max_tokens=9))
    done = s.commit("asked", branch="main", meta={"git": "abc"})
    state = repo.store.get_as(done.state, State)
    line = read(repo.store, state)
    assert line.tokens == s.tokens and line.turns == s.turns and int(state.seed) == 11
    assert state.num_kv == len(s.tokens) - 1 and state.tail_tokens == s.tokens[-1:]
    assert line.turns[-1].text == out.text
    assert done.num_tokens == len(s.tokens) and done.branch == "main" and done.nbytes_written > 0
    assert set(done.stages) >= {"cut", "write", "sync", "store", "total"}
    entry = repo.log("main")[0]
    assert entry.meta == {"git": "abc"} and entry.origin["engine"] == "fake" and entry.refs == ("HEAD -> main",)


def test_equal_sessions_have_equal_states(repo: Repository) -> None:
    ids = []
    for _ in range(2):
        s = repo.session(seed=3, salt="same")
        s.append(DOCUMENT)
        s.generate("Go on", Sampling(max_tokens=20))
        ids.append(s.commit())
    assert ids[0].state == ids[1].state and ids[0].commit != ids[1].commit


def test_a_second_commit_writes_only_new_tokens(repo: Repository) -> None:
    s = repo.session()
    s.append(DOCUMENT)
    first = s.commit("read", branch="main")
    before = blobs(repo, "main")
    s.generate("And?", Sampling(max_tokens=12))
    second = s.commit("asked")
    assert before <= blobs(repo, "main") and second.nbytes_written < first.nbytes_written / 10
    assert repo.log("main")[0].parents == (first.commit,) and s.parent == second.commit
    again = s.commit("nothing new")
    assert again.state == second.state and again.nbytes_written == 0


def test_twelve_forks_cost_one_snapshot_and_their_own_tokens(repo: Repository) -> None:
    s = repo.session()
    s.append(DOCUMENT)
    s.commit("read", branch="main")
    one = payload(repo, ["main"])
    with s.fork(12) as kids:
        kids.generate("", Sampling(max_tokens=64, ignore_eos=True))
        done = kids.commit("try")
    token_nbytes = 2 * 2 * 2 * 4
    own = 12 * 64 * token_nbytes
    assert payload(repo, ["main", *(f"try/{i}" for i in range(12))]) <= 1.01 * one + own
    assert all(blobs(repo, "main") <= blobs(repo, f"try/{i}") for i in range(12))
    assert sum(d.nbytes_written for d in done) <= own + 12 * 1024


def test_children_hydrated_elsewhere_share_the_blobs_too(tmp_path: Path, repo: Repository) -> None:
    s = repo.session()
    s.append(DOCUMENT)
    s.commit("read", branch="main")
    with thaw.load_engine("fake") as other, thaw.open(repo.path, engine=other) as there:
        with there.fork("main:1000", 3) as kids:
            kids.generate("more", Sampling(max_tokens=8))
            kids.commit("far")
        shared = blobs(there, "main") & blobs(there, "far/0") & blobs(there, "far/2")
        assert len(shared) == 2 * 4  # two heads of the four segments that token 999 reaches into
        entries = read_entries(there.store, read_state(there.store, there.resolve("far/0").state))
        assert entries[3] == SegmentEntry(segment=entries[3].segment, start=768, length=999 - 768)


def test_full_nodes_are_never_rewritten(repo: Repository) -> None:
    s = repo.session()
    for _i in range(NODE_ENTRIES + 2):
        s.append("x" * 256)
    first = s.commit("long", branch="main")
    s.append("y" * 300)
    second = s.commit("longer")
    nodes = [repo.store.get_as(done.state, State).nodes for done in (first, second)]
    assert nodes[0][0] == nodes[1][0] and nodes[0][1] != nodes[1][1]
    assert len(repo.store.get_as(nodes[0][0], SegmentNode).entries) == NODE_ENTRIES
    with thaw.open(repo.path, engine=repo.engine) as there:
        live = there.session("main")
        live.append("z")
        third = live.commit()
    assert repo.store.get_as(third.state, State).nodes[0] == nodes[0][0]


def test_dust_is_written_once_more_when_its_window_is_full(repo: Repository) -> None:
    s = repo.session()
    for _ in range(20):
        s.append("tick tock " * 2)
        s.commit("tick", branch="main")
    entries = read_entries(repo.store, read_state(repo.store, repo.resolve("main").state))
    first_window = [e for e in entries if e.start < 256]
    assert len(first_window) == 1 and first_window[0].length == 256
    assert len(entries) <= 1 + MAX_PIECES and repo.verify("main", fresh_process=False).ok


def test_segments_carry_the_hash_of_their_prefix(repo: Repository) -> None:
    from thaw.core import prefix

    s = repo.session()
    s.append("a" * 300)
    s.commit("one", branch="main")
    s.append("b" * 300)
    state = read_state(repo.store, repo.resolve(s.commit("two").commit[3:]).state)
    chains = prefix.chains(state.model, s.tokens)
    for _, segment in read_segments(repo.store, read_entries(repo.store, state)):
        assert isinstance(segment, Segment)
        window = segment.start // 256
        assert segment.window == chains[window]
        assert segment.prefix == prefix.extend(chains[window], s.tokens[window * 256 : segment.end])


def test_a_commit_in_the_middle_of_a_generation_is_a_prefix_of_it(tmp_path: Path, slow_engine: Engine) -> None:
    with thaw.open(tmp_path / "r", engine=slow_engine) as repo:
        s = repo.session(seed=5)
        s.append("A long enough beginning.")
        stream = s.stream("Go", Sampling(max_tokens=60, ignore_eos=True))
        for seen, _ in enumerate(stream):
            if seen == 10:
                done = s.commit("half way", branch="main")
                break
        whole = stream.result()
        assert done.num_tokens < s.num_tokens
        assert repo.show("main").unfinished and s.tokens[: done.num_tokens] == repo.show("main").tokens
        back = repo.session("main")
        again = back.resume()
        assert again.token_ids == whole.token_ids and again.logprobs == whole.logprobs and again.text == whole.text


def test_a_commit_in_the_middle_of_a_prefill_can_be_hydrated(tmp_path: Path) -> None:
    with thaw.load_engine("fake", step_s=0.1) as engine, thaw.open(tmp_path / "r", engine=engine) as repo:
        s = repo.session()
        reading = threading.Thread(target=s.append, args=("word " * 1600,))
        reading.start()
        while not s.num_tokens:
            pass
        s.commit("part", branch="main")
        reading.join()
        back = repo.session("main")
        assert 0 < back.num_tokens < 8000 and back.tokens == s.tokens[: back.num_tokens]
        assert back.turns[-1].kind == "prompt" and back.turns[-1].end == back.num_tokens


def test_of_two_committers_one_wins_and_the_other_keeps_its_commit(repo: Repository) -> None:
    s = repo.session()
    s.append(DOCUMENT)
    s.commit("base", branch="main")
    a, b = repo.session("main"), repo.session("main")
    a.append("one")
    b.append("two")
    won = a.commit("a")
    with pytest.raises(CommitConflict) as caught:
        b.commit("b")
    text = str(caught.value)
    assert "'main'" in text and won.commit[3:13] in text and "thaw branch NAME" in text and "thaw adopt" in text
    assert isinstance(caught.value, RefConflict) and caught.value.commit[3:19] in text
    assert repo.resolve("main").commit == won.commit and repo.reflog("main")[0].new == won.commit
    assert repo.show(caught.value.commit).tokens == b.tokens
    repo.gc(keep_reflog_s=3600)
    assert repo.show(caught.value.commit).tokens == b.tokens
    assert b.commit("b", branch="mine").nbytes_written < 1024  # the boundary alone
    assert b.commit("b wins", branch="main", expect="any").branch == "main"


def test_a_taken_branch_is_not_moved_by_a_new_session(repo: Repository) -> None:
    s = repo.session()
    s.append("one")
    s.commit(branch="main")
    other = repo.session()
    other.append("two")
    with pytest.raises(CommitConflict, match="expected nothing"):
        other.commit(branch="main")


def test_a_commit_on_no_branch_survives_gc_as_long_as_reflogs_are_kept(repo: Repository) -> None:
    s = repo.session()
    s.append("kept by the reflog")
    done = s.commit("loose")
    assert done.branch is None and repo.branches() == []
    repo.gc()
    assert repo.session(done.commit).tokens == s.tokens
    repo.gc(keep_reflog_s=0)
    with pytest.raises(thaw.ThawError):
        repo.resolve(done.commit)


def test_when_gc_took_what_was_kept_everything_is_written_again(repo: Repository) -> None:
    s = repo.session()
    s.append(DOCUMENT)
    first = s.commit("read", branch="main")
    repo.delete_branch("main")
    repo.gc(keep_reflog_s=0)
    assert not repo.store.has(first.commit)
    second = s.commit("again", branch="main")
    assert second.nbytes_written >= first.nbytes_written * 0.9 and repo.log("main")[0].parents == ()
    assert repo.verify("main", fresh_process=False).ok


def test_names_and_meta_are_checked_before_anything_is_written(repo: Repository) -> None:
    s = repo.session()
    s.append("x")
    with pytest.raises(BadPoint):
        s.commit(branch="no way")
    with pytest.raises(InvalidRequest, match="strings"):
        s.commit(meta={"n": 3})  # type: ignore[dict-item]
    assert list(repo.store.commits()) == []


def test_a_kept_part_can_be_cut_anywhere() -> None:
    entries = tuple(SegmentEntry(segment="b3:" + "0" * 64, start=i * 256, length=256) for i in range(4))
    kept = Kept(entries=entries, chains=("a", "b", "c", "d", "e"))
    assert kept.cut(2000) is kept
    for k in range(0, 1024, 37):
        cut = kept.cut(k)
        assert cut.end == k and len(cut.chains) == k // 256 + 1


def test_a_session_follows_in_history_what_it_is_told_to(repo: Repository) -> None:
    """`reparent` changes what the next commit follows, and nothing of what it holds or writes."""
    session = repo.session()
    session.append("one")
    first = session.commit("first").commit
    session.append("two")
    session.commit("second")
    child, alone = session.fork(2)
    child.reparent(first)
    alone.reparent(None)
    child.append("three")
    done, loose = child.commit("third"), alone.commit("alone")
    assert [entry.commit for entry in repo.log(done.commit)] == [done.commit, first]
    assert repo.log(loose.commit)[0].parents == ()
    assert repo.session(done.commit).text == "onetwothree"
    with pytest.raises(NotFound):
        child.reparent(CommitId("b3:" + "0" * 64))
