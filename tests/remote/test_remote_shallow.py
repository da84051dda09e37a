"""Shallow clones and fetches: the last commits of a branch with all their KV, and what every verb says of the rest."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from hosts import commit, files, kv_of, read_all, remote, tokens, wish
from store_sessions import folder_bytes

import thaw
from thaw import Sampling, aio
from thaw.core.errors import Conflict, InvalidRequest, NewerFormat, NotFetched, RefConflict
from thaw.core.objects import Commit
from thaw.engines.base import Engine
from thaw.remote.fetch import FetchWish, fetch
from thaw.remote.folder import FolderBucket
from thaw.remote.push import push
from thaw.repo import Repository
from thaw.store import Store, settings

PART = "a document that is long enough to be shared, and each part of it says something else. " * 6


def chain(repo: Repository, num: int) -> list[str]:
    """`main`: so many commits, each of which adds a part to the one before; their ids, oldest first."""
    made: list[str] = []
    for i in range(num):
        with repo.session("main" if made else None, seed=1) as s:
            s.append(f"{i}: {PART}")
            made.append(s.commit(f"part {i}", branch="main").commit)
    return made


@pytest.fixture
def made(here: Repository) -> list[str]:
    found = chain(here, 5)
    here.push("main")
    return found


def commits(repo: Repository) -> set[str]:
    return set(repo.store.commits())


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_last_commits_come_with_all_that_they_need(
    here: Repository, made: list[str], far_engine: Engine, bucket: Path, tmp_path: Path, depth: int
) -> None:
    with thaw.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine, depth=depth) as there:
        assert commits(there) == set(made[-depth:]) and there.store.absent() == {made[-depth - 1]: "origin"}
        for one in made[-depth:]:
            assert kv_of(there.store, one) == kv_of(here.store, one)
        log = there.log("main")
        assert [entry.commit for entry in log] == made[: -depth - 1 : -1]
        assert [entry.shallow for entry in log] == [False] * (depth - 1) + [True]
        with there.fork("origin/main", 2) as kids, here.fork("main", 2) as siblings:
            assert all(proof.hit and proof.num_recomputed_tokens == 0 for proof in kids.proofs)
            greedy = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=2)
            far, near = kids.generate("And then?", greedy), siblings.generate("And then?", greedy)
            assert [(out.token_ids, out.logprobs) for out in far] == [(out.token_ids, out.logprobs) for out in near]
        assert there.verify("origin/main", fresh_process=False).ok
        checked = there.fsck()
        assert checked.ok and any("that were not fetched: 1;" in note for note in checked.notes)


def test_a_shallow_clone_moves_less_and_a_depth_beyond_the_beginning_is_a_whole_clone(
    here: Repository, far_engine: Engine, bucket: Path, tmp_path: Path
) -> None:
    """A second branch's own KV is only in commits that are left out."""
    old = chain(here, 2)
    with here.session(old[0], seed=1) as s:
        s.append("side " * 400)
        s.commit("aside", branch="side")
        for i in range(2):
            s.append(f"more {i}")
            s.commit(f"aside {i}", branch="side")
    here.push(all=True)
    sizes = {}
    for depth in (1, 99):
        with thaw.clone(bucket.as_uri(), tmp_path / f"at{depth}", engine=far_engine, depth=depth) as there:
            sizes[depth] = folder_bytes(there.store.packs)
            assert there.fsck().ok and bool(there.store.absent()) is (depth == 1)
            assert len(commits(there)) == (2 if depth == 1 else 5)
    assert sizes[1] < sizes[99]


@pytest.mark.parametrize("verb", ["log", "fork", "diff", "show", "verify", "session"])
def test_a_missing_ancestor_is_refused_by_name_with_what_to_do(
    made: list[str], far_engine: Engine, bucket: Path, tmp_path: Path, verb: str
) -> None:
    with thaw.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine, depth=2) as there:
        for point in ("main~2", "origin/main~3", made[2][3:15]):
            rest = {"diff": ("main",), "fork": (2,)}.get(verb, ())
            with pytest.raises(NotFetched) as refused:
                getattr(there, verb)(point, *rest)
            assert made[2][3:13] in str(refused.value) and "thaw fetch --unshallow origin" in str(refused.value)
        assert there.resolve("main~1").commit == made[3]


def test_deeper_and_to_the_beginning(
    here: Repository, made: list[str], far_engine: Engine, bucket: Path, tmp_path: Path
) -> None:
    """Of KV only the ends of older commits are new; an equal or smaller depth changes nothing."""
    with thaw.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine, depth=1) as there:
        assert there.fetch(depth=1).num_commits == there.fetch().num_commits == 0
        more = there.fetch(depth=3)
        assert more.num_commits == 2 and more.blob_nbytes < 1000 and there.store.absent() == {made[1]: "origin"}
        assert there.fetch(depth=2).num_commits == 0 and commits(there) == set(made[2:])
        assert there.fetch(unshallow=True).num_commits == 2 and there.store.absent() == {}
        assert commits(there) == set(made) and not any(entry.shallow for entry in there.log("main"))
        assert there.resolve("main~4").commit == made[0] and there.fetch(unshallow=True).num_commits == 0
        for one in made:
            assert kv_of(there.store, one) == kv_of(here.store, one)
        checked = there.fsck()
        assert checked.ok and not any("shallow" in note for note in checked.notes)


def test_a_plain_fetch_keeps_the_boundary_and_pull_goes_on(
    here: Repository, made: list[str], far_engine: Engine, bucket: Path, tmp_path: Path
) -> None:
    with thaw.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine, depth=1) as there:
        with here.session("main") as s:
            s.append("a sixth part")
            sixth = s.commit("part 5", branch="main").commit
        here.push("main")
        assert there.pull().refs[-1].outcome == "moved" and there.resolve("main").commit == sixth
        assert commits(there) == {made[-1], sixth} and there.store.absent() == {made[-2]: "origin"}
        assert kv_of(there.store, sixth) == kv_of(here.store, sixth)


def test_where_a_gap_is_left_pull_and_push_say_so(
    here: Repository, made: list[str], far_engine: Engine, bucket: Path, tmp_path: Path
) -> None:
    with thaw.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine, depth=1) as there:
        for i in range(3):
            with here.session("main") as s:
                s.append(f"late {i}")
                s.commit(f"late {i}", branch="main")
        here.push("main")
        there.fetch(depth=1)
        with pytest.raises(RefConflict, match="thaw fetch --unshallow"):
            there.pull()
        there.fetch(unshallow=True)
        assert there.pull().refs[-1].outcome == "moved" and there.fsck().ok
    with thaw.clone(bucket.as_uri(), tmp_path / "again", engine=far_engine, depth=1) as again:
        again.fork("main", 1).close()
        here.push("main", delete=True)
        here.adopt(made[2], "main")
        here.push("main")
        with pytest.raises(RefConflict, match="shallow"):
            again.push("main")


def test_a_push_builds_on_what_the_remote_has_of_older_history(
    here: Repository, made: list[str], far_engine: Engine, bucket: Path, tmp_path: Path
) -> None:
    """To the remote it came from; and to one that has only older commits, where the boundary's KV is sent anew."""
    with thaw.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine, depth=1) as there:
        with there.session("main") as s:
            s.append("what the other host adds")
            new = s.commit("theirs", branch="main").commit
        assert there.push("main").num_commits == 1
        here.adopt(made[-2], "old")
        here.add_remote("second", (tmp_path / "second").as_uri())
        here.push("old", remote="second")
        there.add_remote("second", (tmp_path / "second").as_uri())
        assert there.push("main", remote="second").num_commits == 2
    here.fetch()
    with thaw.clone((tmp_path / "second").as_uri(), tmp_path / "whole", engine=far_engine, branch="main") as whole:
        assert commits(whole) == {*made, new} and whole.store.absent() == {} and whole.fsck().ok
        assert kv_of(whole.store, new) == kv_of(here.store, new)


def test_a_push_to_a_remote_without_older_history_is_refused_by_name(
    made: list[str], far_engine: Engine, bucket: Path, tmp_path: Path
) -> None:
    with thaw.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine, depth=2) as there:
        there.add_remote("empty", (tmp_path / "empty").as_uri())
        with pytest.raises(NotFetched) as refused:
            there.push("main", remote="empty")
        assert made[2][3:13] in str(refused.value) and "thaw fetch --unshallow origin" in str(refused.value)
        assert not files(tmp_path / "empty", "packs") and not files(tmp_path / "empty", "manifests")
        there.fetch(remote="origin", unshallow=True)
        assert there.push("main", remote="empty").num_commits == 5


def test_gc_keeps_what_is_reached_and_forgets_boundaries_that_nothing_names(
    here: Repository, made: list[str], far_engine: Engine, bucket: Path, tmp_path: Path
) -> None:
    with here.session(made[1], seed=1) as s:
        s.append("aside " * 300)
        for i in range(3):
            s.append(f"{i}")
            aside = s.commit(f"aside {i}", branch="side").commit
    here.push("side")
    with thaw.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine, depth=1) as there:
        assert len(there.store.absent()) == 2
        assert there.gc().commits_removed == 0 and commits(there) == {made[-1], aside}
        there.remove_remote("origin")
        assert there.gc(keep_reflog_s=0).commits_removed == 1 and commits(there) == {made[-1]}
        assert list(there.store.absent()) == [made[-2]] and there.fsck().ok
        assert read_all(there.store, made[-1])


def test_fsck_makes_a_shallow_repository_again(
    made: list[str], far_engine: Engine, bucket: Path, tmp_path: Path
) -> None:
    with thaw.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine, depth=2) as there:
        kv = kv_of(there.store, made[-1])
    (tmp_path / "there" / "thaw.db").unlink()
    for left in (tmp_path / "there").glob("thaw.db-*"):
        left.unlink()
    from thaw.store.checkup import fsck

    assert fsck(tmp_path / "there", rebuild=True).ok
    with thaw.open(tmp_path / "there", engine=far_engine) as there:
        assert there.resolve("main").commit == made[-1] and there.store.absent() == {made[2]: "origin"}
        assert kv_of(there.store, made[-1]) == kv and there.fetch(unshallow=True).num_commits == 3


def test_fsck_tells_a_lost_commit_from_one_that_was_not_fetched(
    made: list[str], far_engine: Engine, bucket: Path, tmp_path: Path
) -> None:
    """The control: without the note the same repository is damaged, and gc removes nothing."""
    with thaw.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine, depth=2) as there:
        with there.store.database.write() as connection:
            settings.drop_setting(connection, "user.shallow")
        problems = there.fsck().problems
        assert any(made[2] in problem.what for problem in problems)
        with pytest.raises(thaw.core.errors.Damaged):
            there.gc()


def test_an_older_thaw_refuses_a_shallow_repository(
    made: list[str], far_engine: Engine, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thaw.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine, depth=1).close()
    monkeypatch.setattr(settings, "SHALLOW", 3)
    with pytest.raises(NewerFormat, match="format 4"):
        Store.open(tmp_path / "there")
    thaw.clone(bucket.as_uri(), tmp_path / "whole", engine=far_engine).close()
    Store.open(tmp_path / "whole").close()


def test_depths_that_mean_nothing_are_refused(made: list[str], bucket: Path, tmp_path: Path) -> None:
    for wrong in (0, -1):
        with pytest.raises(InvalidRequest, match=f"depth={wrong}"):
            thaw.clone(bucket.as_uri(), tmp_path / "there", depth=wrong)
    with pytest.raises(InvalidRequest, match="refs_only"):
        thaw.clone(bucket.as_uri(), tmp_path / "there", depth=1, refs_only=True)
    assert not (tmp_path / "there").exists()
    with thaw.clone(bucket.as_uri(), tmp_path / "there") as there, pytest.raises(InvalidRequest, match="not both"):
        there.fetch(depth=1, unshallow=True)


def test_the_awaited_forms(made: list[str], far_engine: Engine, bucket: Path, tmp_path: Path) -> None:
    async def go() -> None:
        async with await aio.clone(bucket.as_uri(), tmp_path / "there", engine=far_engine, depth=1) as there:
            assert (await there.log("main"))[0].shallow
            assert (await there.fetch(depth=2)).num_commits == 1
            assert (await there.fetch(unshallow=True)).num_commits == 3

    asyncio.run(go())


def test_a_shallow_fetch_in_a_namespace_stays_there(tmp_path: Path, bucket: Path, engine: Engine) -> None:
    with thaw.open(tmp_path / "here", engine=engine, namespace="acme") as here:
        here.add_remote("origin", bucket.as_uri())
        made = chain(here, 3)
        here.push("main")
    with thaw.clone(bucket.as_uri(), tmp_path / "there", namespace="acme", depth=1) as there:
        assert there.store.absent() == {made[1]: "origin"}
        with pytest.raises(NotFetched):
            there.store.get_as(made[1], Commit)
    with Store.open(tmp_path / "there") as whole:
        assert whole.absent() == {}
        with pytest.raises(thaw.core.errors.NotFound) as refused:
            whole.get_as(made[1], Commit)
        assert not isinstance(refused.value, NotFetched)


def test_a_merge_of_depths_over_many_histories(tmp_path: Path, bucket: Path) -> None:
    """Groups of a few bytes: each becomes visible alone, and each is whole. An interrupted deepening goes on."""
    source = Store.init(tmp_path / "source")
    made = [commit(source, tokens(300))]
    for i in range(7):
        made.append(commit(source, tokens(300 + 40 * (i + 1)), parents=(made[-1],)))
    push(source, remote(bucket), [wish(source, "main")])
    for depth in range(1, 9):
        with Store.init(tmp_path / f"there{depth}") as there:
            fetch(there, remote(bucket), FetchWish(depth=depth), group_bytes=1)
            assert sorted(there.commits()) == sorted(made[-depth:]) and there.fsck().ok
            stopped = _Stopping(bucket, after=3)
            try:
                fetch(there, remote(stopped), FetchWish(unshallow=True), group_bytes=1, workers=1)
            except KeyboardInterrupt:
                assert there.fsck().ok
            fetch(there, remote(bucket), FetchWish(unshallow=True), group_bytes=1)
            assert sorted(there.commits()) == sorted(made) and there.absent() == {} and there.fsck().ok
            assert all(read_all(there, one) for one in made)
    source.close()


def test_nothing_but_parents_may_be_absent(tmp_path: Path) -> None:
    """Whoever says that a commit's state was left out is told that it is needed; a parent may be left out."""
    source = Store.init(tmp_path / "source")
    first = commit(source, tokens(300))
    value = source.get_as(commit(source, tokens(340), parents=(first,)), Commit)
    with Store.init(tmp_path / "there") as there:
        with there.begin() as tx, pytest.raises(Conflict, match="not in the repository"):
            tx.leave_out({first: "origin", value.state: "origin"})
            tx.put(value)
            tx.commit()
        assert there.absent() == {} and not list(there.commits())
    with source.begin() as tx:
        tx.leave_out({value.state: "origin", "b3:" + "0" * 64: "origin"})
        tx.put(value)
        tx.commit()
    assert source.absent() == {}
    source.close()


class _Stopping(FolderBucket):
    """A bucket whose reader is interrupted after so many requests for ranges."""

    def __init__(self, root: Path, after: int) -> None:
        super().__init__(root)
        self._left = after

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt
        return super().read_ranges(key, ranges)
