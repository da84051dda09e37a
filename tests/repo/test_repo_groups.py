"""Repositories of models with windows and point states: what is written, what can be continued from, what is refused.
The fake engine keeps the window and the states of a session's end alone, as real engines do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import thaw
from thaw import Sampling
from thaw.core import canonical, objects
from thaw.core.errors import NewerFormat, NotKept
from thaw.core.identity import GroupedIdentity, ModelIdentity
from thaw.core.objects import Commit, GroupedSegment, Segment, SegmentNode, State
from thaw.engines.base import Engine
from thaw.engines.fake.shapes import WINDOW
from thaw.repo import Repository
from thaw.store import Store, fsck, links

TEXT = "A document that is read once. " * 20
GREEDY = Sampling(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with thaw.load_engine("fake", groups="hybrid", interior=False) as running:
        yield running


@pytest.fixture
def told(repo: Repository) -> Repository:
    """A session that was committed at 600 tokens (the prompt's end), and again 12 later."""
    s = repo.session(seed=1)
    s.append(TEXT)
    s.commit("read", branch="main")
    s.generate("", GREEDY)
    s.commit("answered", branch="main")
    return repo


def segments(store: Store, point: str = "main") -> list[Segment]:
    state = store.get_as(store.get_as(store.ref(point).target, Commit).state, State)  # type: ignore[union-attr]
    entries = [entry for node in state.nodes for entry in store.get_as(node, SegmentNode).entries]
    return [store.get_as(entry.segment, Segment) for entry in entries]


def test_a_commit_writes_the_window_and_the_states_and_shares_the_rest(told: Repository) -> None:
    found = segments(told.store)
    assert [(s.start, sorted(s.blobs)) for s in found] == [
        (0, ["full"]), (256, ["full"]), (512, ["full", "sliding"]), (600, ["full", "sliding"]),
    ]  # fmt: skip
    assert [type(s) for s in found] == [Segment, Segment, GroupedSegment, GroupedSegment]
    assert [s.first_of("sliding") for s in found[2:]] == [600 - WINDOW, 600]
    assert [[p.token for p in s.states] for s in found] == [[], [], [599, 600], [611]]


def test_every_point_that_is_named_goes_on_as_its_session_did(told: Repository) -> None:
    whole = told.show("main").tokens
    named = told.show("main").resumable
    assert named == (600, 601, 612)
    for token in named:
        with told.session(f"main:{token}") as s:
            out = s.resume() if 600 < token < 612 else s.generate("", GREEDY)
            if token < 612:
                assert whole[600:] == tuple(s.tokens)[600:612] and out.usage.num_prefilled_tokens <= 1


@pytest.mark.parametrize("token", [2, 100, 605, 610])
def test_another_token_is_refused_and_those_that_can_be_are_named(told: Repository, token: int) -> None:
    with pytest.raises(NotKept, match=r"from these: 600, 601, 612; with new tokens also 599, 611\."):
        told.session(f"main:{token}")


@pytest.mark.parametrize("token", [599, 611])
def test_a_token_that_a_state_is_kept_after_goes_on_with_new_tokens_alone(told: Repository, token: int) -> None:
    """All its tokens are cached, none runs again; without new ones nothing says what follows."""
    with told.session(f"main:{token}") as s:
        assert s.num_kv == token and s.proof is not None and s.proof.hit
        with pytest.raises(NotKept, match=f"state after {token} tokens is kept.*new tokens.*`reread`"):
            s.generate("", GREEDY)
        assert s.reread(token).generate("", GREEDY).token_ids
        out = s.generate("ab", GREEDY)
        assert (out.usage.num_prefilled_tokens, out.num_cached_tokens) == (2, token)
        s.commit("on", branch="on")
    assert told.show("on").resumable[-1] == token + 14  # type: ignore[index]


def test_a_fork_of_a_stored_point_commits_its_own_tokens_alone(told: Repository) -> None:
    before = told.stats().kv_nbytes
    with told.fork("main~1", 3) as kids:
        kids.generate(["one", "two", "three"], GREEDY)
        kids.commit("k")
    per_token = sum(g.token_nbytes for g in told.engine.info.groups if hasattr(g, "token_nbytes"))
    states = [g.nbytes for g in told.engine.info.groups if hasattr(g, "parts")]
    added = told.stats().kv_nbytes - before
    assert added <= 3 * (17 * per_token + 2 * sum(states)) + 3 * 32
    for i in range(3):
        assert [s.start for s in segments(told.store, f"k/{i}")] == [0, 256, 512, 600]
        with told.session(f"k/{i}") as s:
            assert s.generate("", GREEDY).usage.num_prefilled_tokens <= 1


def test_diff_stats_and_show_weigh_what_a_point_needs(told: Repository) -> None:
    d = told.diff("main~1", "main")
    assert d.num_common_tokens == 600 and d.nbytes_shared and d.a.nbytes_own and d.b.nbytes_own
    full = next(g for g in told.engine.info.groups if g.name == "full")
    assert d.nbytes_shared == 600 * full.token_nbytes + (600 - (600 - WINDOW)) * 12  # type: ignore[union-attr]
    shown = told.show("main~1")
    assert shown.nbytes == d.a.nbytes and shown.num_blobs > 6
    assert told.stats().whole_nbytes > 0


def test_verify_holds_at_a_kept_point_and_says_why_it_cannot_elsewhere(told: Repository) -> None:
    for point in ("main", "main~1", "main:601"):
        report = told.verify(point, num_tokens=4)
        assert all(law.held is not False for law in report.laws), (point, report.laws)
    report = told.verify("main:300", num_tokens=4)
    failed = next(law for law in report.laws if law.held is False)
    assert failed.name == "cached" and failed.seen == "not-kept" and "601" in failed.detail


def test_match_finds_the_most_that_can_be_gone_on_from(repo: Repository) -> None:
    """Not the point of the commit that has most tokens in common, if another one can be gone on from later."""
    with repo.session() as longer, repo.session() as shorter:
        longer.append(TEXT[:50])
        longer.append(TEXT[50:300])
        longer.commit("longer")
        shorter.append(TEXT[:100])
        point = shorter.commit("shorter").commit
        tokens = longer.tokens
    found = repo.match((*tokens[:120], 1, 2))
    assert found is not None and (found.num_tokens, found.commit) == (100, point)


def test_match_ends_where_its_commit_can_be_gone_on_from(told: Repository) -> None:
    tokens = told.show("main").tokens
    assert told.match(token_ids=(*tokens[:608], 1, 2)).num_tokens == 601  # type: ignore[union-attr]
    assert told.match(token_ids=(*tokens[:603],)).num_tokens == 601  # type: ignore[union-attr]
    assert told.match(token_ids=tokens[:599]) is None


def test_gc_fsck_and_a_rebuild_keep_the_states(told: Repository, tmp_path: Path) -> None:
    with told.fork("main", 1) as kids:
        kids.generate("x", GREEDY)
        kids.commit("gone")
    told.delete_branch("gone/0")
    told.gc(keep_reflog_s=0)
    path = told.path
    assert fsck(path).problems == []
    told.store.close()
    (path / "thaw.db").unlink()
    assert fsck(path, rebuild=True).ok
    with thaw.load_engine("fake", groups="hybrid", interior=False) as other, thaw.open(path, engine=other) as again:
        assert again.show("main").resumable == (600, 601, 612)
        assert again.session("main").generate("", GREEDY).usage.num_prefilled_tokens <= 1


def test_many_small_commits_do_not_write_their_window_anew(repo: Repository) -> None:
    s = repo.session(seed=1)
    for i in range(40):
        s.append(f"turn number {i:02}")
        s.commit(f"{i}", branch="main")
    found = segments(repo.store)
    assert len(found) == 40 + 560 // 256 and all(s.states for s in found if s.end % 256)
    with repo.session("main:14") as early:
        assert early.num_tokens == 14


@pytest.mark.parametrize(("at", "cached"), [(300, 0), (605, 600), (601, 600)])
def test_a_point_that_was_not_kept_is_recomputed_where_that_is_allowed(told: Repository, at: int, cached: int) -> None:
    """What comes after the nearest earlier point is read again, and counted; where the point was kept, nothing is."""
    point = f"main:token={at}"
    with told.session(point, policy="recompute") as again:
        proof = again.proof
        assert proof is not None
        if at in told.show("main").resumable:  # type: ignore[operator]
            assert proof.hit and proof.num_recomputed_tokens == 0
            return
        assert (proof.num_recomputed_tokens, proof.num_cached_tokens) == (at - cached, cached)
        assert (proof.first_mismatch, proof.continuation, proof.hit) == (cached, "close", False)
        assert f"cannot continue from token {at}" in proof.reason and "612" in proof.reason
        assert again.num_tokens == again.num_kv == at and again.generate("", GREEDY).token_ids
        before = told.stats().kv_nbytes
        again.commit("again", branch="again")
        full = next(g for g in told.engine.info.groups if g.name == "full")
        added = told.stats().kv_nbytes - before
        assert added < (at + 12) * full.token_nbytes - cached * 8, "what was loaded is shared"  # type: ignore[union-attr]
    with told.session("again") as live:
        assert live.num_tokens == at + 12 and live.proof is not None and live.proof.hit
    with pytest.raises(NotKept, match="allow recompute"):
        told.session(point)


def test_upkeep_by_an_older_thaw_refuses_and_takes_nothing(told: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its database is gone: one without what a newer thaw wrote would pass for the whole."""
    path = told.path
    with monkeypatch.context() as older:
        older.setattr(canonical, "NEWEST", {"thaw.turn": 2})
        older.setattr(links, "_DECODER", msgspec.json.Decoder(links._Commit | links._State | links._Segments
                      | links._Segment | links._Turns | links._Turn | links._ChatTurn | links._Model))  # fmt: skip
        for attempt in (told.gc, lambda: fsck(path), lambda: fsck(path, rebuild=True)):
            with pytest.raises(NewerFormat, match=r"thaw\.(model|segment)/2: written by a newer thaw"):
                attempt()
        told.store.close()
        data = (path / "thaw.db").read_bytes()
        (path / "thaw.db").write_bytes(b"nothing" + data[7:])
        with pytest.raises(NewerFormat, match="Upgrade thaw"):
            fsck(path, rebuild=True)
        assert (path / "thaw.db").read_bytes()[:7] == b"nothing"
    assert fsck(path, rebuild=True).ok and fsck(path).num_commits == 2


def test_an_older_thaw_refuses_such_objects_by_name(told: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canonical, "NEWEST", {"thaw.turn": 2})
    store = told.store
    state = store.get_as(store.get_as(store.ref("main").target, Commit).state, State)  # type: ignore[union-attr]
    assert type(store.get(state.model)) is GroupedIdentity
    for value in (store.get(state.model), segments(store)[-1]):
        _, data = objects.encode(value)
        with pytest.raises(NewerFormat, match=r"thaw\.(model|segment)/2: written by a newer thaw"):
            canonical.decode(data, ModelIdentity | Segment | State | Commit)  # type: ignore[arg-type]


def test_full_groups_alone_are_written_as_format_1_has_them(tmp_path: Path) -> None:
    with thaw.load_engine("fake", groups="two") as engine, thaw.open(tmp_path / "two", engine=engine) as repo:
        s = repo.session()
        s.append(TEXT)
        s.commit("read", branch="main")
        state = repo.store.get_as(repo.store.get_as(repo.resolve("main").commit, Commit).state, State)
        assert type(repo.store.get(state.model)) is ModelIdentity
        assert {type(segment) for segment in segments(repo.store)} == {Segment}
        assert msgspec.json.decode(objects.encode(segments(repo.store)[0])[1])["type"] == "thaw.segment/1"
        assert repo.verify("main:300", num_tokens=4).laws[0].held


@pytest.mark.parametrize("groups", ["one", "two", "latent", "hybrid", "states"])
def test_gc_frees_what_died_and_then_nothing_however_small_the_blobs(tmp_path: Path, groups: str) -> None:
    """Most of a pack of many small blobs is its header, which is not dead as long as they live."""
    keeps = groups in ("hybrid", "states")
    options = {"interior": False} if keeps else {}
    with thaw.load_engine("fake", groups=groups, **options) as engine, thaw.init(tmp_path / "r", engine=engine) as repo:
        s = repo.session(seed=1)
        s.append(token_ids=[1 + i % 200 for i in range(1600)], points=range(100, 700) if keeps else ())
        s.commit("whole", branch="main")
        whole = repo.stats().pack_nbytes
        report = repo.gc(keep_reflog_s=0)
        assert (report.packs_rewritten, report.nbytes_freed, report.nbytes_kept) == (0, 0, whole)
        for i in range(32):
            with repo.session(seed=i) as other:
                other.append(token_ids=[1 + i, *range(1, 100)], points=range(1, 100) if keeps else ())
                other.commit("one of many small packs", branch=f"small/{i}")
        merged = repo.gc(keep_reflog_s=0)
        assert merged.packs_rewritten >= 64
        for i in range(1, 32):
            repo.delete_branch(f"small/{i}")
        report = repo.gc(keep_reflog_s=0)
        assert report.packs_rewritten > 0 and report.nbytes_kept - whole < (merged.nbytes_kept - whole) / 16
        again = repo.gc(keep_reflog_s=0)
        assert (again.packs_rewritten, again.nbytes_freed, again.nbytes_kept) == (0, 0, report.nbytes_kept)
        assert repo.session("small/0").num_tokens == 100
